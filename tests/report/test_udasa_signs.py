"""Every known bad sign of a round of UDASA is said when it is there, and a healthy round has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asa_dist.report.run_files import read_run
from asa_dist.report.signs import warnings
from asa_dist.report.udasa_page import udasa_page
from asa_dist.report.udasa_round import read_round
from asa_dist.report.udasa_signs import ENOUGH_PAIRS, one_sided_lengths
from asa_dist.runtime.run_lock import hold_run_folder
from tests.report.report_rounds import Uncertainties, event, write_round


def said(folder: Path) -> list[str]:
    run = read_run(folder)
    return udasa_page(run).warnings + warnings(run)


def found(tmp_path: Path, state: str = "trained", **changes: Any) -> list[str]:
    return said(write_round(tmp_path / "run", state, **changes))


def setting(name: str, value: float, share: float = 1.0) -> Callable[[Uncertainties], None]:
    """Of the first prompts, this share of them."""

    def change(u_PN: Uncertainties) -> None:
        u_PN[name][: round(share * len(u_PN[name]))] = value

    return change


@pytest.mark.parametrize("state", ["measured", "paired", "trained"])
def test_a_healthy_round_has_none(tmp_path: Path, state: str) -> None:
    assert found(tmp_path, state) == []


def test_measuring_that_has_ended_early(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "measuring")
    assert said(folder) == [
        "Measuring has ended before it was complete: 64 prompts are answered, 32 of them measured. Nothing of it is "
        f"lost; go on with: asa resume {tmp_path / 'run'}"]  # fmt: skip
    with hold_run_folder(folder):
        assert said(folder) == []


@pytest.mark.parametrize(("name", "value", "share", "start"), [
    ("value", np.nan, 1.0, "The value uncertainty of all 320 responses could not be measured, so that no response has"),
    ("factual", 0.25, 1.0, "The factual uncertainty is the same for all 320 responses, 0.25: it tells none of them"),
    ("semantic", np.nan, 0.25, "80 of 320 responses have no total"),
])  # fmt: skip
def test_uncertainties(tmp_path: Path, name: str, value: float, share: float, start: str) -> None:
    texts = found(tmp_path, "measured", change=setting(name, value, share))
    assert len(texts) == 1 and texts[0].startswith(start), texts


def test_empty_responses(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "measured")
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    for row in rows[:10]:
        row["responses"] = [{**response, "text": " "} for response in row["responses"]]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said(folder) == ["50 of 320 responses say nothing: none of them is in a pair."]


def all_alike(u_PN: Uncertainties) -> None:
    """But for the last prompts."""
    for value_PN in u_PN.values():
        value_PN[:40] = value_PN[:40, :1]


def test_few_pairs(tmp_path: Path) -> None:
    texts = found(tmp_path, "paired", change=all_alike)
    assert texts == ["40 of 64 prompts gave no pair. The commonest reason: no other response is more uncertain than "
                     "the least uncertain one (37)."]  # fmt: skip


@pytest.mark.parametrize(("curriculum", "start", "end"), [
    ({"thresholds": [0.1, 0.9]}, "Stage 1 (Δu > 0.9) got no pair and is skipped: the largest Δu is 0.654.",
     "With other udasa.curriculum.thresholds, or threshold_kind=quantile, none stays empty."),
    ({"thresholds": [0.1, 0.8, 0.9]}, "Stages 1 (Δu > 0.9), 2 (0.8 < Δu ≤ 0.9) got no pair and are skipped: the",
     "none stays empty."),
])  # fmt: skip
def test_stages_without_pairs(tmp_path: Path, curriculum: dict[str, Any], start: str, end: str) -> None:
    (text,) = found(tmp_path, "paired", udasa={"curriculum": curriculum})
    assert text.startswith(start) and text.endswith(end)


def test_quantiles_of_equal_differences(tmp_path: Path) -> None:
    def two_values(u_PN: Uncertainties) -> None:
        for value_PN in u_PN.values():
            value_PN[:] = [0.2, 0.4, 0.4, 0.4, 0.4]

    curriculum = {"thresholds": [0.3, 0.6], "threshold_kind": "quantile"}
    (text,) = found(tmp_path, "paired", change=two_values, udasa={"curriculum": curriculum})
    assert text.startswith("Stages 1") and "Many pairs have the same Δu" in text


@pytest.mark.parametrize(("num_chosen", "num_rejected", "word"), [(3, 9, "shorter"), (9, 3, "longer"), (5, 5, None)])
def test_one_sided_lengths(tmp_path: Path, num_chosen: int, num_rejected: int, word: str | None) -> None:
    run = read_run(write_round(tmp_path / "run", "paired"))
    files = read_round(run)
    assert files.pairs is not None and len(files.pairs) > ENOUGH_PAIRS
    files.pairs = tuple(
        replace(pair, chosen=replace(pair.chosen, token_ids=np.arange(num_chosen, dtype=np.int32)),
                rejected=replace(pair.rejected, token_ids=np.arange(num_rejected, dtype=np.int32)))
        for pair in files.pairs)  # fmt: skip
    texts = list(one_sided_lengths(run, files, []))
    assert len(texts) == (word is not None)
    assert word is None or texts[0].startswith(f"In 100% of the pairs the chosen response is the {word} one, by 6 ")
    files.pairs = files.pairs[: ENOUGH_PAIRS - 1]
    assert list(one_sided_lengths(run, files, [])) == []


def overfits(stage: int, done: float) -> float:
    """Falls, then rises, in the second stage."""
    return 0.7 - 0.2 * done if stage != 2 or done < 0.5 else 0.6 + 0.2 * (done - 0.5)


def test_heldout_loss_that_rises(tmp_path: Path) -> None:
    (text,) = found(tmp_path, eval__loss=overfits)
    assert text.startswith("Stage 2 overfits: its held-out loss rose from 0.6") and "the training loss fell" in text


def test_losses_that_rise_together_are_no_overfitting(tmp_path: Path) -> None:
    assert found(tmp_path, eval__loss=overfits, udasa__loss=lambda stage, done: 0.5 + 0.1 * done) == []


FEW = " So few say little: more prompts, or a larger udasa.curriculum.heldout_fraction."


@pytest.mark.parametrize(("heldout_fraction", "num_heldout", "end"), [(0.2, (5, 3), FEW), (0.7, (16, 10), "")])
def test_no_better_than_a_coin(tmp_path: Path, heldout_fraction: float, num_heldout: tuple[int, int], end: str) -> None:
    texts = found(tmp_path, eval__accuracy=lambda stage, done: 0.8 if stage == 1 else 0.5,
                  udasa={"curriculum": {"heldout_fraction": heldout_fraction}})  # fmt: skip
    shown = f"stage 2: 50% of {num_heldout[0]}, stage 3: 50% of {num_heldout[1]}"
    assert texts == ["At a stage's end the model prefers the chosen response of held-out pairs no more often than a "
                     f"coin would: {shown} (eval/accuracy).{end}"]  # fmt: skip


def test_a_stage_that_is_under_way_may_be_no_better_yet(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "trained", steps=40, eval__accuracy=0.4)
    with hold_run_folder(folder):
        (text,) = said(folder)
    assert "would: stage 1: 40% of 5 (eval/accuracy)" in text


def test_what_is_said_of_every_run(tmp_path: Path) -> None:
    """A crash, with the folder to go on with; skipped steps; pairs that were not trained on."""
    folder = write_round(tmp_path / "run", "trained", event("step_skipped", 11, step=7, reason="udasa/loss is nan"),
                         steps=40, train__skipped_steps=1.0)  # fmt: skip
    lines = (folder / "trained.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "prompt_ids": row["prompt_ids"][:1]}) + "\n"
    (folder / "trained.jsonl").write_text("".join(lines))
    crashed, lost, skipped = said(folder)
    assert crashed.endswith(f"Go on from step 40 with: asa resume {tmp_path / 'run'}.")
    assert lost.startswith("Prompts lost: 1; trained on more than once: 0.")
    assert skipped.endswith("The last reason: udasa/loss is nan")
