"""The preference loss (stage 3 of UDASA): DPO, IPO and hinge on the two log-probabilities of each pair.

    h = log π(y⁺|x)/π_ref(y⁺|x) − log π(y⁻|x)/π_ref(y⁻|x)      β·h = reward margin of the pair
    sigmoid  −log σ(β·h)      hinge  max(0, 1 − β·h)      ipo  (h − 1/(2β))²

DPO: Rafailov et al. 2023, equation 7. Hinge: Liu et al. 2023 (RSO). IPO: Azar et al. 2023, equation 17. ``ipo`` always,
the others if ``length_normalized``, take each response's log-ratio per token, its sum over its number of tokens. For
IPO TRL does the same, as its authors ran it.

Every term is a local sum over a *global* count, so that micro-batches and ranks add up to the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_dist.asa.objective import FusedOutput
from asa_dist.config_udasa import DpoConfig

# From h (float [P]) and β.
PAIR_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda h_P, beta: -F.logsigmoid(beta * h_P),
    "hinge": lambda h_P, beta: F.relu(1 - beta * h_P),
    "ipo": lambda h_P, beta: (h_P - 1 / (2 * beta)).square(),
}


@dataclass(frozen=True)
class PairCounts:
    """The normalisers of a step: over all ranks and micro-batches."""

    pairs: float
    response_tokens: float  # of chosen and rejected responses, end-of-text included

    @staticmethod
    def of(length_P2: Tensor) -> Tensor:
        """This micro-batch's own counts, float64 [2], in field order: sum them, then ``PairCounts(*sums)``."""
        return torch.tensor([float(len(length_P2)), float(length_P2.sum())], dtype=torch.float64)


@dataclass(frozen=True)
class PairInputs:
    """What the loop knows and the forward needs beside the pairs."""

    counts: PairCounts
    dpo: DpoConfig
    kl_weight: float  # 0 where the curriculum wants no penalty


def preference_loss(
    logprob_P2: Tensor,
    reference_P2: Tensor,
    length_P2: Tensor,
    config: DpoConfig,
    kl_weight: float,
    counts: PairCounts,
) -> FusedOutput:
    """Loss and metrics of one micro-batch's pairs; P may be 0. Columns: chosen, rejected.

    The loss of a pair is (1 − ε)·ℓ(h) + ε·ℓ(−h): what is expected if a share ε of the pairs is the wrong way round (for
    ``sigmoid``: conservative DPO). To their mean comes the KL penalty ``kl_weight``·mean(log π_ref − log π) over the
    responses' tokens. It estimates KL(π_ref ‖ π) per token, without bias only if the reference sampled these responses
    and nothing selected among them; what is most certain was selected, though.

    Args:
        logprob_P2: log π of each response, summed over its tokens, nats, float32 with the graph to the model.
        reference_P2: log π_ref of the same, float32 without a graph.
        length_P2: tokens of each response, end-of-text included, int64.
        kl_weight: 0 where the curriculum wants no penalty.

    Returns:
        ``sums``: ``udasa/loss``, divided by the global counts already; ``udasa/margin`` (β·h) and ``udasa/accuracy``
        (h > 0), to be divided by ``counts.pairs``; ``udasa/kl``, by ``counts.response_tokens``. ``terms``: ``reward``
        [P, 2], whose difference is the margin.
    """
    ratio_P2 = logprob_P2 - reference_P2
    per_token = config.length_normalized or config.loss == "ipo"
    score_P2 = ratio_P2 / length_P2.clamp(min=1) if per_token else ratio_P2
    h_P = score_P2[:, 0] - score_P2[:, 1]
    pair_loss, smoothing = PAIR_LOSSES[config.loss], config.label_smoothing
    loss_P = (1 - smoothing) * pair_loss(h_P, config.beta) + smoothing * pair_loss(-h_P, config.beta)
    kl_sum = -ratio_P2.sum()
    loss = loss_P.sum() / max(counts.pairs, 1.0) + kl_weight * kl_sum / max(counts.response_tokens, 1.0)
    sums = {
        "udasa/loss": loss,
        "udasa/margin": config.beta * h_P.sum(),
        "udasa/accuracy": (h_P > 0).sum().to(h_P),
        "udasa/kl": kl_sum,
    }
    terms = {"reward": config.beta * score_P2.detach()}
    return FusedOutput(loss, {name: value.detach() for name, value in sums.items()}, {}, terms)
