"""What the kernels benchmark calls: each operation with its inputs, its naive form, its sizes and its arithmetic.

An operation is added here with functions that make inputs, one naive formulation and one entry in ``OPS``.

Shapes: P prompts, G responses per prompt, D embedding size, N packed tokens, H hidden size, S segments, V vocabulary,
T tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernels_problem import Call, Op, Outputs, Problem, Promise, Random, Sizes, far_apart
from torch import Tensor

from asa_kernels import (
    group_consistency,
    group_consistency_reference,
    segment_mean_reference,
    segment_means,
    token_f1,
    token_f1_reference,
    token_logprob,
    token_logprob_reference,
)
from asa_kernels.token_logprob import IGNORED


# --- group_consistency --------------------------------------------------------------------------------------------
def make_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    P, G, D = sizes["P"], sizes["G"], sizes["D"]
    random = Random(dtype, device)
    inputs = (random.input(P, G, D), *(random.input(D, scale=D**-0.5) for _ in range(2)), random.input())
    return Problem(inputs, inputs, random.gradients((P, G), (P, G, G), (P, G, G)))


def naive_group_consistency(embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor) -> Outputs:
    """The indicator on concatenated pairs, as the equation is written: [P, G, G, 2D]."""
    P, G, D = embedding_PGD.shape
    left_PGGD = embedding_PGD.unsqueeze(2).expand(P, G, G, D)
    right_PGGD = embedding_PGD.unsqueeze(1).expand(P, G, G, D)
    cosine_PGG = F.cosine_similarity(left_PGGD, right_PGGD, dim=-1)
    pair_PGG2D = torch.cat([left_PGGD, right_PGGD], dim=-1)
    indicator_PGG = torch.sigmoid(pair_PGG2D @ torch.cat([w_left_D, w_right_D]) + bias)
    sibling_GG = ~torch.eye(G, dtype=torch.bool, device=embedding_PGD.device)
    consistency_PG = (cosine_PGG * indicator_PGG * sibling_GG).sum(dim=-1) / (G - 1)
    return consistency_PG, cosine_PGG, indicator_PGG


def make_masked_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """As the trainer calls it: some responses, and a whole prompt, are invalid; NaN there must stay there."""
    problem = make_group_consistency(sizes, dtype, device)
    embedding_PGD = problem.arguments[0]
    valid_PG = torch.ones(embedding_PGD.shape[:2], dtype=torch.bool, device=device)
    valid_PG[0, 0] = valid_PG[-1] = False
    embedding_PGD.detach()[~valid_PG] = torch.nan
    return replace(problem, arguments=(*problem.arguments, valid_PG))


def make_frozen_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """As the trainer calls it if states are the embeddings: those have no gradient."""
    problem = make_masked_group_consistency(sizes, dtype, device)
    problem.arguments[0].requires_grad_(False)
    return replace(problem, differentiable=problem.differentiable[1:])


def make_extreme_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """Tiny responses, huge ones, and some that grow along D: squares overflow and vanish."""
    problem = make_group_consistency(sizes, dtype, device)
    embedding_PGD = problem.arguments[0].detach()
    largest = 8 if dtype == torch.float16 else 60
    embedding_PGD[:, 0::3] *= 2.0**-largest
    embedding_PGD[:, 1::3] *= 2.0**largest
    embedding_PGD[:, 2::3] *= torch.linspace(-largest, largest, sizes["D"], device=device).round().exp2()
    return problem


def make_far_group_consistency(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    problem = make_group_consistency(sizes, dtype, device)
    inputs = (far_apart(problem.arguments[0]), *problem.arguments[1:])
    return replace(problem, arguments=inputs, differentiable=inputs)


def consistency_and_cosine_reference(*arguments: Tensor) -> Outputs:
    return group_consistency_reference(*arguments)[:2]


with_indicator = partial(group_consistency, return_indicator=True)


def group_consistency_operations(sizes: Sizes) -> tuple[int, int]:
    gram = 2 * sizes["P"] * sizes["G"] ** 2 * sizes["D"]
    two_products = 4 * sizes["P"] * sizes["G"] * sizes["D"]
    return gram + two_products, gram + 2 * two_products  # backward: M · E; both weights, and their share of E


# --- segment_means ------------------------------------------------------------------------------------------------
def make_segment_means(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """Responses of about equal length, each cut into claims with gaps between them."""
    N, H, num_responses, num_claims = sizes["N"], sizes["H"], sizes["responses"], sizes["claims"]
    random = Random(dtype, device)
    position_N = torch.arange(N)
    response_N = position_N * num_responses // N
    claim_N = torch.where(position_N % 16 == 0, -1, position_N * num_claims // N)
    segmentations = [(claim_N.to(device), num_claims), (response_N.to(device), num_responses)]
    hidden_NH = random.input(N, H)
    arriving = random.gradients((num_claims, H), (num_responses, H))
    return Problem((hidden_NH, segmentations), (hidden_NH,), arriving, linear_in=(hidden_NH,))


def make_one_segment_mean(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """Claims alone; the states of tokens in none of them hold NaN."""
    problem = make_segment_means(sizes, dtype, device)
    hidden_NH, (claims, _) = problem.arguments
    hidden_NH.detach()[claims[0] == -1] = torch.nan
    return replace(problem, arguments=(hidden_NH, [claims]), output_gradients=problem.output_gradients[:1])


def make_far_segment_means(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """Responses in turns, eight tokens each: ids in no order."""
    problem = make_segment_means(sizes, dtype, device)
    hidden_NH, (claims, (response_N, num_responses)) = problem.arguments
    hidden_NH = far_apart(hidden_NH)
    mixed_N = torch.arange(len(response_N), device=device) // 8 % num_responses
    return replace(problem, arguments=(hidden_NH, [claims, (mixed_N, num_responses)]), differentiable=(hidden_NH,))


def naive_segment_means(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> Outputs:
    """A membership matrix [S, N] for each segmentation."""
    pooled = []
    for segment_ids_N, num_segments in segmentations:
        segment_S1 = torch.arange(num_segments, device=hidden_NH.device).unsqueeze(1)
        member_SN = (segment_ids_N == segment_S1).to(hidden_NH.dtype)
        pooled.append(member_SN @ hidden_NH / member_SN.sum(dim=1, keepdim=True).clamp(min=1))
    return tuple(pooled)


def segment_means_reference(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> Outputs:
    return tuple(segment_mean_reference(hidden_NH, *segmentation) for segmentation in segmentations)


# --- token_logprob ------------------------------------------------------------------------------------------------
def make_token_logprob(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    N, H, V = sizes["N"], sizes["H"], sizes["V"]
    random = Random(dtype, device)
    inputs = (random.input(N, H), random.input(V, H, scale=H**-0.5))
    return Problem((*inputs, random.integers(0, V, N)), inputs, random.gradients((N,), (N,)))


def naive_token_logprob(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Outputs:
    """All logits, their log-softmax, and the entropy from both."""
    logprob_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), dim=-1)
    chosen_N = logprob_NV.gather(1, target_N.unsqueeze(1)).squeeze(1)
    return chosen_N, -(logprob_NV.exp() * logprob_NV).sum(dim=-1)


def make_tempered_token_logprob(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    """At a temperature; some tokens are ignored."""
    problem = make_token_logprob(sizes, dtype, device)
    problem.arguments[2][::7] = IGNORED
    return replace(problem, arguments=(*problem.arguments, 0.7))


def token_logprob_alone(*arguments: Any, **options: Any) -> Outputs:
    """In many chunks; the entropy has no gradient."""
    return token_logprob(*arguments, chunk_tokens=24, **options)[:1]


def token_logprob_alone_reference(*arguments: Any) -> Outputs:
    return token_logprob_reference(*arguments)[:1]


def token_logprob_operations(sizes: Sizes) -> tuple[int, int]:
    product = 2 * sizes["N"] * sizes["H"] * sizes["V"]
    return product, 3 * product  # backward: the logits again, two gradients


# --- token_f1 -----------------------------------------------------------------------------------------------------
def make_token_f1(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    P, G, T, V = sizes["P"], sizes["G"], sizes["T"], sizes["V"]
    random = Random(dtype, device)
    tokens_PGT = random.integers(0, V, P, G, T) * random.integers(0, 2, P, G, T)  # half of them token 0: repetitions
    weight_V = torch.linspace(0.5, 1.5, V, device=device, dtype=dtype)
    lengths_PG = random.integers(T // 2, T + 1, P, G)
    return Problem((tokens_PGT, lengths_PG, weight_V), (), random.gradients((P, G, G)))


def make_plain_token_f1(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    problem = make_token_f1(sizes, dtype, device)
    return replace(problem, arguments=problem.arguments[:2])


def make_far_token_f1(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
    problem = make_token_f1(sizes, dtype, device)
    tokens_PGT, *others = problem.arguments
    return replace(problem, arguments=(far_apart(tokens_PGT.short()), *others))


def token_f1_alone(*arguments: Tensor, **options: Any) -> Outputs:
    return (token_f1(*arguments, **options),)


def token_f1_alone_reference(*arguments: Tensor) -> Outputs:
    return (token_f1_reference(*arguments),)


def naive_token_f1(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor) -> Outputs:
    """Counts over the vocabulary, and their minimum for every pair: [P, G, G, V]."""
    P, G, T = tokens_PGT.shape
    inside_PGT = torch.arange(T, device=tokens_PGT.device) < lengths_PG.unsqueeze(-1)
    count_PGV = weight_V.new_zeros(P, G, weight_V.shape[0]).scatter_add(2, tokens_PGT, inside_PGT.to(weight_V.dtype))
    shared_PGGV = torch.minimum(count_PGV.unsqueeze(2), count_PGV.unsqueeze(1))
    total_PG = count_PGV @ weight_V
    total_PGG = total_PG.unsqueeze(2) + total_PG.unsqueeze(1)
    return (2 * (shared_PGGV @ weight_V) / total_PGG.clamp(min=1e-9),)


OPS = {
    op.name: op
    for op in (
        Op(
            "group_consistency",
            (Call(make_group_consistency, with_indicator, group_consistency_reference),
             Call(make_group_consistency, group_consistency, consistency_and_cosine_reference),
             Call(make_masked_group_consistency, with_indicator, group_consistency_reference),
             Call(make_frozen_group_consistency, with_indicator, group_consistency_reference)),
            naive_group_consistency, group_consistency_operations,
            compile_sizes=tuple({"P": 8, "G": G, "D": D} for G, D in (
                (64, 4096), (32, 1024), (16, 1024), (8, 1024), (4, 1024), (2, 1024), (7, 501))),
            traffic_sizes={"P": 32, "G": 8, "D": 1024},
            check_sizes=tuple({"P": P, "G": G, "D": D} for P, G, D in (
                (3, 7, 63), (9, 8, 1024), (5, 2, 501), (5, 4, 256), (3, 16, 500), (3, 32, 256), (2, 64, 500))),
            cpu_sizes={"P": 256, "G": 8, "D": 1024}, short_sizes={"P": 8, "G": 8, "D": 256},
            gpu_sizes={"P": 256, "G": 8, "D": 4096},
            hard_calls=(Call(make_extreme_group_consistency, with_indicator, group_consistency_reference),
                        Call(make_far_group_consistency, with_indicator, group_consistency_reference)),
            promise=Promise(time_at_most=1 / 5, memory_at_most=1 / 4),
        ),
        Op(
            "segment_mean",
            (Call(make_segment_means, segment_means, segment_means_reference),
             Call(make_one_segment_mean, segment_means, segment_means_reference)),
            naive_segment_means, lambda sizes: (2 * sizes["N"] * sizes["H"],) * 2,
            compile_sizes=tuple({"N": 512, "H": H, "responses": 8, "claims": 24} for H in (1024, 4096, 501)),
            traffic_sizes={"N": 1024, "H": 512, "responses": 8, "claims": 32},
            check_sizes=({"N": 501, "H": 63, "responses": 7, "claims": 33},
                         {"N": 2048, "H": 1024, "responses": 16, "claims": 64}),
            cpu_sizes={"N": 8192, "H": 1024, "responses": 64, "claims": 256},
            short_sizes={"N": 512, "H": 128, "responses": 4, "claims": 16},
            gpu_sizes={"N": 16384, "H": 4096, "responses": 128, "claims": 512},
            hard_calls=(Call(make_far_segment_means, segment_means, segment_means_reference),),
        ),
        Op(
            "token_logprob",
            (Call(make_token_logprob, token_logprob, token_logprob_reference),
             Call(make_tempered_token_logprob, token_logprob_alone, token_logprob_alone_reference)),
            naive_token_logprob, token_logprob_operations,
            compile_sizes=({"N": 64, "H": 64, "V": 32000}, {"N": 63, "H": 63, "V": 1003}),
            traffic_sizes={"N": 256, "H": 64, "V": 512}, traffic_options={"chunk_tokens": 16},
            check_sizes=({"N": 63, "H": 65, "V": 1003}, {"N": 501, "H": 256, "V": 4096}),
            cpu_sizes={"N": 4096, "H": 512, "V": 32000}, short_sizes={"N": 256, "H": 64, "V": 1000},
            gpu_sizes={"N": 16384, "H": 4096, "V": 32768}, promise=Promise(time_at_most=1.4, memory_at_most=1 / 4),
        ),
        Op(
            "token_f1",
            (Call(make_token_f1, token_f1_alone, token_f1_alone_reference),
             Call(make_plain_token_f1, token_f1_alone, token_f1_alone_reference)),
            naive_token_f1, lambda sizes: (0, 0),  # each way to count has its own arithmetic; none is a bound
            compile_sizes=({"P": 4, "G": 8, "T": 128, "V": 32000}, {"P": 3, "G": 5, "T": 501, "V": 1003}),
            traffic_sizes={"P": 2, "G": 8, "T": 128, "V": 256},
            check_sizes=({"P": 3, "G": 5, "T": 63, "V": 40}, {"P": 2, "G": 8, "T": 500, "V": 1003}),
            cpu_sizes={"P": 32, "G": 8, "T": 128, "V": 32000}, short_sizes={"P": 2, "G": 4, "T": 32, "V": 100},
            gpu_sizes={"P": 256, "G": 8, "T": 128, "V": 32768},
            hard_calls=(Call(make_far_token_f1, token_f1_alone, token_f1_alone_reference),), dtypes=(torch.float32,),
        ),
    )
}
