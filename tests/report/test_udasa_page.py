"""The page of a round of UDASA, in every state that a round can be in, whatever is missing or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asa_dist.config import load_config
from asa_dist.pairing import pair_round
from asa_dist.report.markup import number
from asa_dist.report.run_files import read_run
from asa_dist.report.udasa_examples import SHOWN_PAIRS, examples
from asa_dist.report.udasa_page import udasa_page
from asa_dist.report.udasa_round import read_round
from asa_dist.rounds import Round
from asa_dist.runtime.pair_files import PAIRS, SUMMARY, read_pairs, read_summary
from asa_dist.runtime.run_lock import hold_run_folder
from tests.report.report_rounds import ALL_DONE, event, write_round
from tests.report.report_runs import EVIL
from tests.report.test_page import Page, report
from tests.run_folders import flip_a_bit


def stage_rows(page: Page) -> list[str]:
    """The lines of the table of stages."""
    text = page.path.read_text(encoding="utf-8").partition("<section id=curriculum>")[2].partition("</table>")[0]
    return text.split("<tr>")[2:]


def cells(row: str) -> list[str]:
    return [part.rpartition(">")[2].replace("&gt;", ">").replace("&lt;", "<") for part in row.split("</td>")[:-1]]


def figures(folder: Path) -> dict[str, tuple[str, str]]:
    return {figure.title: (figure.value, figure.explanation) for figure in udasa_page(read_run(folder)).figures}


# --- states -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("state", "shown", "stage"), [
    ("measuring", "interrupted", "measure"), ("measured", "measured", "pairs"), ("paired", "paired", "training"),
    ("trained", "finished", "all done"),
])  # fmt: skip
def test_states(tmp_path: Path, state: str, shown: str, stage: str) -> None:
    folder = write_round(tmp_path / "run", state)
    page = report(folder)
    assert f"run, round-1: {shown}" in page.text and figures(folder)["stage"][0] == stage
    assert ("Look at this first" in page.text) == (state == "measuring")
    assert ("No step has been logged yet." in page.text) == (state != "trained")
    assert ("No pairs have been made yet." in page.text) == (state in ("measuring", "measured"))
    with hold_run_folder(folder):
        assert ("run, round-1: running" in report(folder).text) == (state != "trained")


def test_a_round_that_has_just_begun(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "measured")
    for name in ("events.jsonl", "responses.jsonl", "uncertainty.jsonl", "measured.json"):
        (folder / name).unlink()
    page = report(folder)
    assert "not started" in page.text and "Nothing yet." in page.text and "Nothing." in page.text


def test_what_the_page_of_a_finished_round_says(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "trained", event("estimator_notice", 3, notice="cut to 512 tokens"))
    page, summary = report(folder), read_summary(folder).summary
    assert "step 72 of 72" in page.text and "Look at this first" not in page.text
    found = figures(folder)
    assert found["prompts measured"] == ("64", "320 responses: 5 empty, 5 unmeasured")
    assert found["pairs"] == ("60", "of 64 prompts; 4 gave none")
    loss, of = found["held-out loss"]
    assert loss == "0.543" and of.startswith("stage 3, step 72; in training")
    assert found["held-out accuracy"] == ("0.75", "margin 0.300") and found["newest checkpoint"][0] == "step 72"
    assert [cells(row) for row in stage_rows(page)] == [
        ["1", "Δu > 0.25", "1", "23", "18", "5", "27 of 27", "0.649 → 0.393", "0.089 → 0.600", "0.644 → 0.900",
         ALL_DONE],
        ["2", "0.12 < Δu ≤ 0.25", "2", "23", "18", "5", "27 of 27", "0.660 → 0.468", "0.067 → 0.450", "0.633 → 0.825",
         ALL_DONE],
        ["3", "Δu ≤ 0.12", "3", "14", "11", "3", "18 of 18", "0.660 → 0.543", "0.067 → 0.300", "0.633 → 0.750",
         ALL_DONE],
    ]  # fmt: skip
    assert summary.stage_pairs == (23, 23, 14)
    assert page.data["bands"] == [{"from": 0, "to": 27, "text": "1"}, {"from": 27, "to": 54, "text": "2"},
                                  {"from": 54, "to": 72, "text": "3"}]  # fmt: skip


def test_what_was_skipped_and_why(tmp_path: Path) -> None:
    events = [event("estimator_notice", 3, notice="cut to 512 tokens")] * 2
    text = report(write_round(tmp_path / "run", "paired", *events)).text.partition("What was skipped")[2]
    for said in ("prompts left out: longer than rollout.max_prompt_tokens 24165", "responses that say nothing57",
                 "responses: value uncertainty could not be measured5", "responses: no total, as a part is missing5",
                 "fewer than two responses could be measured111", "fewer than two say anything17",
                 "all responses say the same19", "more uncertain than the least uncertain one112",
                 "cut to 512 tokens (× 2)"):  # fmt: skip
        assert said in text, said


def test_prompts_left_out_are_said_before_measuring_is_complete(tmp_path: Path) -> None:
    announced = [event("prompts_left_out", minute, count=3, reason="no token is left of it") for minute in (1, 2)]
    page = report(write_round(tmp_path / "run", "measuring", *announced))
    assert page.text.count("prompts left out; the first: no token is left of it3") == 1


# --- curriculum -------------------------------------------------------------------------------------------------
def test_a_stage_under_way_and_one_not_begun(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "trained", steps=40)
    rows = [cells(row) for row in stage_rows(report(folder))]
    assert [row[6] for row in rows] == ["27 of 27", "13 of 27", "0 of 18"]
    assert [row[-1] for row in rows] == [ALL_DONE, "not ended yet", "not begun"]
    assert figures(folder)["stage"] == ("2 of 3", "0.12 < Δu ≤ 0.25; step 13 of 27")
    with hold_run_folder(folder):
        assert cells(stage_rows(report(folder))[1])[-1] == "under way"


def test_a_stage_without_pairs_and_stages_that_cannot_end_early(tmp_path: Path) -> None:
    curriculum = {"thresholds": [0.1, 0.2, 0.9], "order": "random", "heldout_fraction": 0.0}
    folder = write_round(tmp_path / "run", "trained", udasa={"curriculum": curriculum})
    rows = [cells(row) for row in stage_rows(report(folder))]
    assert rows[0] == ["1", "Δu > 0.9", "–", "0", *["–"] * 6, "skipped: no pairs"]
    assert sorted(row[2] for row in rows[1:]) == ["1", "2", "3"] and [row[2] for row in rows[1:]] != ["1", "2", "3"]
    assert {row[-1] for row in rows[1:]} == {f"{ALL_DONE}; without held-out pairs nothing can end it early"}
    assert figures(folder)["held-out loss"] == ("–", "no held-out pairs evaluated")


def test_an_early_stop(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "trained", steps=40)
    lines = (folder / "events.jsonl").read_text()
    reason = "the held-out loss has not fallen in 3 evaluations"
    ended = event("stage_finished", 13, step=40, stage=2, steps=13, reason=reason)
    begun = event("stage_started", 13, step=40, stage=3, pairs=11, heldout_pairs=3, planned_steps=18)
    (folder / "events.jsonl").write_text(lines + json.dumps(ended) + "\n" + json.dumps(begun) + "\n")
    page = report(folder)
    row = cells(stage_rows(page)[1])
    assert (row[6], row[-1]) == ("13 of 27", reason) and "step 40 of 58" in page.text
    assert figures(folder)["stage"][0] == "3 of 3"


@pytest.mark.parametrize(("udasa", "said"), [
    ({}, "in stage 1, trained first, the one that wrote them, so only that selection biases it; in stages 2 and 3 one "
         "that did not write them, so there it is biased"),
    ({"dpo": {"reference": "base"}}, "The reference (base) is the model that wrote them, so only that selection"),
    ({"curriculum": {"thresholds": []}}, "as there is one stage, so only that selection biases it"),
])  # fmt: skip
def test_what_the_kl_is_of(tmp_path: Path, udasa: dict[str, Any], said: str) -> None:
    text = report(write_round(tmp_path / "run", "paired", udasa=udasa)).text
    last = "1" if "curriculum" in udasa else "3"
    assert said in text
    assert f"As a penalty, 0.05 times this, it is part of the loss of stage {last}, the last one." in text


@pytest.mark.parametrize(("setting", "changed", "said"), [
    ("temperature: 1.0", "temperature: 0.7", "They were sampled at temperature 0.7, which biases it, too"),
    ("top_p: 1.0", "top_p: 0.9", "They were cut by top_p = 0.9, which"),
    ("sampling: independent", "sampling: one_prompt", "They were asked for all at once, behind another prompt, which"),
])  # fmt: skip
def test_other_sampling_biases_the_kl_too(tmp_path: Path, setting: str, changed: str, said: str) -> None:
    folder = write_round(tmp_path / "run", "paired")
    assert "which biases it, too" not in report(folder).text
    config = folder / "config.yaml"
    assert setting in config.read_text()
    config.write_text(config.read_text().replace(setting, changed))
    assert said in report(folder).text


# --- what page.js draws -----------------------------------------------------------------------------------------
def test_heldout_lines_break_between_stages(tmp_path: Path) -> None:
    data = report(write_round(tmp_path / "run", "trained")).data
    series = {s["name"]: s for chapter in data["chapters"] for chart in chapter["charts"] for s in chart["series"]}
    heldout = [*zip(series["eval/loss"]["x"], series["eval/loss"]["y"], strict=True)]
    assert [x for x, _ in heldout] == [4, 8, 12, 16, 20, 24, 27, 27, 31, 35, 39, 43, 47, 51, 54, 54, 58, 62, 66, 70, 72]
    assert [place for place, (_, y) in enumerate(heldout) if y is None] == [7, 15]
    assert heldout[0][1] == pytest.approx(0.6486, abs=1e-4) and None not in series["udasa/loss"]["y"]
    assert series["udasa/loss"]["x"] == list(range(1, 73)) and "udasa/stage" not in series


def test_histograms_with_thresholds(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "paired", udasa={"curriculum": {"threshold_kind": "quantile",
                                                                           "thresholds": [0.5]}})  # fmt: skip
    total, *parts = report(folder).data["histograms"]
    summary = read_summary(folder).summary
    assert total["title"] == "Δu" and total["thresholds"] == list(summary.thresholds) != [0.5]
    assert total["counts"] == list(summary.histograms["total"].counts) and sum(total["counts"]) == 60
    assert [part["title"] for part in parts] == ["Semantic", "Factual", "Value"]
    assert all(part["thresholds"] == [] and len(part["edges"]) == 1 + len(part["counts"]) for part in parts)


def test_only_the_uncertainties_that_were_measured(tmp_path: Path) -> None:
    def without_value(found: dict[str, Any]) -> None:
        del found["value"]

    page = report(write_round(tmp_path / "run", "paired", change=without_value, udasa={"uncertainties": ["semantic",
                                                                                                         "factual"]}))
    assert [found["title"] for found in page.data["histograms"]] == ["Δu", "Semantic", "Factual"]


def test_nothing_of_asa_is_shown(tmp_path: Path) -> None:
    page = report(write_round(tmp_path / "run", "trained"))
    shown = page.text.partition("Config")[0]
    for word in ("perplexity", "trust", "β > 0", "ledger", "warm-up, β = 0", "Samples"):
        assert word not in shown, word
    assert page.data.keys() == {"last_step", "chapters", "marks", "step_time", "bands", "histograms"}


# --- example pairs ----------------------------------------------------------------------------------------------
def test_examples_are_the_clearest_the_most_doubtful_and_of_every_stage(tmp_path: Path) -> None:
    made = read_pairs(write_round(tmp_path / "run", "paired"))
    by_title = dict(examples(made.pairs, made.stage_by_id))
    ordered = sorted(made.pairs, key=lambda pair: pair.delta_u, reverse=True)
    assert by_title["The clearest"] == ordered[:SHOWN_PAIRS] and by_title["The most doubtful"] == ordered[-SHOWN_PAIRS:]
    assert [made.stage_by_id[pair.prompt_id] for pair in by_title["In between"]] == [1]


@pytest.mark.parametrize("count", [1, SHOWN_PAIRS, 2 * SHOWN_PAIRS - 1])
def test_of_few_pairs_none_is_shown_twice(tmp_path: Path, count: int) -> None:
    made = read_pairs(write_round(tmp_path / "run", "paired"))
    shown = [pair.prompt_id for _, pairs in examples(made.pairs[:count], made.stage_by_id) for pair in pairs]
    assert sorted(shown) == sorted(pair.prompt_id for pair in made.pairs[:count])


def test_all_parts_of_u_of_both_responses(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "paired")
    text = report(folder).text.partition("Examples")[2]
    clearest = max(read_pairs(folder).pairs, key=lambda pair: pair.delta_u)
    for side, response in (("chosen", clearest.chosen), ("rejected", clearest.rejected)):
        values = "".join(f"{response.uncertainties[name]:.3f}" for name in ("semantic", "factual", "value", "total"))
        cut_off = "" if response.finished else " (cut off)"
        assert f"{side}{response.text}{cut_off}{values}" in text


# --- what is missing, damaged or evil ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", [PAIRS, SUMMARY])
def test_damaged_pairs_are_named(tmp_path: Path, name: str) -> None:
    folder = write_round(tmp_path / "run", "trained")
    flip_a_bit(folder / name)
    page = report(folder)
    assert "Look at this first" in page.text and f"the pairs cannot be shown: {folder}: {name}" in page.text
    assert ("They cannot be read." in page.text) == (name == SUMMARY)
    assert ("The pairs themselves cannot be shown." in page.text) == (name == PAIRS)


@pytest.mark.parametrize("name", [
    PAIRS, SUMMARY, "measured.json", "responses.jsonl", "uncertainty.jsonl", "metrics.jsonl", "events.jsonl",
    "trained.jsonl",
])
def test_missing_files(tmp_path: Path, name: str) -> None:
    folder = write_round(tmp_path / "run", "trained")
    (folder / name).unlink()
    assert (f"{name}: missing" in report(folder).text) == (name == PAIRS)


@pytest.mark.parametrize("name", ["responses.jsonl", "uncertainty.jsonl"])
def test_damaged_measurements_are_named(tmp_path: Path, name: str) -> None:
    folder = write_round(tmp_path / "run", "paired")
    lines = (folder / name).read_text().splitlines()
    (folder / name).write_text("\n".join([*lines[:5], "{torn", *lines[6:]]) + "\n")
    assert f"{name}, line 6: no JSON object; what stands after it in this file is not shown" in report(folder).text


def test_lines_that_are_lost_at_the_end_are_missed(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "measured")
    lines = (folder / "uncertainty.jsonl").read_text().splitlines(keepends=True)
    (folder / "uncertainty.jsonl").write_text("".join(lines[:-3]))
    assert "64 prompts were measured, but of only 61 there is anything left in uncertainty.jsonl" in report(folder).text


@pytest.mark.parametrize("content", ["", "[]", '{"left_out": 3}', '{"left_out": {"x": "why"}}', '{"left_out": {}}',
                                     '{"left_out": {}, "prompts": "x"}'])  # fmt: skip
def test_a_damaged_end_of_measuring_is_named(tmp_path: Path, content: str) -> None:
    folder = write_round(tmp_path / "run", "measured")
    (folder / "measured.json").write_text(content)
    assert f"{folder / 'measured.json'} cannot be read" in report(folder).text


@pytest.mark.parametrize("row", ['{"prompt_id": "x", "responses": 5}', '{"responses": ["text", {"text": 3}]}', "{}",
                                 '{"prompt_id": 1, "semantic": 1, "total": [null, "x", NaN, [1]]}'])  # fmt: skip
def test_rows_that_no_run_writes(tmp_path: Path, row: str) -> None:
    folder = write_round(tmp_path / "run", "measured")
    for name in ("responses.jsonl", "uncertainty.jsonl"):
        with (folder / name).open("a") as file:
            file.write(row + "\n")
    found = read_round(read_run(folder)).measured
    assert (found.num_answered, found.num_measured) == (65, 65) and report(folder).path.is_file()


def test_a_config_with_wrong_values(tmp_path: Path) -> None:
    folder = write_round(tmp_path / "run", "trained")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("max_epochs: 3", "max_epochs: many").replace("kl_weight: 0.05",
                                                                                                  "kl_weight: x"))
    page = report(folder)
    assert "udasa.curriculum.max_epochs = 'many': Input should be a valid integer" in page.text
    assert len(stage_rows(page)) == 3 and "As a penalty" not in page.text


def test_strings_of_a_round_are_never_html(tmp_path: Path) -> None:
    harmless = {tag for tag, _ in report(write_round(tmp_path / "plain", "trained", event("estimator_notice", 2))).tags}
    notes = [event("estimator_notice", 2, notice=EVIL), event("prompts_left_out", 2, count=1, reason=EVIL)]
    folder = write_round(tmp_path / "run", "measured", *notes)
    rows = (folder / "responses.jsonl").read_text().splitlines()
    evil = [{**row, "prompt": EVIL, "responses": [{**response, "text": f"{EVIL}{n}"}
                                                  for n, response in enumerate(row["responses"])]}
            for row in map(json.loads, rows)]  # fmt: skip
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evil))
    end = json.loads((folder / "measured.json").read_text())
    (folder / "measured.json").write_text(json.dumps({**end, "left_out": {"3": EVIL}}))
    pair_round(Round(tmp_path / "run", 0), load_config(folder / "config.yaml"))
    page = report(folder)
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script"] * 3
    assert {tag for tag, _ in page.tags} <= harmless and page.text.count(EVIL) > 30


def test_numbers_for_people() -> None:
    shown = [number(value, 3) for value in (-0.0001, -0.5, 1234.5678, float("nan"))]
    assert shown == ["0.000", "-0.500", "1,234.568", "–"]
