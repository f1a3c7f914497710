"""Rounds of UDASA in every state, written by the code that writes real ones, but without models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asa_dist.config import Config, build_config, dump_config
from asa_dist.pairing import pair_round
from asa_dist.records import MeasuredPrompt, unmeasured
from asa_dist.rounds import Round
from asa_dist.runtime.measurements import MeasurementFiles
from asa_dist.udasa.curriculum import StagePlan, plan_curriculum
from asa_dist.udasa.uncertainty import fuse
from tests.run_folders import write_checkpoint, write_rows

SEED = 5
NUM_RESPONSES = 5
ALL_DONE = "all planned steps are done"
THINGS = ("capital", "largest river", "oldest university", "currency", "best known painter", "highest mountain")
PLACES = ("Peru", "Norway", "Kenya", "Japan", "Austria", "Canada", "Vietnam", "Chile", "Egypt", "Ireland", "Nepal")
OPENINGS = ("It is", "That would be", "As far as I know, it is", "Many people say it is", "I am not sure, but perhaps")
NAMES = ("Aldora", "Benth", "Cormel", "Dunvar", "Esprin", "Falmoor", "Gildan")

Uncertainties = dict[str, np.ndarray]  # float64 [P, N], by name


def udasa_config(folder: Path, **udasa: Any) -> Config:
    """``folder`` gets the files that it names.

    Args:
        udasa: fields of its section; of the curriculum, small enough to be trained in a few steps, only some.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a prompt\n")
    curriculum = {
        "thresholds": [0.12, 0.25], "pairs_per_step": 2, "max_epochs": 3, "eval_every_steps": 4,
        "heldout_fraction": 0.2,
    }  # fmt: skip
    tree = {
        "method": "udasa", "seed": SEED, "model": {"name_or_path": str(folder)},
        "rollout": {"prompt_file": str(folder / "prompts.txt"), "responses_per_prompt": NUM_RESPONSES},
        "udasa": udasa | {"curriculum": curriculum | udasa.get("curriculum", {})},
    }
    return build_config(tree, "a round of a test")


# --- measuring --------------------------------------------------------------------------------------------------
def prompts_of(count: int) -> list[MeasuredPrompt]:
    """With responses of many lengths; prompt 7 gets nothing but empty ones, prompt 9 five times the same."""
    rng = np.random.default_rng(SEED)
    prompts = []
    for prompt_id in range(count):
        thing, place = THINGS[prompt_id % len(THINGS)], PLACES[prompt_id // len(THINGS) % len(PLACES)]
        texts = [f"{rng.choice(OPENINGS)} {rng.choice(NAMES)}{', and' * int(rng.integers(0, 4))} ({n})."
                 for n in range(NUM_RESPONSES)]  # fmt: skip
        texts = {7: [""] * NUM_RESPONSES, 9: ["It is Aldora."] * NUM_RESPONSES}.get(prompt_id, texts)
        responses = tuple(unmeasured(text, np.arange(len(text) // 3, dtype=np.int32), n != 3)
                          for n, text in enumerate(texts))  # fmt: skip
        text = f"What is the {thing} of {place}?"
        prompts.append(MeasuredPrompt(prompt_id, text, np.arange(9, dtype=np.int32), 0, SEED, responses))
    return prompts


def uncertainties_of(count: int) -> Uncertainties:
    """The value uncertainty of prompt 11 is not known; prompt 12 ties."""
    rng = np.random.default_rng(SEED + 1)
    doubt_PN = rng.beta(1.2, 1.6, (count, NUM_RESPONSES))
    found = {name: np.clip(doubt_PN * scale + rng.normal(0, 0.12, doubt_PN.shape), 0, 1)
             for name, scale in (("semantic", 0.6), ("factual", 0.9), ("value", 0.3))}  # fmt: skip
    found["value"][11:12] = np.nan
    for value_PN in found.values():
        value_PN[12:13] = 0.25
    return found


def measure(folder: Path, count: int, num_scored: int, change: Callable[[Uncertainties], None] | None = None) -> None:
    """
    Args:
        num_scored: prompts whose uncertainties are there, too.
        change: of the uncertainties before they are fused.
    """
    prompts, u_PN = prompts_of(count), uncertainties_of(count)
    if change is not None:
        change(u_PN)
    u_PN["total"] = fuse(torch.stack([torch.from_numpy(value_PN) for value_PN in u_PN.values()], -1), "softmax").numpy()
    files = MeasurementFiles(folder)
    files.add_responses(prompts)
    files.add_uncertainties(prompts[:num_scored], {name: value_PN[:num_scored] for name, value_PN in u_PN.items()})
    if num_scored == count:
        files.complete({count + 1: "longer than rollout.max_prompt_tokens 24"})


# --- training ---------------------------------------------------------------------------------------------------
def metrics(plans: Sequence[StagePlan], steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a round that learns, up to ``steps``.

    Args:
        changes: values by key, with "__" for "/", or functions of (stage from 1, share of the stage that is over).
    """
    rng = np.random.default_rng(SEED + 2)
    rows: list[dict[str, Any]] = []
    finished = 0
    for plan in plans:
        rows.append({"step": finished, "time/reference_seconds": 1.5})
        for step in range(plan.num_steps):
            done, finished = (step + 1) / plan.num_steps, finished + 1
            gain = done * (1 - 0.25 * plan.stage)
            row = {
                "step": finished, "tokens/rollout": 300.0 * finished, "train/skipped_steps": 0.0,
                "udasa/stage": plan.stage + 1, "udasa/pairs": 2.0,
                "udasa/loss": 0.69 - 0.4 * gain + rng.normal(0, 0.04),
                "udasa/margin": 0.9 * gain + rng.normal(0, 0.08), "udasa/kl": 0.02 * gain,
                "udasa/accuracy": float(rng.binomial(2, 0.6 + 0.4 * gain)) / 2,
                "lr/psi": plan.learning_rate(step), "grad_norm/psi": 4 + rng.gamma(2.0),
                "time/step_seconds": 0.4, "perf/tokens_per_second": 750.0 + rng.normal(0, 20), "memory/peak_bytes": 3e9,
            }  # fmt: skip
            if plan.heldout_ids and ((step + 1) % 4 == 0 or step + 1 == plan.num_steps):
                row |= {"eval/loss": 0.693 - 0.3 * gain, "eval/margin": 0.6 * gain, "eval/accuracy": 0.6 + 0.3 * gain,
                        "eval/kl": 0.018 * gain}  # fmt: skip
            for name, value in changes.items():
                if (key := name.replace("__", "/")) in row:
                    row[key] = value(plan.stage + 1, done) if callable(value) else value
            rows.append(row)
    return [row for row in rows if row["step"] <= steps]


def event(name: str, minute: int, **details: Any) -> dict[str, Any]:
    return {"time": f"2026-01-01T00:{minute:02d}:00+00:00", "event": name, **details}


def training_events(plans: Sequence[StagePlan], steps: int) -> list[dict[str, Any]]:
    """Of the trainer, up to ``steps``; without its end."""
    events, first = [event("started", 10, step=0, ranks=2)], 0
    for turn, plan in enumerate(plans):
        if first > steps or first == steps > 0:
            break
        events.append(event("stage_started", 11 + turn, step=first, stage=plan.stage + 1, pairs=len(plan.train_ids),
                            heldout_pairs=len(plan.heldout_ids), planned_steps=plan.num_steps))  # fmt: skip
        first += plan.num_steps
        if first <= steps:
            details = {"stage": plan.stage + 1, "steps": plan.num_steps, "reason": ALL_DONE}
            events.append(event("stage_finished", 12 + turn, step=first, **details))
    return events


def write_round(
    run_dir: Path, state: str, *events: Mapping[str, Any], steps: int | None = None, num_prompts: int = 64,
    change: Callable[[Uncertainties], None] | None = None, udasa: Mapping[str, Any] | None = None, **changes: Any,
) -> Path:
    """The folder of the first round of ``run_dir``.

    Args:
        state: measuring, measured, paired, or trained: after ``steps`` steps; None: all.
        events: of the measuring, before those of the training, whose last one is "finished" if all steps are made.
        change: of :func:`measure`.
        udasa: of :func:`udasa_config`.
        changes: of :func:`metrics`.
    """
    config = udasa_config(run_dir, **(udasa or {}))
    found = Round(run_dir, 0)
    found.folder.mkdir()
    for folder in (run_dir, found.folder):
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_rows(found.folder, "events", event("worker_started", 1, worker="scorer-0"), *events)
    measure(found.folder, num_prompts, num_prompts // 2 if state == "measuring" else num_prompts, change)
    if state in ("measuring", "measured"):
        return found.folder
    made = pair_round(found, config)
    if state == "paired":
        return found.folder
    plans = plan_curriculum(made.stage_by_id, config.udasa.curriculum, config.seed, 0)
    num_steps = sum(plan.num_steps for plan in plans)
    steps = num_steps if steps is None else steps
    write_rows(found.folder, "metrics", *metrics(plans, steps, **changes))
    due = [prompt_ids for plan in plans for prompt_ids in plan.pairs_by_step()]
    write_rows(found.folder, "trained", *(
        {"step": step, "prompt_ids": prompt_ids} for step, prompt_ids in enumerate(due[:steps], start=1)))
    ends = [event("finished", 30, step=steps)] if steps == num_steps else []
    with (found.folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*training_events(plans, steps), *ends))
    write_checkpoint(found.folder, steps)
    if ends:
        found.result.mkdir()
    return found.folder
