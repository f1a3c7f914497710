"""Everything `asa_dist.asa` computes, once more: slow loops in float64 numpy, written from the specification alone.

It shares no code with the package, so that the two agree only if both are right. Numbers in parentheses are equations
of the ASA-LLM paper. Shapes: N prompt tokens, T response tokens (end-of-text included), H hidden size, D embedding
size, M principles.

*Tokens* of a response are all T; its *content* is the tokens without the final end-of-text. A response without content
is empty: each of its rewards and signals is 0, and it takes part in no pair.

The records stand in reference_records, the rewards in reference_rewards, the mathematics below them in reference_parts;
here: trust, advantages, losses, and the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.asa.reference_parts import STD_FLOOR, binary_cross_entropy, mean, population_std, spearman, z_scores
from tests.asa.reference_records import (
    RefConfig,
    RefGroup,
    RefLosses,
    RefParams,
    RefResponse,
    RefResult,
    RefState,
    RefTables,
    RefTerms,
)
from tests.asa.reference_rewards import RefPair, content_of, group_terms, omega_of

__all__ = [
    "RefConfig",
    "RefGroup",
    "RefLosses",
    "RefParams",
    "RefResponse",
    "RefResult",
    "RefState",
    "RefTables",
    "RefTerms",
    "is_warming_up",
    "reference_step",
]


# --- trust and advantages --------------------------------------------------------------------------------------
def tau_of(earned: float, config: RefConfig) -> float:
    if config.trust == "always":
        return 1.0
    if config.trust == "never":
        return 0.0
    if config.trust == "earned":
        return earned
    raise ValueError(f"unknown trust {config.trust!r}")


def set_advantages(terms: list[RefTerms], state: RefState, config: RefConfig) -> None:
    tau = tau_of(state.tau, config)
    self_z, intrinsic_z = z_scores([t.self_reward for t in terms]), z_scores([t.intrinsic for t in terms])
    for i, term in enumerate(terms):
        term.used = tau * self_z[i] + (1 - tau) * intrinsic_z[i]
    used = [term.used for term in terms]
    for i, term in enumerate(terms):
        if config.advantage == "none":  # the paper's A = R: raw rewards, not z-scores
            term.advantage = tau * term.self_reward + (1 - tau) * term.intrinsic
        elif config.advantage == "group_mean":
            term.advantage = used[i] - mean(used)
        elif config.advantage == "group_norm":
            term.advantage = (used[i] - mean(used)) / max(population_std(used), STD_FLOOR)
        elif config.advantage == "leave_one_out":
            term.advantage = used[i] - mean(used[:i] + used[i + 1 :])
        else:
            raise ValueError(f"unknown advantage {config.advantage!r}")


def importance_weights(response: RefResponse, config: RefConfig) -> np.ndarray:
    log_ratios = [now - then for now, then in zip(response.tempered_logprob, response.behaviour_logprob, strict=True)]
    if config.importance == "token":
        return np.array([min(math.exp(ratio), config.importance_cap) for ratio in log_ratios])
    if config.importance == "sequence":
        return np.full(len(log_ratios), min(math.exp(sum(log_ratios)), config.importance_cap))
    if config.importance == "none":
        return np.ones(len(log_ratios))
    raise ValueError(f"unknown importance {config.importance!r}")


def trust_after(terms: list[list[RefTerms]], state: RefState, config: RefConfig) -> tuple[dict[int, float], float]:
    """(valid groups' correlations, ρ̄ after the step)"""
    correlations = {}
    for index, group in enumerate(terms):
        correlation = spearman([t.self_reward for t in group], [t.intrinsic for t in group])
        if correlation is not None:
            correlations[index] = correlation
    if not correlations:
        return {}, state.rho
    agreement = mean(list(correlations.values()))
    return correlations, config.trust_decay * state.rho + (1 - config.trust_decay) * agreement


def is_warming_up(rho_history: Sequence[float], config: RefConfig) -> bool:
    """Whether β is 0 in the step after those whose ρ̄ is given; once over, the warm-up stays over."""
    held = 0
    for rho in rho_history:
        held = held + 1 if rho >= config.warmup_rho else 0
        if held == config.warmup_hold_steps:
            return False
    return len(rho_history) < config.max_warmup_steps


# --- losses (1) – (4), (11) ------------------------------------------------------------------------------------
def psi_loss(groups: list[RefGroup], terms: list[list[RefTerms]]) -> float:
    """(3) for the generator"""
    total, num_tokens = 0.0, 0
    for group, group_of_terms in zip(groups, terms, strict=True):
        for response, term in zip(group.responses, group_of_terms, strict=True):
            for weight, logprob in zip(term.importance, response.logprob, strict=True):
                total -= term.advantage * weight * logprob
                num_tokens += 1
    return total / num_tokens if num_tokens else 0.0


def phi_loss(groups: list[RefGroup], terms: list[list[RefTerms]], config: RefConfig) -> float:
    """(3) for the evaluator"""
    products = []
    for group, group_of_terms in zip(groups, terms, strict=True):
        group_mean = mean([mean(r.logprob) for r in group.responses if r.token_ids])
        for response, term in zip(group.responses, group_of_terms, strict=True):
            if config.phi_self_align == "centred":
                log_likelihood = mean(response.logprob) - group_mean if response.token_ids else 0.0
            elif config.phi_self_align == "paper":
                log_likelihood = sum(response.logprob)
            elif config.phi_self_align == "off":
                log_likelihood = 0.0
            else:
                raise ValueError(f"unknown phi_self_align {config.phi_self_align!r}")
            products.append(-term.self_reward * log_likelihood)
    return mean(products)


def meta_loss(terms: list[list[RefTerms]], config: RefConfig) -> float:
    """(4), (11)"""
    squares = []
    for group in terms:
        distances = [term.self_reward - term.intrinsic for term in group]
        if config.meta_loss == "centred":
            distances = [distance - mean(distances) for distance in distances]
        elif config.meta_loss != "paper":
            raise ValueError(f"unknown meta_loss {config.meta_loss!r}")
        squares += [distance**2 for distance in distances]
    return mean(squares)


def principle_loss(terms: list[RefTerms], contents: list[list[int]], config: RefConfig) -> float:
    present = [term for term, content in zip(terms, contents, strict=True) if content]
    return sum(mean([(t.behaviour_scores[name] - t.signals[name]) ** 2 for t in present]) for name in config.principles)


def reference_step(
    groups: list[RefGroup],
    params: RefParams,
    state: RefState,
    config: RefConfig,
    tables: RefTables,
    corpus_logprobs: Sequence[float],
) -> RefResult:
    """One step over the global batch. ``corpus_logprobs``: today's log-probability of each corpus target token."""
    terms: list[list[RefTerms]] = []
    pairs: list[RefPair] = []
    for group in groups:
        terms_of_group, pairs_of_group = group_terms(group, params, state, config, tables)
        set_advantages(terms_of_group, state, config)
        for response, term in zip(group.responses, terms_of_group, strict=True):
            term.importance = importance_weights(response, config)
        terms.append(terms_of_group)
        pairs.extend(pairs_of_group)
    every_term = [term for group_of_terms in terms for term in group_of_terms]
    every_content = [content_of(response, tables) for group in groups for response in group.responses]

    losses = RefLosses(
        mle=-mean(corpus_logprobs),
        self_align_psi=psi_loss(groups, terms),
        self_align_phi=phi_loss(groups, terms, config),
        meta=meta_loss(terms, config),
        embedding=mean([(pair.cosine - pair.f1) ** 2 for pair in pairs]),
        indicator=mean([binary_cross_entropy(pair.indicator_logit, pair.f1) for pair in pairs]),
        principles=principle_loss(every_term, every_content, config),
        total=0.0,
    )
    beta = 0.0 if state.warming_up else config.beta
    losses.total = (
        config.alpha * losses.mle
        + beta * (losses.self_align_psi + losses.self_align_phi)
        + config.gamma * losses.meta
        + config.embedding_loss_weight * losses.embedding
        + config.indicator_loss_weight * losses.indicator
        + config.principle_loss_weight * losses.principles
    )
    correlations, rho = trust_after(terms, state, config)
    return RefResult(
        terms,
        omega_of(params, state, config),
        correlations,
        rho,
        tau=tau_of(min(max(rho, 0.0), 1.0), config),
        token_share=np.array([mean([v in content for content in every_content]) for v in range(tables.vocab_size)]),
        losses=losses,
    )
