"""What the page of a round of UDASA shows: how far it is, its curriculum, its pairs, what was skipped and why."""

from __future__ import annotations

import math

from asa_dist.report.markup import number
from asa_dist.report.method_page import Figure, MethodPage, checkpoint_figure, training_minutes
from asa_dist.report.run_files import RunFiles
from asa_dist.report.signs import WINDOW
from asa_dist.report.udasa_charts import histograms, udasa_chapters
from asa_dist.report.udasa_examples import pairs_section
from asa_dist.report.udasa_round import RoundFiles, read_round
from asa_dist.report.udasa_signs import udasa_warnings
from asa_dist.report.udasa_stages import Stage, bands, in_turn, read_stages
from asa_dist.report.udasa_tables import curriculum_section, measured_section, skipped_section


def udasa_page(run: RunFiles) -> MethodPage:
    files = read_round(run)
    stages = read_stages(run, files)
    found = bands(stages)
    return MethodPage(
        state=_state(run, files),
        progress=_progress(run, files),
        figures=_figures(run, files, stages),
        warnings=udasa_warnings(run, files, stages),
        chapters=udasa_chapters(run, found),
        before_curves=curriculum_section(run, stages),
        after_curves=pairs_section(files) + measured_section(files) + skipped_section(run, files),
        shading="Bands: the stages, numbered at their top; eval/…: their held-out pairs.",
        data={"bands": found, "histograms": histograms(files)},
    )


def _state(run: RunFiles, files: RoundFiles) -> str:
    """Of the run folder, once the trainer or anybody works on it; else how far it has come before."""
    if run.state != "not started":
        return run.state
    if files.is_paired:
        return "paired"
    if files.measured.is_complete:
        return "measured"
    return "interrupted" if files.measured.num_answered else "not started"


def _progress(run: RunFiles, files: RoundFiles) -> str:
    num_steps = run.inspection.num_steps if run.inspection else None
    if files.summary is None or num_steps is None:
        return ""
    return f"step {run.last_step:,} of {num_steps:,}"


def _figures(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> list[Figure]:
    found = [_measured(files), _pairs(files), _under_way(run, files, stages)]
    if not run.curves:
        return found
    speed, tokens = run.curve("perf/tokens_per_second").tail_mean(WINDOW), run.curve("tokens/rollout").last()
    return [
        *found,
        *_heldout(run, stages),
        Figure(f"tokens per second, last {WINDOW} steps", number(speed, 0),
               f"{number(tokens, 0)} response tokens in {training_minutes(run)}"),
        checkpoint_figure(run),
    ]  # fmt: skip


def _measured(files: RoundFiles) -> Figure:
    found = files.measured
    total = found.values.get("total")
    num_unknown = total.num_unknown if total else 0
    more = f"{found.num_responses:,} responses: {found.num_empty:,} empty, {num_unknown:,} unmeasured"
    if not found.is_complete:
        more = f"{found.num_answered:,} answered so far; {more}"
    return Figure("prompts measured", f"{found.num_measured:,}", more)


def _pairs(files: RoundFiles) -> Figure:
    if files.summary is None:
        return Figure("pairs", "–", "cannot be read" if files.is_paired else "none made yet", files.is_paired)
    summary = files.summary.summary
    num_without = summary.num_prompts - summary.num_pairs
    more = f"of {summary.num_prompts:,} prompts; {num_without:,} gave none"
    return Figure("pairs", f"{summary.num_pairs:,}", more, summary.num_pairs == 0)


def _under_way(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Figure:
    """Of measure, pairs, and the stages of the curriculum."""
    trained = in_turn(stages)
    if files.is_trained or (trained and trained[-1].has_ended):
        more = "the trained model is in result/" if files.is_trained else "the result has not been written yet"
        return Figure("stage", "all done", more)
    for report in (training.report for training in trained if training.is_under_way):
        more = f"{stages[report.stage - 1].span}; step {report.steps:,} of {report.planned_steps:,}"
        return Figure("stage", f"{report.stage} of {len(stages)}", more)
    if files.is_paired:
        return Figure("stage", "training", "has begun, but the pairs cannot be read" if run.curves else "not begun yet")
    return Figure("stage", "pairs" if files.measured.is_complete else "measure", "before the curriculum")


def _heldout(run: RunFiles, stages: list[Stage]) -> list[Figure]:
    """The newest evaluation."""
    loss, margin, accuracy = (run.curve(f"eval/{name}").last() for name in ("loss", "margin", "accuracy"))
    if math.isnan(loss):
        return [Figure(f"held-out {name}", "–", "no held-out pairs evaluated") for name in ("loss", "accuracy")]
    step = run.curve("eval/loss").steps[-1]
    in_training = run.curve("udasa/loss").tail_mean(WINDOW)
    of_stage = next((f"stage {band['text']}, " for band in bands(stages) if band["from"] < step <= band["to"]), "")
    return [
        Figure("held-out loss", number(loss, 3), f"{of_stage}step {step:,}; in training {number(in_training, 3)}"),
        Figure("held-out accuracy", number(accuracy), f"margin {number(margin, 3)}", accuracy <= 0.5),
    ]
