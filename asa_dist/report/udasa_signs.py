"""Known bad signs of a round of UDASA."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from operator import itemgetter

import numpy as np

from asa_dist.report.curves import mean
from asa_dist.report.run_files import RunFiles
from asa_dist.report.udasa_round import RoundFiles
from asa_dist.report.udasa_stages import Stage, in_turn
from asa_dist.udasa.pairs import NO_PAIR_REASONS

MOST = 0.5  # share of the prompts
MANY = 0.1  # share of the responses
SAME = 1e-6  # range of an uncertainty that tells nothing apart
WORSE = 1.05  # held-out loss at the end, relative to the lowest
NO_BETTER = 0.5  # accuracy
ONE_SIDED = 0.85  # share of the pairs whose chosen response is the shorter, or the longer one
ENOUGH_PAIRS = 20  # to speak of shares
ENOUGH_HELDOUT = 10  # to speak of chance

Sign = Callable[[RunFiles, RoundFiles, list[Stage]], Iterator[str]]


def measuring_ended(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    found = files.measured
    if found.num_answered and not found.is_complete and run.worked_on_by is None:
        yield (
            f"Measuring has ended before it was complete: {found.num_answered:,} prompts are answered, "
            f"{found.num_measured:,} of them measured. Nothing of it is lost; go on with: "
            f"asa resume {shlex.quote(str(run.resumed_folder))}"
        )


def unknown_uncertainty(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    for name, values in files.measured.values.items():
        if name != "total" and values.num_unknown and not values.num_known:
            yield (
                f"The {name} uncertainty of all {values.num_unknown:,} responses could not be measured, so that no "
                f"response has a total: see the notices under What was skipped. Leave it out (udasa.uncertainties), or "
                f"mend udasa.{name}."
            )


def constant_uncertainty(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    for name, values in files.measured.values.items():
        if name != "total" and values.num_known > 1 and values.high - values.low <= SAME:
            yield (
                f"The {name} uncertainty is the same for all {values.num_known:,} responses, {values.mean:.4g}: it "
                f"tells none of them apart (udasa.{name})."
            )


def unmeasured_responses(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    total = files.measured.values.get("total")
    if total and total.num_known and total.num_unknown > MANY * total.num_all:
        yield (
            f"{total.num_unknown:,} of {total.num_all:,} responses have no total, as one of their uncertainties could "
            "not be measured: none of them is in a pair."
        )


def empty_responses(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    found = files.measured
    if found.num_empty > MANY * found.num_responses:
        yield f"{found.num_empty:,} of {found.num_responses:,} responses say nothing: none of them is in a pair."


def few_pairs(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    if files.summary is None:
        return
    summary = files.summary.summary
    num_without = summary.num_prompts - summary.num_pairs
    if num_without > MOST * summary.num_prompts:
        commonest, count = max(summary.num_unpaired.items(), key=itemgetter(1))
        yield (
            f"{num_without:,} of {summary.num_prompts:,} prompts gave no pair. The commonest reason: "
            f"{NO_PAIR_REASONS.get(commonest, commonest)} ({count:,})."
        )


def empty_stages(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    empty = [stage for stage in stages if not stage.num_pairs]
    if files.summary is None or not empty or len(empty) == len(stages):
        return
    edges = files.summary.summary.histograms["total"].edges
    remedy = (
        "Many pairs have the same Δu, so that no quantile divides them: fewer udasa.curriculum.thresholds."
        if files.summary.curriculum.get("threshold_kind") == "quantile"
        else "With other udasa.curriculum.thresholds, or threshold_kind=quantile, none stays empty."
    )
    names = ", ".join(f"{stage.number} ({stage.span})" for stage in empty)
    yield (
        f"{'Stage' if len(empty) == 1 else 'Stages'} {names} got no pair and {'is' if len(empty) == 1 else 'are'} "
        f"skipped: the largest Δu is {edges[-1]:.3g}. {remedy}"
    )


def one_sided_lengths(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    pairs = files.pairs or ()
    if len(pairs) < ENOUGH_PAIRS:
        return
    differences = np.array([len(pair.chosen.token_ids) - len(pair.rejected.token_ids) for pair in pairs])
    for word, share in (("shorter", float((differences < 0).mean())), ("longer", float((differences > 0).mean()))):
        if share > ONE_SIDED:
            yield (
                f"In {share:.0%} of the pairs the chosen response is the {word} one, by {abs(differences.mean()):.0f} "
                "tokens on average: this may teach length rather than certainty (udasa.dpo.length_normalized helps)."
            )


def heldout_loss_rises(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    for training in in_turn(stages):
        heldout = [loss for loss in training.heldout.get("loss", []) if math.isfinite(loss)]
        half = len(training.losses) // 2
        before, after = mean(training.losses[:half]), mean(training.losses[half:])
        if heldout and heldout[-1] > WORSE * min(heldout) and after < before:
            yield (
                f"Stage {training.report.stage} overfits: its held-out loss rose from {min(heldout):.3f} to "
                f"{heldout[-1]:.3f}, while the training loss fell from {before:.3f} to {after:.3f} (means of its "
                "halves). A smaller learning rate, fewer epochs or more prompts help."
            )


def no_better_than_chance(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> Iterator[str]:
    poor = [
        (training.report, accuracies[-1])
        for training in in_turn(stages)
        if training.has_ended and (accuracies := training.heldout.get("accuracy")) and accuracies[-1] <= NO_BETTER
    ]
    if poor:
        shown = ", ".join(f"stage {report.stage}: {share:.0%} of {report.heldout_pairs:,}" for report, share in poor)
        are_few = min(report.heldout_pairs for report, _ in poor) < ENOUGH_HELDOUT
        yield (
            "At a stage's end the model prefers the chosen response of held-out pairs no more often than a coin would: "
            f"{shown} (eval/accuracy)."
            + (" So few say little: more prompts, or a larger udasa.curriculum.heldout_fraction." if are_few else "")
        )


SIGNS: tuple[Sign, ...] = (
    measuring_ended, unknown_uncertainty, constant_uncertainty, unmeasured_responses, empty_responses, few_pairs,
    empty_stages, one_sided_lengths, heldout_loss_rises, no_better_than_chance,
)


def udasa_warnings(run: RunFiles, files: RoundFiles, stages: list[Stage]) -> list[str]:
    """Beside those of every run."""
    return [text for sign in SIGNS for text in sign(run, files, stages)]
