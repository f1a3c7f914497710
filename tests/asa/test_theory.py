"""The theorems' quantities: on data made so that the answer is known, and where there is no answer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asa_dist.asa.theory import (
    AlignmentFit,
    alignment_error,
    fit_alignment,
    gradient_variance,
    sample_complexity,
    squared_weights,
)
from tests.asa.local_run import local_run
from tests.distributed import tiny


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


# --- equation 13 ------------------------------------------------------------------------------------------------
def test_of_true_and_false_responses_rho_is_the_difference_of_their_mean_rewards() -> None:
    fit = fit_alignment(tensor(0.9, 0.5, 0.1, 0.3, -0.1), tensor(1, 1, 0, 0, 0))
    assert fit == pytest.approx((0.7 - 0.1, 0.0))
    below_zero = fit_alignment(tensor(0.9, 0.5, 0.1, 0.3, -0.1) - 0.5, tensor(1, 1, 0, 0, 0))
    assert below_zero == pytest.approx((0.6, 0.4)), "a shifted reward tells as much, but needs ε"


def test_graded_truth() -> None:
    truth_S = tensor(0, 0, 0.5, 0.5, 1, 1)
    fit = fit_alignment(tensor(-0.1, 0.1, 0.1, -0.1, 0.5, 0.7), truth_S)
    assert fit.rho == pytest.approx(0.6)
    assert fit.epsilon == pytest.approx(0.6 * 0.5), "the middle level lacks most: ρ/2 − 0"


@pytest.mark.parametrize("seed", range(5))
def test_epsilon_is_the_smallest_with_which_the_condition_holds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth_S = torch.randint(4, (200,), generator=generator) / 3
    reward_S = truth_S.square() - 0.3 + 0.2 * torch.randn(200, generator=generator)
    rho, epsilon = fit_alignment(reward_S, truth_S)
    surplus = [float(reward_S[truth_S == a].mean() - (rho * a - epsilon)) for a in truth_S.unique()]
    assert rho > 0.5 and epsilon > 0.1
    assert min(surplus) == pytest.approx(0, abs=1e-6)


def test_a_reward_that_cannot_tell_has_no_rho() -> None:
    truth_S = tensor(1, 0, 1, 0)
    assert fit_alignment(torch.full((4,), 0.5), truth_S) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert fit_alignment(torch.full((4,), -0.5), truth_S) == pytest.approx((0.0, 0.5), abs=1e-12)
    assert fit_alignment(-truth_S, truth_S) == pytest.approx((0.0, 1.0)), "it prefers what is false"


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_equally_true_responses_tell_nothing(truth: float) -> None:
    reward_S, truth_S = tensor(0.2, 0.4, 0.9), torch.full((3,), truth)
    for found in (fit_alignment(reward_S, truth_S), alignment_error(reward_S, truth_S, torch.arange(3), seed=0)):
        assert math.isnan(found.rho) and math.isnan(found.epsilon)


@pytest.mark.parametrize(
    ("reward_S", "truth_S", "complaint"),
    [
        (tensor(), tensor(), "one reward and one truth value"),
        (tensor(1, 2), tensor(1), "one reward and one truth value"),
        (tensor(1, math.nan), tensor(0, 1), "the reward of response 1"),
        (tensor(1, 2), tensor(math.inf, 1), "the truth of response 0"),
    ],
)
def test_what_cannot_be_fitted(reward_S: Tensor, truth_S: Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fit_alignment(reward_S, truth_S)


def probe(num_prompts: int, per_prompt: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """ρ = 0.4, ε = 0.1; rewards share noise within a prompt."""
    generator = torch.Generator().manual_seed(seed)
    truth_CG = torch.randint(2, (num_prompts, 1), generator=generator).double().expand(-1, per_prompt)
    noise_CG = 0.3 * torch.randn(num_prompts, 1, generator=generator).double()
    noise_CG = noise_CG + 0.1 * torch.randn(num_prompts, per_prompt, generator=generator)
    prompt_CG = torch.arange(num_prompts)[:, None].expand(-1, per_prompt)
    return (0.4 * truth_CG - 0.1 + noise_CG).flatten(), truth_CG.flatten(), prompt_CG.flatten()


def test_standard_errors_are_what_repeating_the_experiment_shows() -> None:
    fits = torch.tensor([fit_alignment(*probe(60, 4, seed)[:2]) for seed in range(300)])
    assert float(fits[:, 0].mean()) == pytest.approx(0.4, abs=0.02)
    errors = torch.tensor([alignment_error(*probe(60, 4, seed), seed=seed) for seed in range(30)]).mean(0)
    assert errors.tolist() == pytest.approx(fits.std(0).tolist(), rel=0.15)
    reward_S, truth_S, _ = probe(60, 4, 0)
    alone = alignment_error(reward_S, truth_S, torch.arange(240), seed=0)
    assert alone.rho < 0.7 * float(errors[0]), "as if the responses to one prompt were independent"


def test_standard_errors_follow_their_seed() -> None:
    data = probe(20, 3, 1)
    assert alignment_error(*data, seed=5) == alignment_error(*data, seed=5) != alignment_error(*data, seed=6)


def test_one_prompt_has_no_standard_error() -> None:
    found = alignment_error(tensor(0.1, 0.9), tensor(0, 1), torch.zeros(2, dtype=torch.int64), seed=0)
    assert isinstance(found, AlignmentFit) and math.isnan(found.rho) and math.isnan(found.epsilon)


# --- equation 14 ------------------------------------------------------------------------------------------------
def test_sample_complexity() -> None:
    assert sample_complexity(1.0, 0.1, 0.5, 0.05) == pytest.approx(math.log(20) / (0.01 * 0.25))
    assert sample_complexity(2.0, 0.1, 0.5, 0.05) == pytest.approx(4 * sample_complexity(1.0, 0.1, 0.5, 0.05))
    assert sample_complexity(1.0, 0.1, 0.0, 0.05) == sample_complexity(1.0, 0.0, 0.5, 0.05) == math.inf
    assert math.isnan(sample_complexity(1.0, 0.1, math.nan, 0.05))


@pytest.mark.parametrize("arguments", [(1, 0.1, 0.5, 0), (1, 0.1, 0.5, 1), (-1, 0.1, 0.5, 0.1), (1, 0.1, -0.5, 0.1)])
def test_sample_complexity_refuses(arguments: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"delta = |none may be below 0"):
        sample_complexity(*arguments)


# --- gradient variance --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.95])
def test_squared_weights(beta: float, step: int) -> None:
    weights = (1 - beta) * beta ** torch.arange(step, dtype=torch.float64) / (1 - beta**step)
    assert float(weights.sum()) == pytest.approx(1)
    assert squared_weights(beta, step) == pytest.approx(float(weights.square().sum()))


def adams_averages(gradient_TD: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """What torch's Adam holds after these gradients."""
    parameter = torch.nn.Parameter(torch.zeros(gradient_TD.shape[1]))
    adam = torch.optim.AdamW([parameter], betas=(beta1, beta2))
    for gradient_D in gradient_TD:
        parameter.grad = gradient_D.clone()
        adam.step()
    state = adam.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("step", [2, 5, 60])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.999), (0.5, 0.9)])
def test_variance_of_a_stream_of_gradients(step: int, beta1: float, beta2: float) -> None:
    """Elements of different means and variances; there are many, so that their sum is known well."""
    size, generator = 60_000, torch.Generator().manual_seed(step)
    mean_D = torch.randn(size, generator=generator)
    std_D = torch.rand(size, generator=generator)
    gradient_TD = mean_D + std_D * torch.randn(step, size, generator=generator)
    found = gradient_variance(*adams_averages(gradient_TD, beta1, beta2), beta1, beta2, step)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(std_D.square().sum()), rel=0.05)


def test_gradients_without_noise_have_no_variance() -> None:
    mean_D = torch.linspace(-3, 3, 101)
    found = gradient_variance(*adams_averages(mean_D.expand(50, -1), 0.9, 0.95), 0.9, 0.95, 50)
    assert float(found) == pytest.approx(0, abs=1e-5 * float(mean_D.square().sum()))


def test_limits_that_the_docstring_names() -> None:
    def of_stream(gradient_T: Tensor) -> float:
        return float(gradient_variance(*adams_averages(gradient_T[:, None], 0.9, 0.95), 0.9, 0.95, len(gradient_T)))

    time_T = torch.arange(100.0)
    assert of_stream((time_T * 2 * math.pi / 10).sin()) > 0.3, "to and fro counts as variance"
    assert of_stream(0.95**time_T) > 0, "shrinking gradients raise the estimate"
    assert of_stream(1.05**time_T) < 0, "growing ones lower it"


# --- in a run -----------------------------------------------------------------------------------------------------
def test_sampled_steps_are_observed_and_no_others(tmp_path: Path) -> None:
    run = local_run(tiny.config(0, metrics={"samples_every_steps": 2}), tmp_path)
    run.engine.bad_steps = {5}
    run.loop.run(6)
    found = {int(row["step"]): {key for key in row if key.startswith("theory/")} for row in run.recorder.rows}
    first = {"theory/reward_max", "theory/lipschitz_phi"}
    variances = {f"theory/gradient_variance/{part}" for part in ("psi", "phi", "xi")}
    assert found[1] == first, "one gradient has no variance"
    assert found[3] == first | variances
    assert run.recorder.sampled_steps == [1, 3]
    assert found[5] == set() and run.recorder.skipped_steps == [5]
    assert found[2] == found[4] == found[6] == set()
