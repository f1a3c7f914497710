"""How far the responses of a group agree with each other: equations (5) and (6) of the ASA-LLM paper.

    cos_ij        = e_i · e_j / (|e_i| |e_j|), 0 if either vector is zero
    indicator_ij  = σ(W · [e_i; e_j] + b) = σ(w_left · e_i + w_right · e_j + b)
    consistency_i = 1/(G − 1) · Σ_{j≠i} cos_ij · indicator_ij

The indicator's weight on a concatenation splits into two dot products per response, so its [P, G, G, 2D] input
never exists. An invalid response counts as a zero vector: whatever its row holds (NaN too), its cosines are 0, it
adds nothing to its siblings' sums, and its own gradient is 0. What arrives at its pairs must be finite: 0 · ∞ = NaN
would reach its siblings and the weights.

Bytes, beside a few [P, G, G] in float32: forward reads the embedding once; backward reads it once and writes its
gradient once, and writes and reads again two float32 rows of length D for every chunk of prompts.

Shapes: P prompts, G responses per prompt, D embedding size, C chunks of prompts; inside kernels G and D are padded to
GROUP and BLOCK_D. d_x is the loss's gradient by x.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asa_kernels.backend import INTERPRETED, Backend, jit, tl, triton, uses_triton

MAX_KERNEL_GROUP = 64  # a program holds all pairs of a group
_MIN_PROMPTS_PER_CHUNK = 4  # fewer, and the partial sums of d_w would weigh too much beside the embedding
_MAX_CHUNK_PROGRAMS = 2048

# Fixed, not tuned at run time: nothing to measure on any rank, and the same results on every one.
_FORWARD_BLOCKS = {  # (G padded for tl.dot, bytes per element of the embedding): (BLOCK_D, num_warps)
    (16, 2): (128, 4),
    (32, 2): (64, 4),
    (64, 2): (32, 8),
    (16, 4): (64, 4),
    (32, 4): (32, 4),
    (64, 4): (32, 8),
}
_BACKWARD_BLOCKS = {  # G padded to a power of two: (BLOCK_D, num_warps)
    2: (128, 4),
    4: (256, 4),
    8: (128, 4),
    16: (128, 8),
    32: (64, 8),
    64: (32, 8),
}


def group_consistency_reference(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, pair by pair, in the dtype of its inputs: consistency, cosine, indicator."""
    num_prompts, num_responses, _ = embedding_PGD.shape
    consistency_PG = embedding_PGD.new_zeros(num_prompts, num_responses)
    cosine_PGG = embedding_PGD.new_zeros(num_prompts, num_responses, num_responses)
    indicator_PGG = torch.zeros_like(cosine_PGG)
    for p in range(num_prompts):
        for i in range(num_responses):
            for j in range(num_responses):
                left_D, right_D = (
                    embedding_PGD[p, k] if valid_PG is None or valid_PG[p, k] else torch.zeros_like(w_left_D)
                    for k in (i, j)
                )
                indicator = torch.sigmoid(
                    torch.cat([w_left_D, w_right_D]) @ torch.cat([left_D, right_D]) + bias.reshape(())
                )
                indicator_PGG[p, i, j] = indicator
                if left_D.any() and right_D.any():
                    cosine = left_D @ right_D / (left_D.norm() * right_D.norm())
                    cosine_PGG[p, i, j] = cosine
                    if i != j:
                        consistency_PG[p, i] += cosine * indicator / (num_responses - 1)
    return consistency_PG, cosine_PGG, indicator_PGG


def _group_consistency_torch(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_responses = embedding_PGD.shape[1]
    embedding_PGD = embedding_PGD.float()
    if valid_PG is not None:
        embedding_PGD = embedding_PGD.masked_fill(~valid_PG.unsqueeze(-1), 0)
    # A cosine does not depend on length, so a constant scale is free; without it squares overflow or vanish.
    largest_PG1 = embedding_PGD.detach().abs().amax(dim=-1, keepdim=True)
    scaled_PGD = embedding_PGD / largest_PG1.masked_fill(largest_PG1 == 0, 1)
    gram_PGG = scaled_PGD @ scaled_PGD.mT
    square_PG1 = gram_PGG.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    inverse_norm_PG1 = square_PG1.masked_fill(square_PG1 == 0, torch.inf).rsqrt()  # 0 for a zero vector
    cosine_PGG = gram_PGG * (inverse_norm_PG1 * inverse_norm_PG1.mT)
    w_2D = torch.stack([w_left_D, w_right_D]).float()  # as [D, 2] its gradient would take a CPU far longer
    logit_PG2 = torch.nn.functional.linear(embedding_PGD, w_2D)
    indicator_PGG = torch.sigmoid(logit_PG2[..., :1] + logit_PG2[..., 1:].mT + bias.float())
    itself_GG = torch.eye(num_responses, dtype=torch.bool, device=embedding_PGD.device)
    agreement_PGG = (cosine_PGG * indicator_PGG).masked_fill(itself_GG, 0)
    return agreement_PGG.sum(dim=-1) / (num_responses - 1), cosine_PGG, indicator_PGG


@jit
def _inverse_power_of_two(largest_G: tl.tensor) -> tl.tensor:
    """2^−k for 2^k ≤ largest < 2^(k+1), |k| ≤ 126, so that it is a normal number; largest ≥ 2^−126."""
    exponent_G = largest_G.to(tl.int32, bitcast=True) >> 23
    return (tl.maximum(254 - exponent_G, 1) << 23).to(tl.float32, bitcast=True)


@jit
def _forward_kernel(
    embedding_ptr_PGD: tl.tensor, valid_ptr_PG: tl.tensor,
    w_left_ptr_D: tl.tensor, w_right_ptr_D: tl.tensor, bias_ptr: tl.tensor,
    consistency_ptr_PG: tl.tensor, cosine_ptr_PGG: tl.tensor, indicator_ptr_PGG: tl.tensor, saved_ptr_PG4: tl.tensor,
    stride_P: int, stride_G: int, num_responses: int, size: int,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, WIDE_DOT: tl.constexpr,
) -> None:  # fmt: skip
    """All outputs of one prompt. Saves of each response: scale, 1 / norm of the scaled row, w_left · e, w_right · e."""
    prompt = tl.program_id(0).to(tl.int64)
    response_G = tl.arange(0, GROUP)
    exists_G = response_G < num_responses
    offset_PG = prompt * num_responses + response_G
    is_read_G = exists_G
    if valid_ptr_PG is not None:
        is_read_G &= tl.load(valid_ptr_PG + offset_PG, mask=exists_G, other=0).to(tl.int1)

    row_ptr_G = embedding_ptr_PGD + prompt * stride_P + response_G.to(tl.int64) * stride_G
    # Rows are scaled by powers of two to a largest value in [1, 2), in [2, 4) from 2¹²⁷ on: no square overflows or
    # vanishes. This is exact but for values that become subnormal, off by at most 2⁻²⁵ of the largest, in float16.
    # The largest value is only known so far, so what has been summed is rescaled when it grows.
    largest_G = tl.full([GROUP], 2.0**-126, tl.float32)
    scale_G = _inverse_power_of_two(largest_G)
    gram_GG = tl.zeros([GROUP, GROUP], tl.float32)
    left_G = tl.zeros([GROUP], tl.float32)
    right_G = tl.zeros([GROUP], tl.float32)
    for start in range(0, size, BLOCK_D):
        offset_D = start + tl.arange(0, BLOCK_D)
        inside_D = offset_D < size
        tile_GD = tl.load(row_ptr_G[:, None] + offset_D, mask=is_read_G[:, None] & inside_D, other=0.0)
        wide_GD = tile_GD.to(tl.float32)
        w_left_D = tl.load(w_left_ptr_D + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        w_right_D = tl.load(w_right_ptr_D + offset_D, mask=inside_D, other=0.0).to(tl.float32)
        left_G += tl.sum(wide_GD * w_left_D, axis=1)
        right_G += tl.sum(wide_GD * w_right_D, axis=1)

        largest_G = tl.maximum(largest_G, tl.max(tl.abs(wide_GD), axis=1))
        old_scale_G = scale_G
        scale_G = _inverse_power_of_two(largest_G)
        shrink_G = scale_G / old_scale_G
        scaled_GD = (wide_GD * scale_G[:, None]).to(tile_GD.dtype)
        if WIDE_DOT:
            scaled_GD = scaled_GD.to(tl.float32)
        gram_GG *= shrink_G[:, None] * shrink_G
        gram_GG = tl.dot(scaled_GD, tl.trans(scaled_GD), acc=gram_GG, input_precision="ieee")

    is_same_GG = response_G[:, None] == response_G
    square_G = tl.sum(tl.where(is_same_GG, gram_GG, 0.0), axis=1)
    inverse_norm_G = 1 / tl.sqrt_rn(tl.where(square_G > 0, square_G, float("inf")))  # 0 for a zero vector
    cosine_GG = gram_GG * (inverse_norm_G[:, None] * inverse_norm_G)
    indicator_GG = tl.sigmoid(left_G[:, None] + right_G + tl.load(bias_ptr).to(tl.float32))
    agreement_GG = tl.where(is_same_GG, 0.0, cosine_GG * indicator_GG)
    tl.store(consistency_ptr_PG + offset_PG, tl.sum(agreement_GG, axis=1) / (num_responses - 1), mask=exists_G)
    offset_PGG = offset_PG[:, None] * num_responses + response_G
    exists_GG = exists_G[:, None] & exists_G
    tl.store(cosine_ptr_PGG + offset_PGG, cosine_GG, mask=exists_GG)
    if indicator_ptr_PGG is not None:
        tl.store(indicator_ptr_PGG + offset_PGG, indicator_GG, mask=exists_GG)
    tl.store(saved_ptr_PG4 + offset_PG * 4, scale_G, mask=exists_G)
    tl.store(saved_ptr_PG4 + offset_PG * 4 + 1, inverse_norm_G, mask=exists_G)
    tl.store(saved_ptr_PG4 + offset_PG * 4 + 2, left_G, mask=exists_G)
    tl.store(saved_ptr_PG4 + offset_PG * 4 + 3, right_G, mask=exists_G)


@jit
def _pair_gradient_kernel(
    d_consistency_ptr_PG: tl.tensor, d_cosine_ptr_PGG: tl.tensor, d_indicator_ptr_PGG: tl.tensor,
    cosine_ptr_PGG: tl.tensor, saved_ptr_PG4: tl.tensor, bias_ptr: tl.tensor,
    mixing_ptr_PGG: tl.tensor, d_dot_ptr_PG2: tl.tensor, d_bias_ptr_P: tl.tensor,
    num_responses: int, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients of one prompt as far as they do not depend on D.

    With C, I the cosines and indicators, dC, dI their gradients (through the consistency too), S = dC + dCᵀ, and rows
    x_i of norm |x_i|, scaled as in the forward pass (x_i = scale_i e_i):
    d_e_i = scale_i Σ_j mixing_ij x_j + d_left_i w_left + d_right_i w_right, where
    mixing_ij = (S_ij − [i = j] Σ_k S_ik C_ik) / (|x_i| |x_j|), d_left_i = Σ_j dI_ij I_ij (1 − I_ij), d_right_j = Σ_i …
    """
    prompt = tl.program_id(0).to(tl.int64)
    response_G = tl.arange(0, GROUP)
    exists_G = response_G < num_responses
    exists_GG = exists_G[:, None] & exists_G
    is_same_GG = response_G[:, None] == response_G
    offset_PG = prompt * num_responses + response_G
    offset_PGG = offset_PG[:, None] * num_responses + response_G
    cosine_GG = tl.load(cosine_ptr_PGG + offset_PGG, mask=exists_GG, other=0.0)
    left_G = tl.load(saved_ptr_PG4 + offset_PG * 4 + 2, mask=exists_G, other=0.0)
    right_G = tl.load(saved_ptr_PG4 + offset_PG * 4 + 3, mask=exists_G, other=0.0)
    indicator_GG = tl.sigmoid(left_G[:, None] + right_G + tl.load(bias_ptr).to(tl.float32))

    d_cosine_GG = tl.zeros([GROUP, GROUP], tl.float32)
    d_indicator_GG = tl.zeros([GROUP, GROUP], tl.float32)
    if d_cosine_ptr_PGG is not None:
        d_cosine_GG += tl.load(d_cosine_ptr_PGG + offset_PGG, mask=exists_GG, other=0.0)
    if d_indicator_ptr_PGG is not None:
        d_indicator_GG += tl.load(d_indicator_ptr_PGG + offset_PGG, mask=exists_GG, other=0.0)
    if d_consistency_ptr_PG is not None:
        d_consistency_G = tl.load(d_consistency_ptr_PG + offset_PG, mask=exists_G, other=0.0) / (num_responses - 1)
        d_agreement_GG = tl.where(is_same_GG, 0.0, d_consistency_G[:, None])
        d_cosine_GG += d_agreement_GG * indicator_GG
        d_indicator_GG += d_agreement_GG * cosine_GG

    symmetric_GG = d_cosine_GG + tl.trans(d_cosine_GG)
    radial_G = tl.sum(symmetric_GG * cosine_GG, axis=1)
    inverse_norm_G = tl.load(saved_ptr_PG4 + offset_PG * 4 + 1, mask=exists_G, other=0.0)
    mixing_GG = symmetric_GG - tl.where(is_same_GG, radial_G[:, None], 0.0)
    tl.store(mixing_ptr_PGG + offset_PGG, mixing_GG * (inverse_norm_G[:, None] * inverse_norm_G), mask=exists_GG)
    d_logit_GG = d_indicator_GG * indicator_GG * (1 - indicator_GG)
    d_left_G = tl.sum(d_logit_GG, axis=1)
    tl.store(d_dot_ptr_PG2 + offset_PG * 2, d_left_G, mask=exists_G)
    tl.store(d_dot_ptr_PG2 + offset_PG * 2 + 1, tl.sum(d_logit_GG, axis=0), mask=exists_G)
    tl.store(d_bias_ptr_P + prompt, tl.sum(d_left_G, axis=0))


@jit
def _embedding_gradient_kernel(
    embedding_ptr_PGD: tl.tensor, valid_ptr_PG: tl.tensor, w_left_ptr_D: tl.tensor, w_right_ptr_D: tl.tensor,
    saved_ptr_PG4: tl.tensor, mixing_ptr_PGG: tl.tensor, d_dot_ptr_PG2: tl.tensor,
    d_embedding_ptr_PGD: tl.tensor, d_w_ptr_C2D: tl.tensor,
    stride_P: int, stride_G: int, num_prompts: int, num_responses: int, size: int, prompts_per_chunk: int,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """d_embedding of a block of D for a chunk of prompts, in order, and the chunk's share of d_w_left and d_w_right."""
    offset_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = offset_D < size
    chunk = tl.program_id(1).to(tl.int64)
    response_G = tl.arange(0, GROUP)
    exists_G = response_G < num_responses
    w_left_D = tl.load(w_left_ptr_D + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    w_right_D = tl.load(w_right_ptr_D + offset_D, mask=inside_D, other=0.0).to(tl.float32)
    d_w_left_D = tl.zeros([BLOCK_D], tl.float32)
    d_w_right_D = tl.zeros([BLOCK_D], tl.float32)
    first = chunk * prompts_per_chunk
    for prompt in range(first, tl.minimum(first + prompts_per_chunk, num_prompts)):
        start = tl.cast(prompt, tl.int64) * num_responses
        row_ptr_D = embedding_ptr_PGD + tl.cast(prompt, tl.int64) * stride_P + offset_D
        mixed_GD = tl.zeros([GROUP, BLOCK_D], tl.float32)
        for sibling in range(num_responses):  # outer products: each row is read once, and nothing is padded
            is_read_D = inside_D
            if valid_ptr_PG is not None:
                is_read_D &= tl.load(valid_ptr_PG + start + sibling).to(tl.int1)
            row_D = tl.load(row_ptr_D, mask=is_read_D, other=0.0).to(tl.float32)
            row_ptr_D += stride_G
            if d_w_ptr_C2D is not None:
                d_w_left_D += tl.load(d_dot_ptr_PG2 + (start + sibling) * 2) * row_D
                d_w_right_D += tl.load(d_dot_ptr_PG2 + (start + sibling) * 2 + 1) * row_D
            if d_embedding_ptr_PGD is not None:
                scaled_D = row_D * tl.load(saved_ptr_PG4 + (start + sibling) * 4)
                mixing_ptr_G = mixing_ptr_PGG + (start + sibling) * num_responses + response_G  # symmetric
                mixed_GD += tl.load(mixing_ptr_G, mask=exists_G, other=0.0)[:, None] * scaled_D
        if d_embedding_ptr_PGD is not None:
            offset_PG = start + response_G
            scale_G = tl.load(saved_ptr_PG4 + offset_PG * 4, mask=exists_G, other=0.0)
            d_left_G = tl.load(d_dot_ptr_PG2 + offset_PG * 2, mask=exists_G, other=0.0)
            d_right_G = tl.load(d_dot_ptr_PG2 + offset_PG * 2 + 1, mask=exists_G, other=0.0)
            d_row_GD = mixed_GD * scale_G[:, None] + d_left_G[:, None] * w_left_D + d_right_G[:, None] * w_right_D
            if valid_ptr_PG is not None:  # not by factors of 0: what arrived may be infinite
                is_valid_G = tl.load(valid_ptr_PG + offset_PG, mask=exists_G, other=0).to(tl.int1)
                d_row_GD = tl.where(is_valid_G[:, None], d_row_GD, 0.0)
            d_row_ptr_GD = d_embedding_ptr_PGD + (offset_PG * size)[:, None] + offset_D
            tl.store(d_row_ptr_GD, d_row_GD, mask=exists_G[:, None] & inside_D)
    if d_w_ptr_C2D is not None:
        d_w_ptr_D = d_w_ptr_C2D + chunk * 2 * size + offset_D
        tl.store(d_w_ptr_D, d_w_left_D, mask=inside_D)
        tl.store(d_w_ptr_D + size, d_w_right_D, mask=inside_D)


class _GroupConsistency(torch.autograd.Function):
    """The kernels. Keeps the inputs, the cosines and four numbers per response."""

    @staticmethod
    def forward(
        ctx: Any,
        embedding_PGD: Tensor,
        w_left_D: Tensor,
        w_right_D: Tensor,
        bias: Tensor,
        valid_PG: Tensor | None,
        return_indicator: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_prompts, num_responses, size = embedding_PGD.shape
        numbers: dict[str, Any] = {"dtype": torch.float32, "device": embedding_PGD.device}
        consistency_PG = torch.empty(num_prompts, num_responses, **numbers)
        cosine_PGG = torch.empty(num_prompts, num_responses, num_responses, **numbers)
        indicator_PGG = torch.empty_like(cosine_PGG) if return_indicator else None
        saved_PG4 = torch.empty(num_prompts, num_responses, 4, **numbers)
        if num_prompts > 0:
            group = max(16, triton.next_power_of_2(num_responses))  # tl.dot takes no less than 16
            block_d, num_warps = _FORWARD_BLOCKS[group, embedding_PGD.element_size()]
            with torch.cuda.device_of(embedding_PGD):
                _forward_kernel[(num_prompts,)](
                    embedding_PGD, valid_PG, w_left_D, w_right_D, bias, consistency_PG, cosine_PGG, indicator_PGG,
                    saved_PG4, *embedding_PGD.stride()[:2], num_responses, size,
                    GROUP=group, BLOCK_D=block_d, num_warps=num_warps,
                    WIDE_DOT=INTERPRETED,  # whose tl.dot multiplies the bits of bfloat16
                )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embedding_PGD, w_left_D, w_right_D, bias, valid_PG, cosine_PGG, saved_PG4)
        return consistency_PG, cosine_PGG, indicator_PGG

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_consistency_PG: Tensor | None, d_cosine_PGG: Tensor | None, d_indicator_PGG: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        embedding_PGD, w_left_D, w_right_D, bias, valid_PG, cosine_PGG, saved_PG4 = ctx.saved_tensors
        num_prompts, num_responses, size = embedding_PGD.shape
        has_logit_gradient = d_consistency_PG is not None or d_indicator_PGG is not None
        needs_embedding, needs_w_left, needs_w_right, needs_bias = ctx.needs_input_grad[:4]
        needs_w = has_logit_gradient and (needs_w_left or needs_w_right)

        group = triton.next_power_of_2(num_responses)
        block_d, num_warps = _BACKWARD_BLOCKS[group]
        num_blocks = triton.cdiv(size, block_d)
        prompts_per_chunk = max(_MIN_PROMPTS_PER_CHUNK, triton.cdiv(num_prompts * num_blocks, _MAX_CHUNK_PROGRAMS))
        num_chunks = triton.cdiv(num_prompts, prompts_per_chunk)
        mixing_PGG = torch.empty_like(cosine_PGG)
        d_dot_PG2 = saved_PG4.new_empty(num_prompts, num_responses, 2)
        d_bias_P = saved_PG4.new_empty(num_prompts)
        d_w_C2D = saved_PG4.new_empty(num_chunks, 2, size) if needs_w else None
        d_embedding_PGD = (
            torch.empty_like(embedding_PGD, memory_format=torch.contiguous_format) if needs_embedding else None
        )
        if num_prompts > 0:
            with torch.cuda.device_of(embedding_PGD):
                _pair_gradient_kernel[(num_prompts,)](
                    *(d if d is None else d.contiguous() for d in (d_consistency_PG, d_cosine_PGG, d_indicator_PGG)),
                    cosine_PGG, saved_PG4, bias, mixing_PGG, d_dot_PG2, d_bias_P,
                    num_responses, GROUP=group, num_warps=num_warps,
                )  # fmt: skip
                if needs_embedding or needs_w:
                    _embedding_gradient_kernel[(num_blocks, num_chunks)](
                        embedding_PGD, valid_PG, w_left_D, w_right_D, saved_PG4, mixing_PGG, d_dot_PG2,
                        d_embedding_PGD, d_w_C2D, *embedding_PGD.stride()[:2], num_prompts, num_responses, size,
                        prompts_per_chunk, GROUP=group, BLOCK_D=block_d, num_warps=num_warps,
                    )  # fmt: skip
        d_w_2D = None if d_w_C2D is None else d_w_C2D.sum(dim=0)
        return (
            d_embedding_PGD,
            d_w_2D[0].to(w_left_D.dtype) if d_w_2D is not None and needs_w_left else None,
            d_w_2D[1].to(w_right_D.dtype) if d_w_2D is not None and needs_w_right else None,
            d_bias_P.sum().to(bias.dtype) if has_logit_gradient and needs_bias else None,
            None,
            None,
        )


def _check_inputs(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None
) -> None:
    if embedding_PGD.dim() != 3 or embedding_PGD.shape[2] == 0:
        raise ValueError(f"embedding_PGD must be [P, G, D ≥ 1], not {list(embedding_PGD.shape)}")
    num_prompts, num_responses, size = embedding_PGD.shape
    if num_responses < 2:
        raise ValueError(f"group_consistency compares siblings: needs G ≥ 2, embedding_PGD has G = {num_responses}")
    for name, w_D in (("w_left_D", w_left_D), ("w_right_D", w_right_D)):
        if w_D.shape != (size,):
            raise ValueError(f"{name} must be [D = {size}], as embedding_PGD is, not {list(w_D.shape)}")
    if bias.numel() != 1:
        raise ValueError(f"bias must be one number, not {list(bias.shape)}")
    if valid_PG is not None and (valid_PG.shape != (num_prompts, num_responses) or valid_PG.dtype != torch.bool):
        given = f"{valid_PG.dtype}, {list(valid_PG.shape)}"
        raise ValueError(f"valid_PG must be bool, [P, G] = {[num_prompts, num_responses]}, not {given}")


@overload
def group_consistency(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None = None,
    *, return_indicator: Literal[False] = False, backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def group_consistency(
    embedding_PGD: Tensor, w_left_D: Tensor, w_right_D: Tensor, bias: Tensor, valid_PG: Tensor | None = None,
    *, return_indicator: Literal[True], backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def group_consistency(
    embedding_PGD: Tensor,
    w_left_D: Tensor,
    w_right_D: Tensor,
    bias: Tensor,
    valid_PG: Tensor | None = None,
    *,
    return_indicator: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """Agreement of every response with its siblings; equations (5) and (6).

    Args:
        embedding_PGD: any float dtype.
        w_left_D, w_right_D: the two halves of the indicator's weight, any float dtype.
        bias: of the indicator, one element, 0-dimensional or not.
        valid_PG: bool; a False response counts as a zero vector. None: all are valid.
        return_indicator: whether ``indicator_PGG`` is returned too; else it is never stored.
        backend: ``"auto"`` takes the kernels for GPU tensors with G ≤ 64, and PyTorch otherwise.

    Returns:
        ``(consistency_PG, cosine_PGG)``, or ``(consistency_PG, cosine_PGG, indicator_PGG)``, float32, each
        differentiable in every float input: once, as the kernels' gradients have no graph (``create_graph=True``).
        ``consistency_PG`` is 0 for an invalid response. The divisor is always G − 1. The diagonals of the other two
        hold a response's value with itself. ``indicator_PGG`` of an invalid response is σ of what is left of the
        logit (finite, in [0, 1]): mask such pairs where it is used.

    Raises:
        ValueError: fewer than two responses per prompt, shapes that do not fit each other, a mask that is not bool,
            or more than 64 responses with ``backend="triton"``; no such backend.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    _check_inputs(embedding_PGD, w_left_D, w_right_D, bias, valid_PG)
    num_responses = embedding_PGD.shape[1]
    on_triton = uses_triton(backend, embedding_PGD)
    if on_triton and num_responses > MAX_KERNEL_GROUP:
        if backend == "triton":
            raise ValueError(f"the kernels take G ≤ {MAX_KERNEL_GROUP}, not {num_responses}: use backend='torch'")
        on_triton = False
    if not on_triton:
        outputs = _group_consistency_torch(embedding_PGD, w_left_D, w_right_D, bias.reshape(()), valid_PG)
        return outputs if return_indicator else outputs[:2]
    if embedding_PGD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        embedding_PGD = embedding_PGD.float()
    if embedding_PGD.stride(2) != 1:  # P and G may be strided
        embedding_PGD = embedding_PGD.contiguous()
    outputs = _GroupConsistency.apply(
        embedding_PGD,
        w_left_D.contiguous(),
        w_right_D.contiguous(),
        bias.reshape(()),
        valid_PG if valid_PG is None else valid_PG.contiguous(),
        return_indicator,
    )
    return outputs if return_indicator else outputs[:2]
