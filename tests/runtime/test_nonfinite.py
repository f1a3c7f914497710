"""What is said about values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from asa_dist.asa.objective import FusedOutput
from asa_dist.runtime.nonfinite import NonfiniteValues, count_nonfinite, find_nonfinite, skip_reason
from tests.distributed import tiny

BATCH = tiny.micro_batches(1, 0, 1)[0]  # prompts 100 … 103


def output(logic: float = 0.0, **losses: float) -> FusedOutput:
    """Rewards of 4 groups of 3; ``logic`` is that of the second group's last response."""
    terms = {name: torch.zeros(4, 3) for name in ("logic", "fact")}
    terms["logic"][1, 2] = logic
    sums = {f"loss/{name}": torch.tensor(losses.get(name, 1.0)) for name in ("total", "mle", "meta")}
    sums["rollout/mismatch_kl"] = torch.tensor(math.inf)  # is no loss
    return FusedOutput(sums["loss/total"], sums, {}, terms)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_names_its_prompt(value: float) -> None:
    assert count_nonfinite(output(value)) == 1
    assert find_nonfinite([BATCH], [output(value)]) == NonfiniteValues((), ("logic",), (101,))


def test_a_loss_concerns_the_prompts_of_its_micro_batch() -> None:
    spoilt = output(meta=math.nan, total=math.nan)
    assert count_nonfinite(spoilt) == 2
    first, second = tiny.micro_batches(1, 0, 2)
    wanted = NonfiniteValues(("loss/total", "loss/meta"), (), (102, 103))
    halves = [
        part._replace(terms={name: value_PG[:2] for name, value_PG in part.terms.items()})
        for part in (output(), spoilt)
    ]
    assert find_nonfinite([first, second], halves) == wanted


def test_the_corpus_loss_has_no_prompts() -> None:
    wanted = NonfiniteValues(("loss/total", "loss/mle"), (), ())
    assert find_nonfinite([BATCH], [output(mle=math.inf, total=math.inf)]) == wanted


def test_finite_values_are_not_found() -> None:
    assert count_nonfinite(output()) == 0
    assert find_nonfinite([BATCH], [output()]) == NonfiniteValues((), (), ())


def test_one_sentence_for_all_ranks() -> None:
    found = [
        NonfiniteValues((), (), ()),
        NonfiniteValues(("loss/total",), ("fact",), (9, 7)),
        NonfiniteValues(("loss/total",), ("fact", "self"), (8,)),
    ]
    reason, prompt_ids = skip_reason(found, {"psi": 1.0, "phi": math.inf, "xi": math.nan})
    assert reason == (
        "not finite: loss/total; reward terms fact, self; gradients of phi, xi; on rank 1, 2; prompts 7, 8, 9"
    )
    assert prompt_ids == [7, 8, 9]


def test_a_long_list_of_prompts_is_cut_in_the_sentence_alone() -> None:
    reason, prompt_ids = skip_reason([NonfiniteValues((), ("self",), tuple(range(20)))], {"psi": 1.0})
    assert reason.endswith("12, 13, 14, 15 and 4 more") and prompt_ids == list(range(20))
