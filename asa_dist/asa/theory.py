"""What the paper's theorems assume, as numbers that can be measured: equations 13 and 14, and gradient variance.

Shapes: S responses of a probe set, A distinct values of true alignment, C prompts, B bootstrap resamples. All float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AlignmentFit(NamedTuple):
    """(ρ, ε) of equation 13, or their standard errors; NaN = the data cannot tell."""

    rho: float
    epsilon: float


def fit_alignment(reward_S: Tensor, truth_S: Tensor) -> AlignmentFit:
    """ρ and ε of equation 13, E[R_self] ≥ ρ·TrueAlignment − ε, on responses whose truth is known.

    With m(a) the mean reward of the responses of true alignment a, the condition is m(a) ≥ ρ·a − ε for every a.
    Any ρ satisfies it with some ε, so the condition alone fixes neither:

        ρ   least-squares slope of R on truth, at least 0: what the reward gains as truth does.
            Of true (1) and false (0) responses it is m(1) − m(0)
        ε   max(0, max over a of ρ·a − m(a)): the smallest with which the condition holds for this ρ

    The largest ρ that needs no ε would be no measure: for a constant reward of 0.5 it is 0.5, since (13) bounds R only
    from below. The slope is 0 then, as it is (by the clip) for a reward that prefers what is false.

    Limits: it holds for these probes and for responses of the policy that wrote them, not for the one that training
    turns it into. A level of truth with few responses has a noisy mean, and ε, a maximum over means, then tends to be
    too large: grade truth coarsely. ``alignment_error`` tells how far both can be trusted.

    Args:
        reward_S: R_self.
        truth_S: true alignment, graded or 0 and 1.

    Returns:
        NaN for both if all responses are equally true: nothing tells what truth would have earned.

    Raises:
        ValueError: no responses, shapes that differ, or values that are not finite.
    """
    reward_S, levels_A, level_S = _checked(reward_S, truth_S)
    count_A = torch.bincount(level_S, minlength=len(levels_A)).double()
    sum_A = torch.zeros_like(count_A).index_add(0, level_S, reward_S)
    rho_1, epsilon_1 = _fit(levels_A, count_A[None], sum_A[None])
    return AlignmentFit(float(rho_1), float(epsilon_1))


def alignment_error(
    reward_S: Tensor, truth_S: Tensor, prompt_S: Tensor, *, seed: int, num_resamples: int = 1000
) -> AlignmentFit:
    """Bootstrap standard errors of ``fit_alignment``'s ρ and ε.

    Prompts are drawn with replacement, each with all its responses: those resemble each other, so that drawing them
    one by one would promise too much. Resamples whose responses are equally true are left out.

    Args:
        prompt_S: which prompt each response answers (any integers).

    Returns:
        NaN for both with fewer than two prompts, or if all responses are equally true.

    Raises:
        ValueError: as ``fit_alignment``.
    """
    reward_S, levels_A, level_S = _checked(reward_S, truth_S)
    if prompt_S.shape != reward_S.shape:
        raise ValueError(f"{len(reward_S)} rewards, but prompts of shape {tuple(prompt_S.shape)}")
    prompts, prompt_S = prompt_S.cpu().unique(return_inverse=True)
    num_prompts = len(prompts)
    if num_prompts < 2:
        return AlignmentFit(math.nan, math.nan)
    count_CA = torch.zeros(num_prompts, len(levels_A), dtype=torch.float64)
    sum_CA = torch.zeros_like(count_CA)
    count_CA.index_put_((prompt_S, level_S), torch.ones_like(reward_S), accumulate=True)
    sum_CA.index_put_((prompt_S, level_S), reward_S, accumulate=True)
    drawn_BC = torch.randint(
        num_prompts, (num_resamples, num_prompts), generator=torch.Generator().manual_seed(seed)
    )
    times_BC = torch.zeros(num_resamples, num_prompts, dtype=torch.float64)
    times_BC.scatter_add_(1, drawn_BC, torch.ones_like(times_BC))
    rho_B, epsilon_B = _fit(levels_A, times_BC @ count_CA, times_BC @ sum_CA)
    is_known_B = ~rho_B.isnan()
    if is_known_B.sum() < 2:
        return AlignmentFit(math.nan, math.nan)
    return AlignmentFit(float(rho_B[is_known_B].std()), float(epsilon_B[is_known_B].std()))


def _checked(reward_S: Tensor, truth_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(reward_S float64, levels_A of truth, level_S: index of each response's level), on the CPU."""
    if reward_S.ndim != 1 or reward_S.shape != truth_S.shape or not len(reward_S):
        raise ValueError(
            f"one reward and one truth value per response: got shapes {tuple(reward_S.shape)}, {tuple(truth_S.shape)}"
        )
    reward_S, truth_S = reward_S.detach().double().cpu(), truth_S.detach().double().cpu()
    for name, values_S in (("reward", reward_S), ("truth", truth_S)):
        if not values_S.isfinite().all():
            raise ValueError(f"the {name} of response {int((~values_S.isfinite()).nonzero()[0])} is not finite")
    return reward_S, *truth_S.unique(return_inverse=True)


def _fit(levels_A: Tensor, count_BA: Tensor, sum_BA: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ_B, ε_B) of B data sets from the number of responses, and the sum of their rewards, of each level of truth."""
    is_there_BA = count_BA > 0
    mean_BA = sum_BA / count_BA.clamp(min=1)
    share_BA = count_BA / count_BA.sum(1, keepdim=True)
    centred_BA = levels_A - (share_BA * levels_A).sum(1, keepdim=True)
    slope_B = (share_BA * centred_BA * mean_BA).sum(1) / (share_BA * centred_BA.square()).sum(1)
    rho_B = torch.where(is_there_BA.sum(1) > 1, slope_B.clamp(min=0), math.nan)
    lacking_BA = (rho_B[:, None] * levels_A - mean_BA).where(is_there_BA, -math.inf)
    return rho_B, torch.where(rho_B.isnan(), math.nan, lacking_BA.amax(1).clamp(min=0))


def sample_complexity(reward_max: float, epsilon: float, rho: float, delta: float) -> float:
    """Samples that Theorem 3 asks for, equation 14: R_max²·log(1/δ) / (ε²·ρ²).

    The paper gives the order alone: its constant is not known and is 1 here, so that ratios between runs mean
    something and the number itself does not.

    Args:
        reward_max: largest |R|.
        epsilon: how far from optimal alignment the policy may be; chosen, and not the ε that ``fit_alignment`` finds,
            although the paper calls both by one name.
        rho: of ``fit_alignment``; NaN gives NaN.
        delta: probability with which it may fail.

    Returns:
        A number of samples, not rounded; infinite where ε or ρ is 0.

    Raises:
        ValueError: δ outside (0, 1), or another argument below 0.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: a probability between 0 and 1, both excluded")
    if reward_max < 0 or epsilon < 0 or rho < 0:
        raise ValueError(f"reward_max = {reward_max}, epsilon = {epsilon}, rho = {rho}: none may be below 0")
    if epsilon == 0 or rho == 0:
        return math.inf
    return reward_max**2 * math.log(1 / delta) / (epsilon**2 * rho**2)


def squared_weights(beta: float, step: int) -> float:
    """Σ w_k² of the bias-corrected exponential average m̂ = Σ_k w_k g_k of ``step`` ≥ 1 values; 1 at the first.

    w_k = (1 − β)·β^(t−k) / (1 − β^t) for k = 1 … t, so that
    Σ w_k² = (1 − β)²/(1 − β^t)² · (1 − β^2t)/(1 − β²) = (1 − β)/(1 + β) · (1 + β^t)/(1 − β^t).
    """
    return (1 - beta) / (1 + beta) * (1 + beta**step) / (1 - beta**step)


def gradient_variance(exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, step: int) -> Tensor:
    """Variance of the stochastic gradient, summed over the elements of a tensor, from Adam's two averages.

    Theorem 1, step 1 supposes it bounded. For an element whose gradients are independent with mean μ and variance σ²,
    the bias-corrected averages have E[v̂] = μ² + σ² and E[m̂²] = μ² + σ²·s, s = ``squared_weights(β₁, t)``:

        σ² = E[v̂ − m̂²] / (1 − s)

    so that no gradient has to be kept and no further backward be made. Of one element, and even of few, it is mostly
    noise and may be below 0: sum over a part's elements first and clip the sum at 0; clipping each would bias it.

    Limits: gradients are those that Adam sees, of the whole global batch and *after clipping*. A mean gradient that
    moves back and forth within the averages' horizons, some 1/(1 − β) steps, counts as variance; and as β₂ looks back
    further than β₁, gradients that shrink raise the estimate and gradients that grow lower it, down to 0.

    Args:
        exp_avg, exp_avg_sq: Adam's m and v as it stores them, without bias correction, of equal shape.
        step: Adam's updates so far, at least 2; β₁ must be above 0: one gradient alone has no variance.

    Returns:
        A float64 scalar on the tensors' device; the mean squared distance of a gradient from its mean.
    """
    mean = exp_avg / (1 - beta1**step)
    excess = exp_avg_sq / (1 - beta2**step) - mean.square()
    return excess.sum(dtype=torch.float64) / (1 - squared_weights(beta1, step))
