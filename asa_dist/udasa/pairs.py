"""Preference pairs (stage 2 of UDASA): at most one per prompt, how clear each is, and the curriculum stage it is for.

    y⁺ = argmin_i u_total(i)        y⁻ = a random one of the others with larger u_total
    (7)  Δu = u_total(y⁻) − u_total(y⁺)

Differences within ``TIE_TOLERANCE`` are none: estimates of equal responses differ in their last bits. What could not be
measured, and what is empty, is part of no pair: there is nothing to compare, or to prefer.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from asa_dist.records import MeasuredPrompt, PreferencePair

TIE_TOLERANCE = 1e-6  # of uncertainties; the report reads this file, so it imports no torch
NUM_BINS = 20
BAR_CHARACTERS = 40
NO_PAIR_REASONS = {
    "unmeasured": "fewer than two responses could be measured",
    "empty": "of those measured, fewer than two say anything",
    "equal": "all responses say the same",
    "tie": "no other response is more uncertain than the least uncertain one",
}


# --- making pairs -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairSet:
    """What became of every prompt, by ascending prompt id."""

    pairs: tuple[PreferencePair, ...]
    unpaired: dict[int, str]  # prompt id → key of NO_PAIR_REASONS


def make_pairs(prompts: Iterable[MeasuredPrompt]) -> PairSet:
    """One pair per prompt, or the reason why there is none; the same in whatever order the prompts come.

    Raises:
        ValueError: a prompt id that comes twice.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.prompt_id)
    times = Counter(prompt.prompt_id for prompt in ordered)
    if repeated := [prompt_id for prompt_id, count in times.items() if count > 1]:
        raise ValueError(f"measured more than once: prompt ids {repeated[:10]}, {len(repeated)} in all")
    pairs, unpaired = [], {}
    for prompt in ordered:
        made = make_pair(prompt)
        if isinstance(made, PreferencePair):
            pairs.append(made)
        else:
            unpaired[prompt.prompt_id] = made
    return PairSet(tuple(pairs), unpaired)


def make_pair(prompt: MeasuredPrompt) -> PreferencePair | str:
    """The prompt's pair, or a key of ``NO_PAIR_REASONS``.

    Of equally certain responses the first is y⁺. Another one with the same text is never its y⁻.
    """
    responses = prompt.responses
    total = {index: response.u_total for index, response in enumerate(responses) if response.u_total is not None}
    if len(total) < 2:
        return "unmeasured"
    total = {index: u_total for index, u_total in total.items() if responses[index].text.strip()}
    if len(total) < 2:
        return "empty"
    least = min(total.values())
    chosen = next(index for index, u_total in total.items() if u_total - least <= TIE_TOLERANCE)
    others = [index for index in total if responses[index].text != responses[chosen].text]
    if not others:
        return "equal"
    worse = [index for index in others if total[index] - total[chosen] > TIE_TOLERANCE]
    if not worse:
        return "tie"
    rejected = worse[_draw(len(worse), prompt.seed, prompt.prompt_id)]
    return PreferencePair(
        prompt_id=prompt.prompt_id,
        prompt=prompt.prompt,
        prompt_token_ids=prompt.token_ids,
        chosen=responses[chosen],
        rejected=responses[rejected],
        chosen_index=chosen,
        rejected_index=rejected,
        delta_u=total[rejected] - total[chosen],
        policy_version=prompt.policy_version,
        seed=prompt.seed,
    )


def _draw(num_choices: int, seed: int, prompt_id: int) -> int:
    """One of 0 … num_choices − 1: a function of run seed and prompt alone."""
    digest = hashlib.blake2b(f"rejected response {seed} {prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_choices


# --- stages of the curriculum -----------------------------------------------------------------------------------
def stage_thresholds(
    delta_P: np.ndarray, thresholds: Sequence[float], kind: Literal["absolute", "quantile"]
) -> np.ndarray:
    """The thresholds τ as values of Δu, float64 [E].

    Args:
        delta_P: Δu of all pairs, float64.
        thresholds: of Δu itself, or quantiles of ``delta_P`` (between two pairs interpolated linearly).

    Raises:
        ValueError: quantiles of no pairs.
    """
    if kind == "absolute":
        return np.asarray(thresholds, np.float64)
    if len(delta_P) == 0:
        raise ValueError("there are no pairs, so their Δu has no quantiles: nothing can be divided into stages")
    return np.quantile(delta_P, np.asarray(thresholds, np.float64))


def assign_stages(delta_P: np.ndarray, threshold_E: np.ndarray) -> np.ndarray:
    """Stage of each pair, int64 [P]: 0 holds the clearest pairs, E the most doubtful ones.

    Pairs with Δu = τ belong to the more doubtful side, so equal pairs share a stage, and quantiles of many equal Δu
    can leave a stage empty.
    """
    return (delta_P[:, None] <= threshold_E + TIE_TOLERANCE).sum(1)


# --- summary ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Histogram:
    """How many values lie in each bin."""

    edges: tuple[float, ...]  # one more than counts; each bin holds its lower edge, the last one its upper edge too
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PairSummary:
    """What the log and the report say about a round's pairs."""

    num_prompts: int
    num_unpaired: dict[str, int]  # prompts without a pair, for every key of NO_PAIR_REASONS
    thresholds: tuple[float, ...]  # τ, values of Δu
    stage_pairs: tuple[int, ...]  # pairs of each stage, clearest first
    histograms: dict[str, Histogram]  # of the difference within a pair: total (Δu), and each uncertainty measured

    @property
    def num_pairs(self) -> int:
        return sum(self.stage_pairs)


def differences(pairs: Sequence[PreferencePair]) -> dict[str, np.ndarray]:
    """Rejected minus chosen: Δu under ``total``, then each uncertainty alone, float64 over the pairs that have it.

    A single uncertainty can well be smaller for the rejected response: only the total is not.
    """
    values: dict[str, list[float]] = {"total": []}
    for pair in pairs:
        chosen, rejected = pair.chosen.uncertainties, pair.rejected.uncertainties
        for name in chosen.keys() & rejected.keys():
            values.setdefault(name, []).append(rejected[name] - chosen[name])
    return {name: np.array(values[name]) for name in ("total", "semantic", "factual", "value") if name in values}


def histogram(value_P: np.ndarray) -> Histogram:
    """``NUM_BINS`` equal bins over zero and all values."""
    limits = (min(0.0, value_P.min()), max(0.0, value_P.max())) if len(value_P) else (0.0, 1.0)
    count_B, edge_B1 = np.histogram(value_P, NUM_BINS, limits)
    return Histogram(tuple(edge_B1.tolist()), tuple(count_B.tolist()))


def summarize_pairs(made: PairSet, threshold_E: np.ndarray) -> PairSummary:
    """
    Args:
        threshold_E: of :func:`stage_thresholds`.
    """
    difference = differences(made.pairs)
    stage_P = assign_stages(difference["total"], threshold_E)
    reasons = Counter(made.unpaired.values())
    return PairSummary(
        num_prompts=len(made.pairs) + len(made.unpaired),
        num_unpaired={reason: reasons[reason] for reason in NO_PAIR_REASONS},
        thresholds=tuple(threshold_E.tolist()),
        stage_pairs=tuple(np.bincount(stage_P, minlength=len(threshold_E) + 1).tolist()),
        histograms={name: histogram(value_P) for name, value_P in difference.items()},
    )


def stage_ranges(thresholds: Sequence[float]) -> list[str]:
    """Which Δu each stage takes, in words, clearest first."""
    if not thresholds:
        return ["every Δu"]
    shown = [f"{threshold:.4g}" for threshold in reversed(thresholds)]
    middle = [f"{low} < Δu ≤ {high}" for high, low in pairwise(shown)]
    return [f"Δu > {shown[0]}", *middle, f"Δu ≤ {shown[-1]}"]


def describe_pairs(summary: PairSummary) -> str:
    """The summary as lines of text: counts, reasons, stages, and the histogram of Δu."""
    lines = [f"{summary.num_pairs} of {summary.num_prompts} prompts gave a pair"]
    for reason, count in summary.num_unpaired.items():
        if count:
            lines.append(f"  {count} without: {NO_PAIR_REASONS[reason]}")
    stages = zip(stage_ranges(summary.thresholds), summary.stage_pairs, strict=True)
    for number, (span, count) in enumerate(stages, start=1):
        share = f"{count} of {summary.num_pairs} pairs" if count else "no pairs, so it is skipped"
        lines.append(f"  stage {number}, {span}: {share}")
    return "\n".join([*lines, *_bars(summary.histograms["total"])])


def _bars(histogram: Histogram) -> Iterable[str]:
    largest = max(*histogram.counts, 1)
    for (low, high), count in zip(pairwise(histogram.edges), histogram.counts, strict=True):
        yield f"  Δu {low:6.3f} to {high:6.3f} {count:6d} {'█' * math.ceil(count / largest * BAR_CHARACTERS)}"
