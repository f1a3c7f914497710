"""Run folders with metrics, samples and events, in the format of real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.run_folders import write_checkpoint, write_rows, write_run, write_trained

STARTED = {"time": "2026-01-01T00:00:00+00:00", "event": "started", "step": 0, "ranks": 2}
EVIL = "</script><img src=x onerror=\"window.pwned = 1\"><!--<script>"


def metrics(steps: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a healthy run that aligns from step 21 on.

    Args:
        changes: values by key, with "__" for "/", or functions of the step.
    """
    rows: list[dict[str, Any]] = [{"step": 0, "eval/perplexity": 600.0, "eval/bigram_perplexity": 500.0}]
    for step in range(1, steps + 1):
        row = {
            "step": step, "train/skipped_steps": 0.0, "loss/total": 5.0 - step / steps, "loss/mle": 6.0 - step / steps,
            "trust/tau": 0.4, "trust/rho": 0.41, "trust/beta": 0.1 if step > 20 else 0.0, "reward/self": 0.3,
            "rollout/distinct_fraction": 0.9, "rollout/length_mean": 12.0, "rollout/entropy": 3.0,
            "perf/tokens_per_second": 2000.0, "time/step_seconds": 0.5,
        }  # fmt: skip
        if step in (steps // 2, steps):
            row |= {"eval/perplexity": 30.0 - step / steps, "eval/bigram_perplexity": 40.0}
        for name, value in changes.items():
            key = name.replace("__", "/")
            if key in row:
                row[key] = value(step) if callable(value) else value
        rows.append(row)
    return rows


def sample(step: int, prompt: str = "Once", *texts: str, **terms: Any) -> dict[str, Any]:
    """A row of samples.jsonl."""
    values = {"self": 0.25, "intrinsic": 0.5, "signal/fluency": 0.125} | terms
    return {
        "step": step, "prompt_id": step, "tau": 0.4, "prompt": prompt,
        "responses": [{"text": text, "finished": True, "version": step - 1, **values} for text in texts or ("a", "b")],
    }  # fmt: skip


def end(event: str, step: int) -> dict[str, Any]:
    return {"time": "2026-01-01T00:10:00+00:00", "event": event, "step": step}


def write_report_run(
    folder: Path, steps: int = 100, *events: Mapping[str, Any], num_steps: int = 100, **changes: Any
) -> Path:
    """A run folder after ``steps`` steps of ``num_steps``; without ``events``: finished."""
    config = write_run(folder, "rollout.prompts_per_step=4", steps=num_steps)
    write_trained(folder, config, steps)
    write_rows(folder, "metrics", *metrics(steps, **changes))
    write_rows(folder, "samples", *(sample(step) for step in range(1, steps + 1, 10)))
    write_rows(folder, "events", *(events or (STARTED, end("finished", steps))))
    if steps < 256:  # the content of one is a byte per step
        write_checkpoint(folder, steps)
    return folder
