"""How uncertain a response is (equations 1–6): what its estimators say, as numbers, and these fused into one.

    (1)(2)  u_sem(i) = 1 − 1/(N − 1) · Σ_{j≠i} cos(e_i, e_j)      its mean over i is the paper's U_sem, one per prompt
    (3)     u_fact   = P(neutral) + P(contradiction)               premise = prompt, hypothesis = response
    (4)     u_value  = P(unsafe)
    (5)(6)  u_total  = Σ_k α_k u_k,  α_k = e^{u_k} / Σ_j e^{u_j}

The embedded estimator of (3) and (4) is the model's own answer to a yes/no question. NaN stands for what could not be
measured, and everything that depends on it is NaN. All values are float64, in [0, 1] but for u_sem, in [0, 2].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_dist.config import ConfigError


def fuse(u_PNK: Tensor, fusion: Literal["softmax", "mean"]) -> Tensor:
    """Equations (5) and (6), float64 [P, N].

    The paper's Table 3 prints 0.33, 0.39 and 0.10 where (6) gives 0.41, 0.47 and 0.10: it is near the plain mean.

    Args:
        u_PNK: the uncertainties that are measured, any float dtype; a response that lacks one (NaN) has no total, since
            totals of different parts cannot be compared.
        fusion: softmax: (5); mean: α = 1/K.

    Raises:
        ValueError: K = 0.
    """
    if u_PNK.shape[-1] == 0:
        raise ValueError("fuse needs at least one uncertainty, u_PNK has K = 0")
    u_PNK = u_PNK.double()
    return (u_PNK.softmax(-1) * u_PNK).sum(-1) if fusion == "softmax" else u_PNK.mean(-1)


def semantic_uncertainty(embedding_PND: Tensor, says_PN: Tensor, per: Literal["response", "prompt"]) -> Tensor:
    """Equations (1) and (2), float64 [P, N].

    An empty response has no meaning that a sibling could share: it counts as a zero vector, whatever its row holds. Its
    own u_sem is 1, and its cosine with each sibling is 0; the divisor stays N − 1.

    Args:
        embedding_PND: any float dtype.
        says_PN: bool; False = an empty response.
        per: prompt: the mean over the prompt's responses, the same for all of them.

    Raises:
        ValueError: fewer than two responses per prompt.
    """
    num_responses = embedding_PND.shape[1]
    if num_responses < 2:
        raise ValueError(f"semantic uncertainty compares siblings: needs N ≥ 2, embedding_PND has N = {num_responses}")
    unit_PND = F.normalize(embedding_PND.double().masked_fill(~says_PN.unsqueeze(-1), 0), dim=-1)
    itself_NN = torch.eye(num_responses, dtype=torch.bool, device=unit_PND.device)
    cosine_PNN = (unit_PND @ unit_PND.mT).clamp(-1, 1).masked_fill(itself_NN, 0)
    u_PN = 1 - cosine_PNN.sum(-1) / (num_responses - 1)
    return u_PN if per == "response" else u_PN.mean(1, keepdim=True).expand_as(u_PN)


class NliLabels(NamedTuple):
    """Where an NLI model's logits stand."""

    entailment: int
    neutral: int
    contradiction: int


def nli_labels(id2label: Mapping[int, str]) -> NliLabels:
    """Which label is which, by how their names begin, in upper or lower case.

    Args:
        id2label: of the model's config.

    Raises:
        ConfigError: not exactly one label for each of the three, as in LABEL_0, LABEL_1, LABEL_2.
    """
    found = {
        beginning: [index for index, name in id2label.items() if name.strip().lower().startswith(beginning)]
        for beginning in ("entail", "neutral", "contradict")
    }
    if unclear := [beginning for beginning, indices in found.items() if len(indices) != 1]:
        raise ConfigError(
            f"udasa.factual.model: its labels are {_listed(id2label)}; exactly one must begin with each of "
            f"{', '.join(found)}, and for {', '.join(unclear)} that is not so. "
            "Name them under id2label in the model's config.json, or choose another NLI model"
        )
    return NliLabels(*(indices[0] for indices in found.values()))


def factual_uncertainty(logit_SL: Tensor, labels: NliLabels) -> Tensor:
    """Equation (3), float64 [S], from an NLI model's logits of any float dtype."""
    probability_SL = logit_SL.double().softmax(-1)
    return probability_SL[:, labels.neutral] + probability_SL[:, labels.contradiction]


def unsafe_label(id2label: Mapping[int, str], name: str) -> int:
    """Index of the label called ``name``, upper and lower case being equal.

    Args:
        id2label: of the model's config.

    Raises:
        ConfigError: no label, or several, have this name.
    """
    indices = [index for index, label in id2label.items() if label.strip().lower() == name.strip().lower()]
    if len(indices) != 1:
        raise ConfigError(
            f"udasa.value.unsafe_label: {name!r} must be one of the labels of udasa.value.model: {_listed(id2label)}"
        )
    return indices[0]


def value_uncertainty(logit_SL: Tensor, unsafe: int, independent: bool) -> Tensor:
    """Equation (4), float64 [S], from a safety classifier's logits of any float dtype.

    Args:
        unsafe: index of :func:`unsafe_label`.
        independent: each label has a probability of its own (``problem_type`` is multi_label_classification), which do
            not sum to 1. A single label always has.
    """
    logit_SL = logit_SL.double()
    probability_SL = logit_SL.sigmoid() if independent or logit_SL.shape[-1] == 1 else logit_SL.softmax(-1)
    return probability_SL[:, unsafe]


def self_judge_uncertainty(yes_logprob_S: Tensor, no_logprob_S: Tensor) -> Tensor:
    """P(no) / (P(yes) + P(no)), float64 [S]: how far the model doubts that the answer is true, or harmless.

    Args:
        yes_logprob_S: log-probability of yes behind the question, any float dtype; of several spellings, the log of
            their sum.
        no_logprob_S: the same of no. Where both are −∞ nothing is measured: NaN.
    """
    return (no_logprob_S.double() - yes_logprob_S.double()).sigmoid()


def _listed(id2label: Mapping[int, str]) -> str:
    return ", ".join(id2label.values())
