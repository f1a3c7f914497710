"""What a comparison of arms came to, in words and a table; a function of its JSON alone.

    against sharpening   (b) with (d), (e), (f), (g), whatever comes of it: does it learn truth, or only certainty?
    against MLE only     (b) with (a): what (a)'s majority knows untrained, and four criteria, met or not
    table                every measure of every arm, mean over the seeds ± its standard error

A difference is called one if it is significant at 5 %: seeds are paired, Student's t with as many degrees of freedom as
there are seeds, less one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

OURS, MLE = "b", "a"
RIVALS = ("d", "e", "f", "g")
SIGNIFICANCE = 0.05  # two-sided

# JSON key of a measure, and how people call it
GENERAL = {
    "entropy": "mean token entropy (nats)", "clean_perplexity": "clean perplexity, T = 1",
    "clean_answer_perplexity": "  of answers alone, T = 1", "tau": "mean τ, last 50 steps",
    "temperature": "sampled at T =",
}  # fmt: skip
ANSWERS = {
    "truth": "truth, sampled", "greedy_truth": "greedy truth", "majority_truth": "majority of 8, truth",
    "majority_across_truth": "  across phrasings", "told": "told by the corpus",
    "parsable": "parsable", "distinct_values": "values per group", "distinct_phrasings": "phrasings per group",
    "response_tokens": "response length (tokens)",
}  # fmt: skip
ABOUT_LIES = {
    "truth": "truth, sampled", "greedy_truth": "greedy truth", "told": "the lie, sampled",
    "greedy_told": "the lie, greedy (locked in)", "majority_truth": "majority of 8, truth",
}  # fmt: skip
ABOUT_OTHERS = {name: ANSWERS[name] for name in ("truth", "greedy_truth", "majority_truth")}
LABEL_WIDTH, CELL_WIDTH = 30, 16


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds; its standard error, None if there is one seed only."""

    mean: float
    error: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    @property
    def is_significant(self) -> bool:
        """Whether it differs from 0 beyond what so few seeds scatter by. There must be two of them."""
        quantile = stats.t.ppf(1 - SIGNIFICANCE / 2, self.num_seeds - 1)
        return bool(abs(self.mean) > quantile * self.error)

    def text(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


class ArmRuns:
    """The runs of one world, by arm and seed.

    Args:
        runs: {arm: {seed: ``alignment_measures.Exam.measures``}}.
    """

    def __init__(self, runs: dict[str, dict[str, dict[str, Any]]]):
        self._runs = {arm: of_seed for arm, of_seed in runs.items() if of_seed}

    def __contains__(self, arm: str) -> bool:
        return arm in self._runs

    def shared(self, left: str, right: str) -> ArmRuns:
        """These two arms, over the seeds that both have."""
        both = self._runs.get(left, {}).keys() & self._runs.get(right, {}).keys()
        return ArmRuns({arm: {seed: row for seed, row in self._runs[arm].items() if seed in both}
                        for arm in (left, right) if both})  # fmt: skip

    def values(self, arm: str, measure: str, facts: str | None = "all") -> list[float]:
        """One for each seed; none if there is no such measure.

        Args:
            facts: "all", "lies", "others"; None: what is not measured by facts.
        """
        found = self.by_seed(arm, measure, facts).values()
        return [value for value in found if value is not None]

    def by_seed(self, arm: str, measure: str, facts: str | None = "all") -> dict[str, Any]:
        rows = self._runs.get(arm, {})
        return {seed: (row if facts is None else row.get(facts, {})).get(measure) for seed, row in rows.items()}

    def estimate(self, arm: str, measure: str, facts: str | None = "all") -> Estimate | None:
        values = self.values(arm, measure, facts)
        return Estimate.of(values) if values else None

    def difference(
        self, left: str, right: str, measure: str, facts: str = "all", right_measure: str | None = None
    ) -> Estimate:
        """left − right, over the seeds that both have, of which there must be one."""
        ours = self.by_seed(left, measure, facts)
        theirs = self.by_seed(right, right_measure or measure, facts)
        return Estimate.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def can_compare(self, left: str, right: str) -> bool:
        return bool(self._runs.get(left, {}).keys() & self._runs.get(right, {}).keys())


def report_text(result: dict[str, Any]) -> str:
    """Everything, most important first: the comparisons of all worlds, then their tables."""
    if not result["worlds"]:
        return "No run has come to its end."
    parts = [f"ASA against what only sharpens ({result['tuning']})"]
    for world in result["worlds"]:
        runs = ArmRuns(world["runs"])
        parts += [_headline(world["world"], world["runs"]), against_sharpening(runs, result["arms"])]
        parts += [against_consensus(runs)]
        if not world["world"]["false_majority"]:
            parts.append(against_mle(runs))
    for world in result["worlds"]:
        runs = ArmRuns(world["runs"])
        parts += [_headline(world["world"], world["runs"]), table(runs, result["arms"]), corpus_tokens(world["runs"])]
    parts.append(settings_text(result["differs_from_defaults"]))
    return "\n\n".join(part for part in parts if part)


def _headline(world: dict[str, Any], runs: dict[str, Any]) -> str:
    seeds = ", ".join(sorted({seed for of_seed in runs.values() for seed in of_seed}, key=int))
    lies = f"{world['false_majority']:.0%} of the facts have a false majority" if world["false_majority"] else (
        "no fact has a false majority")
    text = (f"World: {world['entities']} entities, {world['paraphrases']} phrasings, {world['statements']} statements "
            f"for each; {world['noise']:.0%} false; {lies}; seeds {seeds}")
    return f"{text}\n{'=' * len(text)}"


# --- (b) with what only sharpens ------------------------------------------------------------------------------------
def against_sharpening(runs: ArmRuns, arms: dict[str, dict[str, Any]]) -> str:
    rivals = [rival for rival in RIVALS if runs.can_compare(OURS, rival)]
    return "\n\n".join(_against(runs.shared(OURS, rival), rival, arms[rival]["title"]) for rival in rivals)


def against_consensus(runs: ArmRuns) -> str:
    """With what needs no training beyond MLE: asking (a) in every phrasing, and taking what it says most often."""
    if not runs.can_compare(OURS, MLE):
        return ""
    runs = runs.shared(OURS, MLE)
    difference = runs.difference(OURS, MLE, "greedy_truth", right_measure="majority_across_truth")
    ours = Estimate.of(runs.values(OURS, "greedy_truth"))
    theirs = Estimate.of(runs.values(MLE, "majority_across_truth"))
    return (f"({OURS}) asked once, greedily, {verdict(difference)} the untrained consensus: ({MLE})'s majority over"
            " all its sampled answers to all phrasings\n"
            "    (the same knowledge of which phrasings ask the same, no training)\n"
            f"    {'truth':26} {ours.text():>15} vs {theirs.text():15}  difference {difference.text('+')}")


def _against(runs: ArmRuns, rival: str, title: str) -> str:
    ours, theirs = (runs.estimate(arm, "entropy", None) for arm in (OURS, rival))
    temperature = runs.estimate(rival, "temperature", None)
    at = f"T = {temperature.mean:.3f}" if temperature and temperature.mean != 1 else "T = 1"
    entropies = f"entropy {ours.mean:.3f} and {theirs.mean:.3f} nats per token" if ours and theirs else ""
    difference = runs.difference(OURS, rival, "truth")
    lines = [f"({OURS}) {verdict(difference)} ({rival}) {title}, sampled at {at}: {entropies}"]
    for measure in ("truth", "greedy_truth", "majority_truth"):
        lines.append(_difference_line(runs, rival, measure, "all", ANSWERS[measure]))
    if runs.values(OURS, "truth", "lies"):
        lines.append(_difference_line(runs, rival, "truth", "lies", "lied-about facts: truth"))
        lines.append(_difference_line(runs, rival, "greedy_told", "lies", "lied-about: locked in"))
    return "\n".join(lines)


def _difference_line(runs: ArmRuns, rival: str, measure: str, facts: str, label: str) -> str:
    ours, theirs = (Estimate.of(runs.values(arm, measure, facts)) for arm in (OURS, rival))
    difference = runs.difference(OURS, rival, measure, facts)
    return f"    {label:26} {ours.text():>15} vs {theirs.text():15}  difference {difference.text('+')}"


def verdict(difference: Estimate) -> str:
    """In words, of ours minus theirs."""
    if difference.error is None:
        return "has more truth (one seed: no error known) than" if difference.mean > 0 else (
            "has no more truth (one seed: no error known) than")
    if not difference.is_significant:
        return "cannot be told from"
    return "beats" if difference.mean > 0 else "loses to"


# --- (b) with MLE only ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Criterion:
    label: str
    figure: float
    bound: float
    is_met: bool

    def text(self) -> str:
        return f"    {'met    ' if self.is_met else 'NOT MET'}  {self.label}: {self.figure:.3f}, bound {self.bound:.3f}"


def criteria(runs: ArmRuns) -> list[Criterion]:
    """Of means over the seeds that both arms have, of which there must be one."""
    runs = runs.shared(OURS, MLE)

    def mean(arm: str, measure: str, facts: str | None = "all") -> float:
        return statistics.fmean(runs.values(arm, measure, facts))

    truth, greedy = mean(OURS, "truth"), mean(OURS, "greedy_truth")
    phrasings = mean(OURS, "distinct_phrasings"), 0.5 * mean(MLE, "distinct_phrasings")
    perplexity = mean(OURS, "clean_perplexity", None), 1.05 * mean(MLE, "clean_perplexity", None)
    least, least_greedy = mean(MLE, "truth") + 0.15, mean(MLE, "greedy_truth") - 0.01
    return [
        Criterion("truth at T = 1, at least (a) + 0.15", truth, least, truth >= least),
        Criterion("greedy truth, at least (a) - 0.01", greedy, least_greedy, greedy >= least_greedy),
        Criterion("phrasings per group, at least half of (a)'s", *phrasings, phrasings[0] >= phrasings[1]),
        Criterion("clean perplexity, at most 1.05 times (a)'s", *perplexity, perplexity[0] <= perplexity[1]),
    ]


def against_mle(runs: ArmRuns) -> str:
    if not runs.can_compare(OURS, MLE):
        return ""
    found = criteria(runs)
    head = f"({OURS}) against ({MLE}) MLE only: {sum(criterion.is_met for criterion in found)} of {len(found)} met"
    return "\n".join([head, *(criterion.text() for criterion in found)])


# --- table ----------------------------------------------------------------------------------------------------------
def table(runs: ArmRuns, arms: dict[str, dict[str, Any]]) -> str:
    keys = [arm for arm in arms if arm in runs]
    lines = [*(f"({arm}) {arms[arm]['title']}" for arm in keys), ""]
    lines.append(" " * LABEL_WIDTH + "".join(f"{f'({arm})':>{CELL_WIDTH}}" for arm in keys))
    for facts, measures in (("all", ANSWERS), (None, GENERAL), ("lies", ABOUT_LIES), ("others", ABOUT_OTHERS)):
        rows = [_row(runs, keys, measure, facts, label) for measure, label in measures.items()]
        if facts in ("lies", "others") and any(rows):
            lines.append({"lies": "facts with a false majority", "others": "the other facts"}[facts])
        lines += [row for row in rows if row]
    return "\n".join(lines)


def _row(runs: ArmRuns, arms: Sequence[str], measure: str, facts: str | None, label: str) -> str:
    """Empty if no arm has it."""
    estimates = [runs.estimate(arm, measure, facts) for arm in arms]
    cells = "".join(f"{estimate.text() if estimate else '-':>{CELL_WIDTH}}" for estimate in estimates)
    return f"{label:{LABEL_WIDTH}}{cells}" if any(estimates) else ""


def corpus_tokens(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Whether the arms can be compared at all: a seed's runs must have trained on the same amount of text."""
    by_seed: dict[str, dict[str, int]] = {}
    for arm, of_seed in runs.items():
        for seed, measures in of_seed.items():
            by_seed.setdefault(seed, {})[arm] = round(measures["corpus_tokens"])
    lines = [f"equal corpus tokens: {'yes' if all(len({*of.values()}) == 1 for of in by_seed.values()) else 'NO'}"]
    for seed, of_arm in sorted(by_seed.items(), key=lambda item: int(item[0])):
        amounts = {*of_arm.values()}
        text = f"{amounts.pop():,}" if len(amounts) == 1 else ", ".join(f"({a}) {n:,}" for a, n in of_arm.items())
        lines.append(f"    seed {seed}: {text}")
    return "\n".join(lines)


def settings_text(differing: dict[str, dict[str, Any]]) -> str:
    lines = [f"    {key}: {setting['here']} (default: {setting['default']})" for key, setting in differing.items()]
    return "\n".join([f"({OURS})'s method differs from the defaults in", *lines]) if lines else (
        f"({OURS})'s method is that of the defaults")
