"""Rewards of one group, equations (5) to (10) and (12), response by response and pair by pair."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from tests.asa.reference_parts import (
    claims_of,
    completeness,
    cosine,
    mean,
    non_repetition,
    sigmoid,
    softmax,
    token_f1,
    token_weights,
)
from tests.asa.reference_records import RefConfig, RefGroup, RefParams, RefResponse, RefState, RefTables, RefTerms


def content_of(response: RefResponse, tables: RefTables) -> list[int]:
    ends_with_eos = bool(response.token_ids) and response.token_ids[-1] == tables.eos_id
    if response.finished != ends_with_eos:
        raise ValueError(f"finished is {response.finished}, but the tokens are {response.token_ids}")
    return response.token_ids[:-1] if response.finished else response.token_ids


def pooled(states_TH: np.ndarray) -> np.ndarray:
    return np.array([mean(column) for column in states_TH.T])


def embedding_of(response: RefResponse, params: RefParams, state: RefState, config: RefConfig) -> np.ndarray:
    if config.embedding == "raw":
        return pooled(response.final)
    return params.projection_DH @ (pooled(response.middle) - state.center_H)


def fact_score(
    response: RefResponse, claims: list[tuple[int, int]], params: RefParams, state: RefState, config: RefConfig
) -> float:
    """(8)"""
    scores = []
    for first, end in claims:
        if config.embedding == "raw":
            claim_H = pooled(response.final[first:end])
        else:
            claim_H = pooled(response.middle[first:end]) - state.center_H
        scores.append(sigmoid(float(params.verify_H @ claim_H) + params.verify_bias))
    return mean(scores)


def claim_coherence(response: RefResponse, claims: list[tuple[int, int]], state: RefState) -> float | None:
    """Mean cosine of neighbouring claims; None with fewer than two."""
    claims_H = [pooled(response.middle[first:end]) - state.center_H for first, end in claims]
    return mean([cosine(a, b) for a, b in itertools.pairwise(claims_H)]) if len(claims) > 1 else None


def weights_of(state: RefState, config: RefConfig, tables: RefTables) -> np.ndarray:
    """What each token counts in this step, [V]: from the responses of the steps before."""
    if config.token_weights == "uniform":
        return np.ones(tables.vocab_size)
    if config.token_weights == "informative":
        return token_weights(state.share_history, config.token_share_decay, tables.vocab_size)
    raise ValueError(f"unknown token_weights {config.token_weights!r}")


def vote_of(response: RefResponse, content: list[int], weight_V: np.ndarray, sharpness: float) -> float:
    """What a response's word counts when its siblings are judged; end-of-text says nothing."""
    if not content:
        return 0.0
    surety, total = 0.0, 1.0  # one token more, of probability 1
    for token, logprob in zip(content, response.logprob, strict=False):
        surety += float(weight_V[token]) * float(logprob)
        total += float(weight_V[token])
    return math.exp(sharpness * surety / total)


def prompt_of(group: RefGroup, sibling: int) -> np.ndarray:
    """States of the phrasing that a sibling answers: they take turns."""
    phrasings = [group.prompt_middle, *group.variants_middle]
    return phrasings[sibling % len(phrasings)]


def weighted_intrinsic(term: RefTerms, weights: dict[str, float]) -> float:
    """(12), with weights"""
    values = {
        "self_consistency": term.self_consistency,
        "coherence": term.coherence,
        "quality": term.quality,
        "certainty": term.certainty,
    }
    return sum(weights[name] * value for name, value in values.items()) / sum(weights[name] for name in values)


def signals_of(
    response: RefResponse, prompt_middle: np.ndarray, state: RefState, config: RefConfig, tables: RefTables
) -> dict[str, float]:
    content = content_of(response, tables)
    prompt_H, response_H = pooled(prompt_middle) - state.center_H, pooled(response.middle) - state.center_H
    signals = {
        "relevance": max(0.0, cosine(prompt_H, response_H)),
        "non_repetition": non_repetition(content),
        "completeness": completeness(content, response.finished, tables.sentence_end, tables.blank),
        "fluency": math.exp(mean(response.logprob)),
    }
    return {name: signals[name] for name in config.principles}


def omega_of(params: RefParams, state: RefState, config: RefConfig) -> np.ndarray:
    """(10): the weights of R_logic, R_fact, R_behav."""
    features = np.array([math.log(1 + state.step), *state.mean_reward_3, state.mean_meta])
    weights = softmax(params.meta_weight_3x5 @ features + params.meta_bias_3)
    return config.omega_floor + (1 - 3 * config.omega_floor) * weights


@dataclass
class RefPair:
    """Ordered siblings (i, j), i ≠ j, both with content."""

    cosine: float
    indicator_logit: float
    f1: float


def group_terms(
    group: RefGroup, params: RefParams, state: RefState, config: RefConfig, tables: RefTables
) -> tuple[list[RefTerms], list[RefPair]]:
    """All rewards of one group; the fields that need the whole group's R_self are still 0."""
    contents = [content_of(response, tables) for response in group.responses]
    present = [i for i, content in enumerate(contents) if content]
    num_siblings = len(group.responses) - 1
    weight_V = weights_of(state, config, tables)
    votes = [
        vote_of(response, content, weight_V, config.vote_sharpness)
        for response, content in zip(group.responses, contents, strict=True)
    ]
    omega = omega_of(params, state, config)
    terms = [
        RefTerms(behaviour_scores=dict.fromkeys(config.principles, 0.0), signals=dict.fromkeys(config.principles, 0.0))
        for _ in group.responses
    ]

    embeddings = {i: embedding_of(group.responses[i], params, state, config) for i in present}
    pairs: list[RefPair] = []
    for i in present:
        others = sum(votes[:i]) + sum(votes[i + 1 :])
        for j in present:
            if i == j:
                continue
            logit = float(params.w_left_D @ embeddings[i] + params.w_right_D @ embeddings[j]) + params.bias
            pair = RefPair(cosine(embeddings[i], embeddings[j]), logit, token_f1(contents[i], contents[j], weight_V))
            pairs.append(pair)
            terms[i].logic += pair.cosine * sigmoid(pair.indicator_logit) / num_siblings
            terms[i].self_consistency += pair.f1 * votes[j] / others

    claims = {i: claims_of(contents[i], tables.claim_end) for i in present}
    coherences = {i: claim_coherence(group.responses[i], claims[i], state) for i in present}
    known = [value for value in coherences.values() if value is not None]
    group_coherence = mean(known) if known else 0.5
    principle_weights = softmax(params.principle_logit_M)
    for i in present:
        response, term = group.responses[i], terms[i]
        term.fact_score = fact_score(response, claims[i], params, state, config)
        term.uncertainty = mean(response.entropy) / math.log(tables.vocab_size)
        term.fact = term.fact_score - config.uncertainty_weight * term.uncertainty
        for m, name in enumerate(config.principles):
            logit = float(params.principle_MD[m] @ embeddings[i]) + params.principle_bias_M[m]
            term.behaviour_scores[name] = sigmoid(logit)
            term.behav += principle_weights[m] * sigmoid(logit)
        said = sum(float(weight_V[token]) for token in contents[i])
        term.substance = said / (said + config.substance)
        term.self_reward = omega[0] * term.logic + omega[1] * term.fact + omega[2] * term.behav
        term.self_reward *= term.substance

        coherence = coherences[i]
        term.coherence = group_coherence if coherence is None else coherence
        term.signals = signals_of(response, prompt_of(group, i), state, config, tables)
        term.quality = mean(list(term.signals.values()))
        term.certainty = 1 + max(mean(response.logprob), -2.0)
        term.intrinsic = term.substance * weighted_intrinsic(term, config.intrinsic)
    return terms, pairs
