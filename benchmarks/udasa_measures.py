"""What a model says about its world, whatever method trained it; what the uncertainties of a round knew of the truth.

How answers are asked for and judged: alignment_measures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignment_measures import NUM_SIBLINGS, Exam, answer_measures, probes_of
from world import World

from asa_dist.evaluation.probes import agreement, greedy_sampling, probe_sampling, value_said
from asa_dist.records import MeasuredPrompt
from asa_dist.runtime.measurements import MeasurementFiles
from asa_dist.runtime.pair_files import RoundPairs, read_pairs
from asa_dist.runtime.run_log import read_rows

UNCERTAINTIES = ("semantic", "factual", "value", "total")


class PlainExam(Exam):
    """An exam that asks nothing of how the model was trained."""

    def measures(self, temperature: float = 1.0) -> dict[str, Any]:
        """As ``Exam.measures``, without ``tau`` and ``corpus_tokens``, of "all" facts."""
        groups = self._sample(self._asked, probe_sampling(self._rollout, NUM_SIBLINGS, temperature))
        likeliest = self._sample(self._asked, greedy_sampling(self._rollout))
        answered = list(zip(self._asked, groups, likeliest, strict=True))
        return {
            "temperature": temperature,
            "responses": sum(len(group.responses) for group in groups),
            "entropy": self._entropy(groups, temperature),
            **self._clean_perplexity(),
            "all": answer_measures(self._world, answered, self._tokenizer),
        }


def round_measures(world: World, folder: Path) -> dict[str, Any]:
    """Of a finished round: what its uncertainties and its pairs knew of the truth, and how training went.

    Returns:
        ``auc``: by uncertainty, of all responses; ``sibling_auc``: of responses to the same prompt, which are what
        pairs compare. How often of a true and a false one the false one is the more uncertain (equal: half).
        ``stages``: in the order in which they were trained, for each ``stage`` (1 = clearest), ``pairs``, ``steps``,
        and ``right``, ``wrong``: share of its pairs of which only the chosen, only the rejected response is true.
    """
    measured = [prompt for prompt in MeasurementFiles(folder).measured()
                if all(response.u_total is not None for response in prompt.responses)]  # fmt: skip
    truth = Truth(world)
    truth_PN = np.array([[truth.of(prompt.prompt, response.text) for response in prompt.responses]
                         for prompt in measured])  # fmt: skip
    certainty = {name: -u_PN for name in UNCERTAINTIES if (u_PN := _uncertainty(measured, name)) is not None}
    return {
        "auc": {name: agreement(c_PN.view(1, -1), truth_PN.reshape(1, -1))["auc"] for name, c_PN in certainty.items()},
        "sibling_auc": {name: agreement(c_PN, truth_PN)["auc"] for name, c_PN in certainty.items()},
        "stages": _stages(folder, read_pairs(folder), truth),
    }


class Truth:
    """Whether a response to one of the world's questions is true."""

    def __init__(self, world: World):
        self._probes = {probe.prompt: probe for fact in world.facts for probe in probes_of(world, fact)}

    def of(self, question: str, response: str) -> bool:
        probe = self._probes[question]
        return value_said(probe, response) == probe.answers[0]


def _uncertainty(measured: Sequence[MeasuredPrompt], name: str) -> torch.Tensor | None:
    """Float64 [P, N]; None if it was not measured."""
    u_PN = [[response.uncertainties.get(name) for response in prompt.responses] for prompt in measured]
    return None if u_PN[0][0] is None else torch.tensor(u_PN, dtype=torch.float64)


def _stages(folder: Path, made: RoundPairs, truth: Truth) -> list[dict[str, Any]]:
    finished = [row for row in read_rows(folder / "events.jsonl") if row["event"] == "stage_finished"]
    stages = []
    for row in finished:
        true_P2 = np.array([[truth.of(pair.prompt, pair.chosen.text), truth.of(pair.prompt, pair.rejected.text)]
                            for pair in made.pairs if made.stage_by_id[pair.prompt_id] == row["stage"] - 1])
        chosen_P, rejected_P = true_P2.T
        stages.append({"stage": row["stage"], "pairs": len(true_P2), "steps": row["steps"],
                       "right": float((chosen_P & ~rejected_P).mean()),
                       "wrong": float((rejected_P & ~chosen_P).mean())})  # fmt: skip
    return stages
