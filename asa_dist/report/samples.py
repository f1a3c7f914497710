"""Sampled responses with their reward terms: some of them as a table, all of them as means against the steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from asa_dist.report.curves import Curve, finite_number, is_number, mean, rounded, step_of, thin
from asa_dist.report.markup import cut

MAX_RESPONSES = 2000  # in the table
MAX_CHARACTERS = 4000  # of a prompt or response
MIN_RECURRENCES = 3  # steps at which a prompt must have been sampled to have curves of its own
MAX_RECURRING = 20  # prompts with curves of their own, those sampled most often
NO_TERMS = {"text", "finished", "version", "prompt"}  # of a response
FIRST_TERMS = (
    "used", "advantage", "self", "intrinsic", "logic", "fact", "behav", "self_consistency", "coherence", "quality",
    "certainty", "fact_score", "uncertainty",
)  # the order of the table; other terms follow
ALL_PROMPTS = "mean of all sampled groups"

Row = Mapping[str, Any]  # of samples.jsonl
Rows = Callable[[], Iterable[Row]]  # reads the file anew


@dataclass(frozen=True)
class Survey:
    """What a first look at the file finds."""

    responses_at: list[tuple[int, int]]  # (step, number of responses) of every group, in order
    terms: list[str]
    recurring: dict[str, int]  # prompt -> at how many steps it was sampled


def read_samples(rows: Rows) -> dict[str, Any]:
    """Everything the page shows of samples.jsonl; reads it twice, and holds only what is shown.

    Returns:
        terms; groups: {step, prompt_id, prompt, tau, responses: [{text, finished, version, prompt?, values by term}]};
        num_groups in the file; trends: {prompt, times, series by term}.
    """
    survey = _survey(_sound(rows()))
    shown = _shown(survey.responses_at)
    trends: dict[str, dict[str, Curve]] = {ALL_PROMPTS: {}, **{prompt: {} for prompt in survey.recurring}}
    groups = []
    for place, row in enumerate(_sound(rows())):
        for prompt in {ALL_PROMPTS, row["prompt"]} & trends.keys():
            _collect(trends[prompt], row, survey.terms)
        if place in shown:
            groups.append(_group(row, survey.terms))
    return {
        "terms": survey.terms,
        "groups": groups,
        "num_groups": len(survey.responses_at),
        "trends": [
            {"prompt": prompt, "times": survey.recurring.get(prompt, len(survey.responses_at)),
             "series": [{"name": term, **thin(_by_step(curves[term]))} for term in survey.terms if term in curves]}
            for prompt, curves in trends.items()
        ],
    }


def _sound(rows: Iterable[Row]) -> Iterator[Row]:
    """Rows with what every row has."""
    for row in rows:
        step, responses = step_of(row), row.get("responses")
        is_group = isinstance(responses, list) and all(isinstance(response, dict) for response in responses)
        if is_group and step is not None and isinstance(row.get("prompt"), str):
            yield {**row, "step": step}


def _survey(rows: Iterable[Row]) -> Survey:
    responses_at: list[tuple[int, int]] = []
    terms: dict[str, None] = {}
    times: Counter[str] = Counter()
    for row in rows:
        responses_at.append((row["step"], len(row["responses"])))
        times[row["prompt"]] += 1
        for response in row["responses"]:
            terms |= dict.fromkeys(
                name for name, value in response.items() if name not in NO_TERMS and (value is None or is_number(value))
            )
    known = [term for term in FIRST_TERMS if term in terms]
    recurring = {prompt: count for prompt, count in times.most_common(MAX_RECURRING) if count >= MIN_RECURRENCES}
    return Survey(responses_at, known + [term for term in terms if term not in FIRST_TERMS], recurring)


def _shown(responses_at: list[tuple[int, int]]) -> set[int]:
    """Places of the groups in the table: all, or spread evenly over the file, the first and the last among them."""
    largest = max((count for _, count in responses_at), default=1)
    wanted = max(2, MAX_RESPONSES // max(1, largest))
    if len(responses_at) <= wanted:
        return set(range(len(responses_at)))
    return {round(i * (len(responses_at) - 1) / (wanted - 1)) for i in range(wanted)}


def _collect(curves: dict[str, Curve], row: Row, terms: list[str]) -> None:
    """Adds the mean over the group's responses."""
    for term in terms:
        if values := [finite_number(response[term]) for response in row["responses"] if term in response]:
            curves.setdefault(term, Curve()).add(row["step"], mean(values))


def _by_step(curve: Curve) -> Curve:
    """The mean over the groups of every step."""
    result = Curve()
    for step, points in itertools.groupby(zip(curve.steps, curve.values, strict=True), key=itemgetter(0)):
        result.add(step, mean(value for _, value in points))
    return result


def _group(row: Row, terms: list[str]) -> dict[str, Any]:
    return {
        "step": row["step"],
        "prompt_id": step_of(row, "prompt_id"),
        "tau": rounded([finite_number(row.get("tau"))])[0],
        "prompt": cut(row["prompt"], MAX_CHARACTERS),
        "responses": [
            {
                "text": cut(str(response.get("text", "")), MAX_CHARACTERS),
                "finished": bool(response.get("finished")),
                "version": step_of(response, "version"),
                **({"prompt": cut(str(response["prompt"]), MAX_CHARACTERS)} if "prompt" in response else {}),
                "values": rounded(finite_number(response.get(term)) for term in terms),
            }
            for response in row["responses"]
        ],
    }
