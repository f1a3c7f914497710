"""Weighted token F1 between all responses of a group: how much two texts share, counted as multisets.

    overlap_ij = Σ_v w_v · min(count_i(v), count_j(v)),   so overlap_ii = Σ_v w_v · count_i(v)
    f1_ij      = 2 · overlap_ij / (overlap_ii + overlap_jj),   0 if either side is empty

Numbering the repetitions of a token (its first occurrence in a response is 0, the next 1, …) turns the multisets into
sets of (token, repetition), and the overlap into the size of an intersection. With r_it, how many tokens equal to a_it
stand before it in its own response:

    overlap_ij = Σ_t w(a_it) · [r_it < count_j(a_it)]

PyTorch numbers by sorting, and intersects by one matrix product of 0/1 membership rows. The kernel sorts nothing: it
makes P·G²·T²/2 comparisons, of tokens in registers with tokens in cache. It reads 8·P·G·T bytes of tokens (int64)
and 4·P·G·T of weights, and keeps 4·P·G²·B of the blocks' sums; checking the ids first reads the tokens once more.

Shapes: P prompts, G responses per prompt, T tokens of the longest response, U distinct (token, repetition) of a group,
V vocabulary; a kernel's program has N tokens of one response, B such blocks cover T.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from asa_kernels.backend import Backend, jit, tl, triton, uses_triton

_MAX_IDS = 2**31  # the kernel compares 32 bits
_BLOCKS = {"BLOCK_N": 128, "num_warps": 1}  # one warp: no shared memory, no barrier; 4 tokens a thread (gfx942: 2)


def token_f1_reference(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor | None = None) -> Tensor:
    """The formula, pair by pair; float64 on the CPU."""

    def weigh(counts: Counter[int]) -> float:
        return sum(count * (1.0 if weight_V is None else float(weight_V[token])) for token, count in counts.items())

    f1_PGG = torch.zeros(*lengths_PG.shape, lengths_PG.shape[1], dtype=torch.float64)
    for p, (tokens_GT, lengths_G) in enumerate(zip(tokens_PGT.tolist(), lengths_PG.tolist(), strict=True)):
        counts = [Counter(tokens_T[:length]) for tokens_T, length in zip(tokens_GT, lengths_G, strict=True)]
        for i, left in enumerate(counts):
            for j, right in enumerate(counts):
                if left and right:
                    f1_PGG[p, i, j] = 2 * weigh(left & right) / (weigh(left) + weigh(right))
    return f1_PGG


def _number_repetitions(tokens_PGT: Tensor, inside_PGT: Tensor) -> Tensor:
    """A key for each (token, repetition), sorted within the response; padding comes last, with the largest int64."""
    num_tokens = tokens_PGT.shape[-1]
    padding = torch.iinfo(torch.int64).max
    sorted_PGT = tokens_PGT.long().masked_fill(~inside_PGT, padding).sort(dim=-1).values
    first_of_run_PGT = torch.searchsorted(sorted_PGT, sorted_PGT)
    repetition_PGT = torch.arange(num_tokens, device=tokens_PGT.device) - first_of_run_PGT
    return (sorted_PGT * num_tokens + repetition_PGT).masked_fill(~inside_PGT, padding)


def _overlap_torch(tokens_PGT: Tensor, inside_PGT: Tensor, weight_V: Tensor | None) -> Tensor:
    num_prompts, num_responses, num_tokens = tokens_PGT.shape
    key_PGT = _number_repetitions(tokens_PGT, inside_PGT)  # inside_PGT fits sorted rows too: padding sorts last
    key_PK, order_PK = key_PGT.flatten(1).sort(dim=-1)  # K = G·T
    is_new_PK = torch.zeros_like(key_PK)
    is_new_PK[:, 1:] = key_PK[:, 1:] != key_PK[:, :-1]
    dense_PK = is_new_PK.cumsum(dim=-1)  # numbers the distinct keys of a group 0, 1, …
    index_PGT = torch.empty_like(dense_PK).scatter_(1, order_PK, dense_PK).view_as(tokens_PGT)
    num_distinct = int(index_PGT.max()) + 1

    member_PGU = torch.zeros(num_prompts, num_responses, num_distinct, device=tokens_PGT.device)
    member_PGU.scatter_(2, index_PGT, inside_PGT.float())
    if weight_V is None:
        return member_PGU @ member_PGU.mT
    sorted_PGT = (key_PGT // num_tokens).masked_fill(~inside_PGT, 0)
    weight_PGT = weight_V[sorted_PGT].float() * inside_PGT
    return torch.zeros_like(member_PGU).scatter_(2, index_PGT, weight_PGT) @ member_PGU.mT


@jit
def _overlap_kernel(
    token_ptr_PGT: tl.tensor,
    length_ptr_PG: tl.tensor,
    weight_ptr_V: tl.tensor,  # None: every token counts 1
    overlap_ptr_PGGB: tl.tensor,
    num_responses: int,
    token_stride_p: int,
    token_stride_g: int,
    token_stride_t: int,
    length_stride_p: int,
    length_stride_g: int,
    weight_stride_v: int,
    BLOCK_N: tl.constexpr,
) -> None:
    """What one block of response i's tokens adds to its overlap with itself and with every later sibling."""
    row = tl.program_id(0).to(tl.int64)
    prompt, i = row // num_responses, row % num_responses
    start = tl.program_id(1) * BLOCK_N
    length_ptr_G = length_ptr_PG + prompt * length_stride_p
    token_ptr_GT = token_ptr_PGT + prompt * token_stride_p
    token_ptr_T = token_ptr_GT + i * token_stride_g

    length = tl.load(length_ptr_G + i * length_stride_g).to(tl.int32)
    position_N = start + tl.arange(0, BLOCK_N)
    inside_N = position_N < length
    token_N = tl.load(token_ptr_T + position_N.to(tl.int64) * token_stride_t, mask=inside_N, other=0).to(tl.int32)
    weight_N = inside_N.to(tl.float32)
    if weight_ptr_V is not None:
        weight_N = tl.load(weight_ptr_V + token_N.to(tl.int64) * weight_stride_v, mask=inside_N, other=0).to(tl.float32)

    # The block's tokens stay in registers; those they are compared with come one by one, eight loads at a time.
    repetition_N = tl.zeros([BLOCK_N], tl.int32)
    for position in tl.range(0, tl.minimum(start + BLOCK_N, length), loop_unroll_factor=8):
        is_equal_N = token_N == tl.load(token_ptr_T).to(tl.int32)
        repetition_N += (is_equal_N & (position < position_N)).to(tl.int32)
        token_ptr_T += token_stride_t

    overlap_ptr_GB = overlap_ptr_PGGB + row * num_responses * tl.num_programs(1) + tl.program_id(1)
    tl.store(overlap_ptr_GB + i * tl.num_programs(1), tl.sum(weight_N))
    for distance in range(1, num_responses - i):
        j = i + distance  # int64
        # A block behind the end of its response has nothing to compare; it adds 0.
        sibling_length = tl.load(length_ptr_G + j * length_stride_g, mask=start < length, other=0).to(tl.int32)
        sibling_ptr_T = token_ptr_GT + j * token_stride_g
        count_N = tl.zeros([BLOCK_N], tl.int32)
        for _ in tl.range(0, sibling_length, loop_unroll_factor=8):
            count_N += (token_N == tl.load(sibling_ptr_T).to(tl.int32)).to(tl.int32)
            sibling_ptr_T += token_stride_t
        tl.store(overlap_ptr_GB + j * tl.num_programs(1), tl.sum(tl.where(repetition_N < count_N, weight_N, 0.0)))


def _overlap_triton(tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor | None) -> Tensor:
    num_prompts, num_responses, num_tokens = tokens_PGT.shape
    num_blocks = triton.cdiv(num_tokens, _BLOCKS["BLOCK_N"])
    overlap_PGGB = torch.empty(num_prompts, num_responses, num_responses, num_blocks, device=tokens_PGT.device)
    with torch.cuda.device_of(tokens_PGT):
        _overlap_kernel[num_prompts * num_responses, num_blocks](
            tokens_PGT,
            lengths_PG,
            weight_V,
            overlap_PGGB,
            num_responses,
            *tokens_PGT.stride(),
            *lengths_PG.stride(),
            0 if weight_V is None else weight_V.stride(0),
            **_BLOCKS,
        )
    overlap_PGG = overlap_PGGB.sum(dim=-1)  # siblings before i are not written: they mirror those behind it
    return overlap_PGG.triu() + overlap_PGG.triu(1).mT


def _require_range(name: str, values: Tensor, largest: int) -> None:
    if values.numel() == 0:
        return
    message = f"token_f1: {name} must lie in 0 … {largest}"
    low, high = torch.stack(values.aminmax()).long()
    fits = (low >= 0) & (high <= largest)
    if values.is_cuda:
        torch._assert_async(fits, message)  # raising would mean waiting for the GPU
    elif not fits:
        raise ValueError(f"{message}, got {int(low)} … {int(high)}")


@torch.no_grad()
def token_f1(
    tokens_PGT: Tensor, lengths_PG: Tensor, weight_V: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Weighted multiset token F1 of every pair of siblings.

    Beside some int64 tensors of P·G·T, PyTorch takes 8·P·G·U bytes for the membership rows (U ≤ G·T; about the group's
    vocabulary, as few tokens repeat), kernels P·G²·T/32.

    Args:
        tokens_PGT: integer token ids, 0 … V − 1, without weights 0 … 2³¹ − 1; what stands beyond a response's length is
            never looked at.
        lengths_PG: integer number of tokens of each response, 0 … T.
        weight_V: float, > 0: what one occurrence of each token counts. None: 1 each, the plain F1.
        backend: "auto" takes kernels for tensors on a GPU, PyTorch elsewhere. PyTorch on a GPU waits for it once.

    Returns:
        ``f1_PGG``, float32, symmetric, without gradient; the diagonal is 1 for a non-empty response, else 0.

    Raises:
        ValueError: a length outside 0 … T or an id outside 0 … V − 1 (on a GPU a device-side assertion); shapes that do
            not fit; no such backend.
        RuntimeError: "triton" where it cannot run.
    """
    num_prompts, num_responses, num_tokens = tokens_PGT.shape
    if lengths_PG.shape != (num_prompts, num_responses):
        raise ValueError(f"token_f1: lengths_PG {list(lengths_PG.shape)} of tokens_PGT {list(tokens_PGT.shape)}")
    on_triton = uses_triton(backend, tokens_PGT)
    _require_range("lengths_PG", lengths_PG, num_tokens)
    if tokens_PGT.numel() == 0:
        return torch.zeros(num_prompts, num_responses, num_responses, device=tokens_PGT.device)
    inside_PGT = torch.arange(num_tokens, device=tokens_PGT.device) < lengths_PG.unsqueeze(-1)
    num_ids = _MAX_IDS if weight_V is None else min(len(weight_V), _MAX_IDS)
    _require_range("ids in tokens_PGT", torch.where(inside_PGT, tokens_PGT, 0), num_ids - 1)

    if on_triton:
        overlap_PGG = _overlap_triton(tokens_PGT, lengths_PG, weight_V)
    else:
        overlap_PGG = _overlap_torch(tokens_PGT, inside_PGT, weight_V)
    total_PG = overlap_PGG.diagonal(dim1=1, dim2=2)
    total_PGG = total_PG.unsqueeze(-1) + total_PG.unsqueeze(-2)
    return 2 * overlap_PGG / total_PGG.masked_fill(total_PGG == 0, 1)
