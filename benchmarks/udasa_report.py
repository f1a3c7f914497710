"""What benchmarks/udasa.py found, in words and a table; a function of its JSON alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from alignment_report import ArmRuns, Criterion, Estimate, verdict

CURRICULUM, START = "curriculum", "start"
# JSON key of a measure, and how people call it
ANSWERS = {
    "truth": "truth, sampled", "greedy_truth": "greedy truth", "majority_truth": "majority of 8, truth",
    "parsable": "parsable", "distinct_values": "values per group", "distinct_phrasings": "phrasings per group",
    "response_tokens": "response length (tokens)",
}  # fmt: skip
GENERAL = {
    "entropy": "mean token entropy (nats)", "clean_perplexity": "clean perplexity, T = 1",
    "clean_answer_perplexity": "  of answers alone, T = 1", "temperature": "sampled at T =",
}  # fmt: skip
LABEL_WIDTH, CELL_WIDTH = 30, 16
LEAST_GAIN, MOST_GREEDY_LOSS = 0.10, 0.01


def report_text(result: dict[str, Any]) -> str:
    """Everything, most important first."""
    runs, arms = ArmRuns(result["runs"]), result["arms"]
    if CURRICULUM not in runs:
        return "The curriculum has not come to its end."
    parts = [_headline(result), criteria_text(runs)]
    parts += [_against(runs, arm, arms) for arm in arms if arm != CURRICULUM]
    parts += [table(runs, arms), uncertainty_text(result["runs"][CURRICULUM]), stages_text(result["runs"], arms)]
    return "\n\n".join(part for part in parts if part)


def _headline(result: dict[str, Any]) -> str:
    world = result["world"]
    text = (f"UDASA ({result['tuning']}). World: {world['entities']} entities, {world['statements']} statements for "
            f"each of {world['paraphrases']} phrasings, {world['verifications']} verifications of each fact; "
            f"{world['noise']:.0%} false; seeds {', '.join(sorted(result['runs'][CURRICULUM], key=int))}")  # fmt: skip
    return f"{text}\n{'=' * len(text)}"


def criteria(runs: ArmRuns) -> list[Criterion]:
    """Of means over the seeds that both arms have, of which there must be one."""
    runs = runs.shared(CURRICULUM, START)

    def mean(arm: str, measure: str) -> float:
        return statistics.fmean(runs.values(arm, measure))

    truth, least = mean(CURRICULUM, "truth"), mean(START, "truth") + LEAST_GAIN
    greedy, least_greedy = mean(CURRICULUM, "greedy_truth"), mean(START, "greedy_truth") - MOST_GREEDY_LOSS
    return [
        Criterion(f"truth at T = 1, at least the start's + {LEAST_GAIN}", truth, least, truth >= least),
        Criterion(f"greedy truth, at least the start's - {MOST_GREEDY_LOSS}", greedy, least_greedy,
                  greedy >= least_greedy),
    ]  # fmt: skip


def criteria_text(runs: ArmRuns) -> str:
    return "\n".join(criterion.text() for criterion in criteria(runs)) if runs.can_compare(CURRICULUM, START) else ""


def _against(runs: ArmRuns, rival: str, arms: dict[str, dict[str, Any]]) -> str:
    if not runs.can_compare(CURRICULUM, rival):
        return ""
    runs = runs.shared(CURRICULUM, rival)
    lines = [f"curriculum {verdict(runs.difference(CURRICULUM, rival, 'truth'))} {rival} ({arms[rival]['title']})"]
    for measure in ("truth", "greedy_truth", "majority_truth"):
        ours, theirs = (Estimate.of(runs.values(arm, measure)) for arm in (CURRICULUM, rival))
        difference = runs.difference(CURRICULUM, rival, measure)
        lines.append(f"    {ANSWERS[measure]:26} {ours.text():>15} vs {theirs.text():15}  difference "
                     f"{difference.text('+')}")  # fmt: skip
    return "\n".join(lines)


def table(runs: ArmRuns, arms: Sequence[str]) -> str:
    """Every measure of every arm, mean over the seeds ± its standard error."""
    keys = [arm for arm in arms if arm in runs]
    lines = [" " * LABEL_WIDTH + "".join(f"{arm:>{CELL_WIDTH}}" for arm in keys)]
    for facts, measures in (("all", ANSWERS), (None, GENERAL)):
        for measure, label in measures.items():
            cells = (Estimate.of(runs.values(arm, measure, facts)).text() for arm in keys)
            lines.append(f"{label:{LABEL_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells))
    return "\n".join(lines)


def uncertainty_text(by_seed: dict[str, Any]) -> str:
    """AUC of each uncertainty against truth, seed by seed."""
    lines = ["AUC: how often a false response is more uncertain than a true one: of all, and of the same prompt's"]
    for seed, measures in sorted(by_seed.items(), key=lambda item: int(item[0])):
        found = measures["round"]
        parts = (f"{name} {auc:.3f}, {found['sibling_auc'][name]:.3f}" for name, auc in found["auc"].items())
        lines.append(f"    seed {seed}: {'; '.join(parts)}")
    return "\n".join(lines)


def stages_text(runs: dict[str, dict[str, Any]], arms: Sequence[str]) -> str:
    """What was trained on, in which order: whether the clearest pairs are those that are right."""
    lines = ["stages as they were trained: share of pairs with only the chosen, only the rejected response true"]
    for arm in arms:
        for seed, measures in sorted(runs.get(arm, {}).items(), key=lambda item: int(item[0])):
            stages = measures.get("round", {}).get("stages", ())
            parts = (f"{stage['stage']}: {stage['right']:.2f}, {stage['wrong']:.2f} of {stage['pairs']} pairs, "
                     f"{stage['steps']} steps" for stage in stages)  # fmt: skip
            lines += [f"    {arm}, seed {seed}: {'; '.join(parts)}"] if stages else []
    return "\n".join(lines)
