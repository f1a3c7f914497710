"""Earned trust: how far R_self may steer, and when alignment may start at all.

τ measures agreement of R_self with R_intrinsic, *not truth*. Every function is pure; ``AlignmentState`` holds what one
step hands to the next, as persistent buffers of a module of its own: forward() never writes it (activation recompute
would update it twice), the loop does, once per step, from all-reduced sums, the same on every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asa_dist.asa.heads import NUM_FEATURES, NUM_TERMS
from asa_dist.config import EvaluatorConfig

STD_FLOOR = 0.05  # of z-scores and of group-normalised advantages
TIE_TOLERANCE = 1e-6
MIN_TOKEN_SHARE = 1e-3  # of responses: rarer tokens are as informative as this
MIN_TOKEN_WEIGHT = 1e-6  # of a token in every response: equal texts overlap fully, whatever they consist of
MIN_RANKABLE_STD = 1e-3  # groups flatter than this have no order to compare


def z_score(reward_PG: Tensor) -> Tensor:
    """Mean 0, standard deviation 1 within the group, the latter floored."""
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    return centred_PG / reward_PG.std(1, correction=0, keepdim=True).clamp(min=STD_FLOOR)


def average_ranks(values_PG: Tensor) -> Tensor:
    """Ranks 1 … G within the group; equal values share the mean of their ranks.

    Within ``TIE_TOLERANCE`` is equal: rewards of equal responses differ in their last bits.
    """
    above_PGG = values_PG.unsqueeze(2) - values_PG.unsqueeze(1)
    less_PG = (above_PGG > TIE_TOLERANCE).sum(-1)
    equal_PG = (above_PGG.abs() <= TIE_TOLERANCE).sum(-1)
    return less_PG + (equal_PG + 1) / 2


def spearman(left_PG: Tensor, right_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Rank correlation per group, and which groups have an order on both sides.

    Returns:
        (correlation_P, 0 where invalid; valid_P boolean)
    """
    flattest_P = torch.minimum(left_PG.std(1, correction=0), right_PG.std(1, correction=0))
    left_rank_PG, right_rank_PG = average_ranks(left_PG), average_ranks(right_PG)
    left_PG = left_rank_PG - left_rank_PG.mean(1, keepdim=True)
    right_PG = right_rank_PG - right_rank_PG.mean(1, keepdim=True)
    scale_P = left_PG.norm(dim=1) * right_PG.norm(dim=1)
    valid_P = (flattest_P >= MIN_RANKABLE_STD) & (scale_P > 0)
    correlation_P = (left_PG * right_PG).sum(1) / torch.where(valid_P, scale_P, 1.0)
    return torch.where(valid_P, correlation_P, 0.0), valid_P


def used_reward(self_PG: Tensor, intrinsic_PG: Tensor, tau: float | Tensor) -> Tensor:
    """R_used = τ·z(R_self) + (1 − τ)·z(R_intrinsic)."""
    return tau * z_score(self_PG) + (1 - tau) * z_score(intrinsic_PG)


@dataclass(frozen=True)
class StepSummary:
    """All-reduced sums of one step that the state is updated from."""

    rho_sum: float  # of the valid groups' rank correlations
    num_valid_groups: float
    reward_mean_3: Tensor  # logic, fact, behav
    meta_loss: float
    pooled_sum_H: Tensor  # of uncentred response means
    pooled_square_sum: float  # of squared norms of centred response means
    num_pooled: float
    responses_with_V: Tensor  # in how many responses each token occurs
    num_responses: float


class AlignmentState(nn.Module):
    """What a step hands to the next: trust, warm-up, running means. Means are float64, the centre float32."""

    rho: Tensor
    held_steps: Tensor
    warm: Tensor
    steps: Tensor
    reward_mean_3: Tensor
    meta_mean: Tensor
    center_sum_H: Tensor
    square_sum: Tensor
    center_weight: Tensor
    mean_weight: Tensor
    token_share_V: Tensor
    token_share_weight: Tensor

    def __init__(self, config: EvaluatorConfig, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        self.register_buffer("rho", torch.zeros((), dtype=torch.float64))
        self.register_buffer("held_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("warm", torch.tensor(config.max_warmup_steps == 0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reward_mean_3", torch.zeros(NUM_TERMS, dtype=torch.float64))
        self.register_buffer("meta_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("center_sum_H", torch.zeros(hidden_size))
        self.register_buffer("square_sum", torch.zeros((), dtype=torch.float64))
        self.register_buffer("center_weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("token_share_V", torch.zeros(vocab_size))
        self.register_buffer("token_share_weight", torch.zeros((), dtype=torch.float64))

    @property
    def tau(self) -> float:
        """τ for the next step."""
        fixed = {"always": 1.0, "never": 0.0}
        return fixed.get(self.config.trust, min(1.0, max(0.0, float(self.rho))))

    @property
    def aligning(self) -> bool:
        """Whether β applies: the evaluator's warm-up is over."""
        return bool(self.warm)

    def center(self) -> Tensor:
        """Running mean of pooled response states, float32 [H]; 0 before the first step."""
        return self.center_sum_H / max(float(self.center_weight), 1e-12)

    def scale(self) -> float:
        """1 / root mean square norm of centred response states; 1 before the first step."""
        mean_square = float(self.square_sum) / max(float(self.center_weight), 1e-12)
        return mean_square**-0.5 if mean_square > 0 else 1.0

    def token_weights(self) -> Tensor:
        """What each token counts when siblings are compared, float32 [V], at most 1; 1 before the first step.

        A token says the more, the fewer responses (to all prompts) contain it: its weight is the square of its inverse
        document frequency in the model's own recent responses. So siblings agree when they say the same thing, not
        when they put it the same way, and wording that spreads loses weight.
        """
        if self.config.token_weights == "uniform" or self.token_share_weight == 0:
            return torch.ones_like(self.token_share_V)
        share_V = self.token_share_V / self.token_share_weight.float()
        information_V = share_V.clamp(min=MIN_TOKEN_SHARE, max=1.0).log() / math.log(MIN_TOKEN_SHARE)
        return information_V.square().clamp(min=MIN_TOKEN_WEIGHT)

    def progress(self) -> Tensor:
        """Features of the meta-optimizer, float32 [5]."""
        weight = max(float(self.mean_weight), 1e-12)
        log_step = torch.log1p(self.steps.double()).view(1)
        features_F = torch.cat([log_step, self.reward_mean_3 / weight, self.meta_mean.view(1) / weight]).float()
        assert features_F.shape == (NUM_FEATURES,)
        return features_F

    @torch.no_grad()
    def update(self, summary: StepSummary) -> None:
        """One step forward. Running means are bias-corrected: each is a decayed sum beside its decayed weight."""
        config, decay = self.config, self.config.running_mean_decay
        if summary.num_valid_groups > 0:
            mean_rho = summary.rho_sum / summary.num_valid_groups
            self.rho.mul_(config.trust_decay).add_((1 - config.trust_decay) * mean_rho)
        self.steps.add_(1)
        self.held_steps.copy_(
            self.held_steps + 1 if float(self.rho) >= config.warmup_rho else torch.zeros_like(self.held_steps)
        )
        if int(self.held_steps) >= config.warmup_hold_steps or int(self.steps) >= config.max_warmup_steps:
            self.warm.fill_(True)
        self.reward_mean_3.mul_(decay).add_((1 - decay) * summary.reward_mean_3.to(self.reward_mean_3))
        self.meta_mean.mul_(decay).add_((1 - decay) * summary.meta_loss)
        self.mean_weight.mul_(decay).add_(1 - decay)
        if summary.num_pooled > 0:
            self.center_sum_H.mul_(decay).add_(
                (1 - decay) * (summary.pooled_sum_H / summary.num_pooled).to(self.center_sum_H)
            )
            self.square_sum.mul_(decay).add_((1 - decay) * summary.pooled_square_sum / summary.num_pooled)
            self.center_weight.mul_(decay).add_(1 - decay)
        share_decay = config.token_share_decay
        share_V = (summary.responses_with_V / summary.num_responses).to(self.token_share_V)
        self.token_share_V.mul_(share_decay).add_((1 - share_decay) * share_V)
        self.token_share_weight.mul_(share_decay).add_(1 - share_decay)
