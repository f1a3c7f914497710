"""Pairs: who is chosen and rejected, which prompts give none and why, stages at their edges, what the log says."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from asa_dist.records import MeasuredPrompt, MeasuredResponse, PreferencePair
from asa_dist.udasa.pairs import (
    NO_PAIR_REASONS,
    NUM_BINS,
    TIE_TOLERANCE,
    assign_stages,
    describe_pairs,
    differences,
    histogram,
    make_pair,
    make_pairs,
    stage_ranges,
    stage_thresholds,
    summarize_pairs,
)


def measured(u_total: float | None, text: str, **parts: float) -> MeasuredResponse:
    named = {"u_semantic": None, "u_factual": None, "u_value": None} | parts
    return MeasuredResponse(
        text=text, token_ids=np.arange(len(text), dtype=np.int32), finished=True, u_total=u_total, **named
    )


def prompt_of(
    totals: Sequence[float | None], texts: Sequence[str] | None = None, prompt_id: int = 0, seed: int = 3
) -> MeasuredPrompt:
    """Responses a, b, c, … where ``texts`` says nothing else."""
    texts = texts or [chr(ord("a") + n) for n in range(len(totals))]
    responses = tuple(measured(u_total, text) for u_total, text in zip(totals, texts, strict=True))
    return MeasuredPrompt(prompt_id, f"question {prompt_id}", np.array([7, prompt_id], np.int32), 40, seed, responses)


def random_prompts(num_prompts: int, seed: int = 3) -> list[MeasuredPrompt]:
    rng = np.random.default_rng(8)
    return [prompt_of(rng.random(5).tolist(), prompt_id=3 * p, seed=seed) for p in range(num_prompts)]


def choices(prompts: Sequence[MeasuredPrompt]) -> list[tuple[int, int, int]]:
    return [(pair.prompt_id, pair.chosen_index, pair.rejected_index) for pair in make_pairs(prompts).pairs]


def paired(prompt: MeasuredPrompt) -> PreferencePair:
    pair = make_pair(prompt)
    assert isinstance(pair, PreferencePair)
    return pair


# --- one prompt -----------------------------------------------------------------------------------------------------
def test_the_least_uncertain_response_is_chosen_and_a_worse_one_rejected() -> None:
    for prompt in random_prompts(50):
        pair = paired(prompt)
        totals = [response.u_total for response in prompt.responses]
        assert totals[pair.chosen_index] == min(totals)
        assert pair.chosen is prompt.responses[pair.chosen_index]
        assert pair.rejected is prompt.responses[pair.rejected_index]
        assert pair.delta_u == pair.rejected.u_total - pair.chosen.u_total > 0


def test_a_pair_says_where_it_comes_from() -> None:
    prompt = prompt_of([0.1, 0.5], prompt_id=12)
    pair = paired(prompt)
    assert (pair.prompt_id, pair.prompt, pair.policy_version, pair.seed) == (12, "question 12", 40, 3)
    assert (pair.chosen_index, pair.rejected_index, pair.delta_u) == (0, 1, pytest.approx(0.4))
    assert pair.prompt_token_ids is prompt.token_ids


def test_every_worse_response_is_rejected_about_equally_often() -> None:
    counts = Counter(
        paired(prompt_of([0.4, 0.1, 0.2, 0.1, 0.9], prompt_id=prompt_id)).rejected_index for prompt_id in range(3000)
    )
    assert set(counts) == {0, 2, 4}  # not 3: as certain as the chosen one
    assert all(abs(count - 1000) < 5 * (3000 * (1 / 3) * (2 / 3)) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(
    ("totals", "texts", "reason"),
    [
        ([], [], "unmeasured"),
        ([0.3], ["a"], "unmeasured"),
        ([None, None, 0.3], ["a", "b", "c"], "unmeasured"),
        ([0.1, 0.2, 0.3], ["", " \n", ""], "empty"),
        ([0.1, 0.2, 0.3], ["", "a", "\t"], "empty"),
        ([0.1, 0.2, 0.3], ["a", "a", "a"], "equal"),
        ([0.1, 0.2, 0.3], ["a", "a", ""], "equal"),
        ([0.2, 0.2, 0.2], ["a", "b", "c"], "tie"),
        ([0.2, 0.2 + TIE_TOLERANCE / 2, 0.2], ["a", "b", "c"], "tie"),
        ([0.2, 0.2, 0.9, None], ["a", "b", "a", "c"], "tie"),
    ],
)
def test_prompts_without_a_pair(totals: list[float | None], texts: list[str], reason: str) -> None:
    assert make_pair(prompt_of(totals, texts)) == reason
    assert reason in NO_PAIR_REASONS


def test_a_response_with_the_chosen_text_is_not_rejected() -> None:
    """An estimator that is not deterministic can give equal responses different numbers."""
    rejected = {
        paired(prompt_of([0.1, 0.3, 0.5, 0.4], ["a", "a", "a", "b"], prompt_id=prompt_id)).rejected_index
        for prompt_id in range(50)
    }
    assert rejected == {3}


def test_empty_and_unmeasured_responses_are_left_out() -> None:
    for prompt_id in range(50):
        pair = paired(prompt_of([0.0, None, 0.4, 0.9, 0.7], ["", "b", "c", " ", "e"], prompt_id=prompt_id))
        assert (pair.chosen_index, pair.rejected_index) == (2, 4)


def test_rounding_changes_no_pair() -> None:
    """Estimates of the same responses, computed in another batch, differ in their last bits."""
    rng = np.random.default_rng(5)
    totals = [0.2, 0.2, 0.6, 0.6, 0.9]
    for prompt_id in range(100):
        noisy = [total + rng.uniform(-1e-7, 1e-7) for total in totals]
        assert choices([prompt_of(noisy, prompt_id=prompt_id)]) == choices([prompt_of(totals, prompt_id=prompt_id)])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_measured_is_none_and_not_nan(broken: float) -> None:
    for name in ("u_semantic", "u_factual", "u_value", "u_total"):
        with pytest.raises(ValueError, match=rf"'hello'.*None.*{name.removeprefix('u_')}"):
            replace(measured(0.1, "hello"), **{name: broken})


# --- many prompts ---------------------------------------------------------------------------------------------------
def test_every_prompt_has_a_pair_or_a_reason() -> None:
    prompts = [prompt_of([0.1, 0.2], prompt_id=9), prompt_of([0.1, 0.1], prompt_id=2), prompt_of([], prompt_id=5)]
    made = make_pairs(prompts)
    assert [pair.prompt_id for pair in made.pairs] == [9]
    assert made.unpaired == {2: "tie", 5: "unmeasured"}
    assert list(make_pairs(reversed(prompts)).unpaired) == [2, 5]


def test_pairs_do_not_depend_on_the_order_or_company_of_prompts() -> None:
    prompts = random_prompts(60)
    shuffled = random.Random(1).sample(prompts, 60)
    assert choices(shuffled) == choices(prompts)
    assert choices(prompts[20:30]) == choices(prompts)[20:30]


def test_the_seed_decides_who_is_rejected_and_nothing_else() -> None:
    first, second = choices(random_prompts(60)), choices(random_prompts(60, seed=4))
    assert first == choices(random_prompts(60))
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 20


def test_the_choice_is_the_same_on_every_machine() -> None:
    """If this fails, a round that is resumed after an update gets other pairs than it began with."""
    rejected = [paired(prompt_of([0.1, 0.2, 0.3, 0.4, 0.5], prompt_id=n)).rejected_index for n in range(12)]
    assert rejected == [4, 3, 3, 3, 3, 1, 1, 1, 1, 2, 1, 1]


def test_a_prompt_that_was_measured_twice() -> None:
    prompts = [prompt_of([0.1, 0.2], prompt_id=n) for n in (4, 6, 4, 5)]
    with pytest.raises(ValueError, match=r"more than once: prompt ids \[4\], 1 in all"):
        make_pairs(prompts)


# --- stages ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("delta_u", "stage"),
    [
        (1.3, 0), (0.71, 0), (0.7 + 2 * TIE_TOLERANCE, 0),
        (0.7, 1), (0.8 - 0.1, 1), (0.55, 1), (0.4 + 2 * TIE_TOLERANCE, 1),
        (0.4, 2), (0.5 - 0.1, 2), (0.1, 2), (2 * TIE_TOLERANCE, 2),
    ],
)  # fmt: skip
def test_a_threshold_belongs_to_the_more_doubtful_stage(delta_u: float, stage: int) -> None:
    """0.8 − 0.1 is more than 0.7 in float64."""
    delta_P = np.array([delta_u])
    assert assign_stages(delta_P, stage_thresholds(delta_P, (0.4, 0.7), "absolute")).tolist() == [stage]


@pytest.mark.parametrize("thresholds", [(), (0.6,), (0.3, 0.6), (0.2, 0.5, 0.8)])
def test_stages_equal_the_loop(thresholds: tuple[float, ...]) -> None:
    delta_P = np.random.default_rng(2).random(300)
    stage_P = assign_stages(delta_P, stage_thresholds(delta_P, thresholds, "absolute"))
    bounds = [*reversed(thresholds), -1.0]
    for delta_u, stage in zip(delta_P, stage_P, strict=True):
        assert stage == next(number for number, low in enumerate(bounds) if delta_u > low)
    assert set(stage_P) == set(range(len(thresholds) + 1))


def test_quantiles_divide_evenly() -> None:
    delta_P = np.random.default_rng(2).permutation(np.linspace(0.01, 0.02, 150))
    threshold_E = stage_thresholds(delta_P, (1 / 3, 2 / 3), "quantile")
    stage_P = assign_stages(delta_P, threshold_E)
    assert np.bincount(stage_P).tolist() == [50, 50, 50]
    assert delta_P[stage_P == 0].min() > delta_P[stage_P == 1].max() > delta_P[stage_P == 2].max()


def test_equal_pairs_share_a_stage() -> None:
    delta_P = np.array([0.1, 0.2, 0.2, 0.2, 0.2, 0.9])
    threshold_E = stage_thresholds(delta_P, (1 / 3, 2 / 3), "quantile")
    assert threshold_E.tolist() == pytest.approx([0.2, 0.2])
    assert assign_stages(delta_P, threshold_E).tolist() == [2, 2, 2, 2, 2, 0]
    same_P = np.full(7, 0.3)
    assert assign_stages(same_P, stage_thresholds(same_P, (1 / 3, 2 / 3), "quantile")).tolist() == [2] * 7


def test_no_pairs_have_no_quantiles() -> None:
    none_P = np.zeros(0)
    with pytest.raises(ValueError, match="no pairs"):
        stage_thresholds(none_P, (0.5,), "quantile")
    assert assign_stages(none_P, stage_thresholds(none_P, (0.4, 0.7), "absolute")).shape == (0,)


# --- summary --------------------------------------------------------------------------------------------------------
def with_parts() -> list[MeasuredPrompt]:
    """Two prompts with pairs (Δu 0.5 and 0.75), the second's y⁻ without the factual part; a tie."""
    whole = (
        measured(0.25, "a", u_semantic=0.5, u_factual=0.0),
        measured(0.75, "b", u_semantic=0.25, u_factual=1.0),
    )
    partial = (measured(0.0, "a", u_semantic=0.0, u_factual=0.5), measured(0.75, "b", u_semantic=0.75))
    return [
        replace(prompt_of([]), prompt_id=0, responses=whole),
        replace(prompt_of([]), prompt_id=1, responses=partial),
        prompt_of([0.2, 0.2], prompt_id=2),
    ]


def test_differences_by_uncertainty() -> None:
    made = {name: values.tolist() for name, values in differences(make_pairs(with_parts()).pairs).items()}
    assert made == {"total": [0.5, 0.75], "semantic": [-0.25, 0.75], "factual": [1.0]}
    assert {name: values.tolist() for name, values in differences([]).items()} == {"total": []}


@pytest.mark.parametrize("values", [[0.0, 0.31, 0.05, 1.9, 1.9], [-0.5, 0.25, 0.5], [-0.5, -0.1], [0.0]])
def test_histogram_counts_every_value_once(values: list[float]) -> None:
    made = histogram(np.array(values))
    assert len(made.edges) == NUM_BINS + 1 and len(made.counts) == NUM_BINS and sum(made.counts) == len(values)
    assert made.edges[0] <= min(0, *values) and made.edges[-1] >= max(0, *values)
    for bin_number, count in enumerate(made.counts):
        low, high = made.edges[bin_number : bin_number + 2]
        is_last = bin_number == NUM_BINS - 1
        assert count == sum(low <= value < high or (is_last and value == high) for value in values)


def test_summary_counts_pairs_stages_and_reasons() -> None:
    made = make_pairs(with_parts())
    summary = summarize_pairs(made, np.array([0.4, 0.5]))
    assert (summary.num_prompts, summary.num_pairs) == (3, 2)
    assert summary.num_unpaired == {"unmeasured": 0, "empty": 0, "equal": 0, "tie": 1}
    assert summary.thresholds == (0.4, 0.5)
    assert summary.stage_pairs == (1, 1, 0)
    assert {name: sum(made.counts) for name, made in summary.histograms.items()} == {
        "total": 2, "semantic": 2, "factual": 1,
    }  # fmt: skip
    empty = summarize_pairs(make_pairs([]), np.array([0.4]))
    assert (empty.num_prompts, empty.num_pairs, empty.stage_pairs) == (0, 0, (0, 0))
    assert sum(empty.histograms["total"].counts) == 0


def test_stage_ranges_in_words() -> None:
    assert stage_ranges((0.4, 0.7)) == ["Δu > 0.7", "0.4 < Δu ≤ 0.7", "Δu ≤ 0.4"]
    assert stage_ranges((0.6,)) == ["Δu > 0.6", "Δu ≤ 0.6"]
    assert stage_ranges(()) == ["every Δu"]


def test_the_log_says_what_is_skipped_and_why_beside_the_histogram() -> None:
    head, reason, *stages_and_bars = describe_pairs(
        summarize_pairs(make_pairs(with_parts()), np.array([0.4, 0.5]))
    ).splitlines()
    assert head == "2 of 3 prompts gave a pair"
    assert reason == f"  1 without: {NO_PAIR_REASONS['tie']}"
    assert stages_and_bars[:3] == [
        "  stage 1, Δu > 0.5: 1 of 2 pairs",
        "  stage 2, 0.4 < Δu ≤ 0.5: 1 of 2 pairs",
        "  stage 3, Δu ≤ 0.4: no pairs, so it is skipped",
    ]
    bars = stages_and_bars[3:]
    assert len(bars) == NUM_BINS
    assert [line for line in bars if "█" in line] == [bars[13], bars[19]]  # 0.5 and 0.75, in bins of 0.0375
    assert describe_pairs(summarize_pairs(make_pairs([]), np.array([]))).startswith("0 of 0 prompts gave a pair\n")
