"""Mean of token states over ragged segments (responses, claims) of a packed batch.

    pooled_s = 1/|s| · Σ_{n: id_n = s} hidden_n,   0 for an empty segment
    d_hidden_n = Σ_k d_pooled_{s = id_kn} / |s|,   over the K segmentations in which n is in a segment

Shapes: N packed tokens, H hidden size, S segments of all segmentations together, K segmentations, R runs.

The kernels have no atomics: a *run* is consecutive tokens with the same ids in every segmentation. One pass over the
states sums each run, and a segment of any segmentation adds up its runs, in order; all tokens of a run have the same
gradient. Ids in random order only mean more runs. Bytes moved, with b bytes per element of hidden and N' tokens inside
any segment:

    forward   N'·H·b + (1 + K)·R·H·4 + S·H·4    states once; sums of runs written once, read at most K times; result
    backward  K·R·H·4 + N·H·b                   gradient of the result (few rows, mostly from cache); of the states
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asa_kernels.backend import Backend, jit, tl, triton, uses_triton

# Runs end at its multiples, so that long segments keep a whole GPU busy: up to 3 % more bytes for a bf16 segmentation.
TOKENS_PER_RUN = 128


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """Tile of one program, by the dtype of the states that it reads or writes: 16 rows of 512 bytes."""
    return {"BLOCK_N": 16, "BLOCK_H": 512 // dtype.itemsize, "num_warps": 4}


def segment_mean_reference(hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int) -> Tensor:
    """The formula, segment by segment, in the dtype of ``hidden_NH``."""
    pooled_SH = hidden_NH.new_zeros(num_segments, hidden_NH.shape[1])
    for segment in range(num_segments):
        inside_N = segment_ids_N == segment
        if inside_N.any():
            pooled_SH[segment] = hidden_NH[inside_N].mean(dim=0)
    return pooled_SH


def _segment_means_torch(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
    """The float32 form of a low-precision ``hidden_NH`` is made once and shared."""
    hidden_NH = hidden_NH.float()
    pooled: list[Tensor] = []
    for segment_ids_N, num_segments in segmentations:
        # Row 0 collects the tokens without a segment. Ids out of range stay out of range: index_add refuses them.
        row_N = segment_ids_N.long() + 1
        sum_RH = hidden_NH.new_zeros(num_segments + 1, hidden_NH.shape[1]).index_add(0, row_N, hidden_NH)
        count_R = hidden_NH.new_zeros(num_segments + 1).index_add(0, row_N, hidden_NH.new_ones(row_N.shape))
        pooled.append(sum_RH[1:] / count_R[1:].clamp(min=1).unsqueeze(-1))
    return tuple(pooled)


@jit
def _sum_rows_kernel(
    x_ptr_NH: tl.tensor,
    row_ptr: tl.tensor,
    begin_ptr_S: tl.tensor,
    end_ptr_S: tl.tensor,
    count_ptr_S: tl.tensor,
    out_ptr_SH: tl.tensor,
    stride_n: int,
    size: int,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """out_s = 1/count_s · Σ_{begin_s ≤ j < end_s} x[row_j], one program per row s and block of columns.

    ``row_ptr = None``: row_j = j. ``count_ptr_S = None``: the sum. An empty range is a row of zeros.
    """
    s = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin, end = tl.load(begin_ptr_S + s), tl.load(end_ptr_S + s)
    sum_NH = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for first in range(begin, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N).to(tl.int64)
        row = j if row_ptr is None else tl.load(row_ptr + j, mask=j < end, other=0)
        x_ptrs_NH = x_ptr_NH + row[:, None] * stride_n + h[None, :]
        sum_NH += tl.load(x_ptrs_NH, mask=(j < end)[:, None] & (h < size)[None, :], other=0).to(tl.float32)
    out_H = tl.sum(sum_NH, axis=0)
    if count_ptr_S is not None:
        out_H = tl.div_rn(out_H, tl.load(count_ptr_S + s))
    tl.store(out_ptr_SH + s * size + h, out_H, mask=h < size)


@jit
def _backward_kernel(
    d_pooled_ptr_SH: tl.tensor,
    count_ptr_S: tl.tensor,
    segment_ptr_RK: tl.tensor,
    bound_ptr: tl.tensor,
    d_hidden_ptr_NH: tl.tensor,
    num_segmentations: int,
    size: int,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
) -> None:
    """One program per run, whose tokens all have the same gradient, and block of columns."""
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d_hidden_H = tl.zeros([BLOCK_H], tl.float32)
    for k in range(num_segmentations):
        s = tl.load(segment_ptr_RK + r * num_segmentations + k)
        d_pooled_H = tl.load(d_pooled_ptr_SH + s * size + h, mask=(s >= 0) & (h < size), other=0)
        d_hidden_H += d_pooled_H / tl.load(count_ptr_S + s, mask=s >= 0, other=1)
    d_hidden_H = d_hidden_H.to(d_hidden_ptr_NH.dtype.element_ty)
    begin, end = tl.load(bound_ptr + r), tl.load(bound_ptr + r + 1)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_NH = (n < end)[:, None] & (h < size)[None, :]
        tl.store(d_hidden_ptr_NH + n[:, None] * size + h[None, :], d_hidden_H[None, :], mask=mask_NH)


def _sum_rows(x_NH: Tensor, row: Tensor | None, begin_S: Tensor, end_S: Tensor, count_S: Tensor | None) -> Tensor:
    """``_sum_rows_kernel``: float32 [S, H]."""
    out_SH = x_NH.new_empty(len(begin_S), x_NH.shape[1], dtype=torch.float32)
    if out_SH.numel():
        blocks = _blocks(x_NH.dtype)
        grid = (out_SH.shape[0], triton.cdiv(out_SH.shape[1], blocks["BLOCK_H"]))
        with torch.cuda.device_of(x_NH):
            _sum_rows_kernel[grid](x_NH, row, begin_S, end_S, count_S, out_SH, x_NH.stride(0), x_NH.shape[1], **blocks)
    return out_SH


def _run_bounds(segment_NK: Tensor) -> Tensor:
    """First token of each run, then N: int64 [R + 1]."""
    is_bound = torch.arange(len(segment_NK) + 1, device=segment_NK.device) % TOKENS_PER_RUN == 0
    is_bound[1:-1] |= (segment_NK[1:] != segment_NK[:-1]).any(dim=1)
    is_bound[-1] = True
    return is_bound.nonzero().squeeze(1)


def _number_segments(segmentations: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Ids of all segmentations, numbered through: int64 [N, K], −1 = in no segment. Refuses ids out of range."""
    offset, columns, wrong = 0, [], []
    for segment_ids_N, num_segments in segmentations:
        id_N = segment_ids_N.long()
        wrong.append(((id_N < -1) | (id_N >= num_segments)).any())
        columns.append(torch.where(id_N < 0, id_N, id_N + offset))
        offset += num_segments
    for (_, num_segments), is_wrong in zip(segmentations, torch.stack(wrong).tolist(), strict=True):
        if is_wrong:
            raise RuntimeError(f"segment ids out of bounds: {num_segments} segments have ids -1 … {num_segments - 1}")
    return torch.stack(columns, dim=1)


class _SegmentMeans(torch.autograd.Function):
    """The means of all segmentations, one below the other: [S, H]."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, segment_NK: Tensor, num_segments: int) -> Tensor:
        bound = _run_bounds(segment_NK)
        begin_R, end_R = bound[:-1], bound[1:]
        segment_RK = segment_NK[begin_R]
        num_tokens_RK = (end_R - begin_R).unsqueeze(1).expand_as(segment_RK)
        count = bound.new_zeros(num_segments + 1)  # the first: of runs that are in no segment of a segmentation
        count.index_add_(0, segment_RK.flatten() + 1, num_tokens_RK.flatten())
        count_S = count[1:].clamp(min=1).float()
        # Runs by segment and, as the sort is stable, in order within it: those of segment s begin at offset[s].
        segment, order = segment_RK.flatten().sort(stable=True)
        run = order // segment_NK.shape[1]
        offset = torch.searchsorted(segment, torch.arange(num_segments + 1, device=segment.device))

        # Tokens are read row by row; those in no segment are not read.
        hidden_NH = hidden_NH if hidden_NH.stride(1) == 1 else hidden_NH.contiguous()
        end_inside_R = torch.where((segment_RK >= 0).any(dim=1), end_R, begin_R)
        run_sum_RH = _sum_rows(hidden_NH, None, begin_R, end_inside_R, None)
        pooled_SH = _sum_rows(run_sum_RH, run, offset[:-1], offset[1:], count_S)
        ctx.save_for_backward(segment_RK, bound, count_S)
        ctx.shape_NH, ctx.dtype = hidden_NH.shape, hidden_NH.dtype
        return pooled_SH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_pooled_SH: Tensor) -> tuple[Tensor, None, None]:
        segment_RK, bound, count_S = ctx.saved_tensors
        d_pooled_SH = d_pooled_SH.contiguous()
        d_hidden_NH = d_pooled_SH.new_empty(ctx.shape_NH, dtype=ctx.dtype)
        if d_hidden_NH.numel():
            (num_runs, num_segmentations), size = segment_RK.shape, d_hidden_NH.shape[1]
            blocks = _blocks(ctx.dtype)
            grid = (num_runs, triton.cdiv(size, blocks["BLOCK_H"]))
            with torch.cuda.device_of(d_hidden_NH):
                _backward_kernel[grid](
                    d_pooled_SH, count_S, segment_RK, bound, d_hidden_NH, num_segmentations, size, **blocks
                )
        return d_hidden_NH, None, None


def segment_means(
    hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]], *, backend: Backend = "auto"
) -> tuple[Tensor, ...]:
    """:func:`segment_mean` for several segmentations ``(segment_ids_N, num_segments)`` of the same tokens.

    The kernels read ``hidden_NH`` once for all of them.
    """
    for segment_ids_N, _ in segmentations:
        if segment_ids_N.shape != hidden_NH.shape[:1]:
            raise RuntimeError(f"segment ids {list(segment_ids_N.shape)}: {hidden_NH.shape[0]} tokens need one id each")
    if not uses_triton(backend, hidden_NH):
        return _segment_means_torch(hidden_NH, segmentations)
    if not segmentations:
        return ()
    num_segments = [count for _, count in segmentations]
    pooled_SH = _SegmentMeans.apply(hidden_NH, _number_segments(segmentations), sum(num_segments))
    return tuple(pooled_SH.split(num_segments))


def segment_mean(hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int, *, backend: Backend = "auto") -> Tensor:
    """Mean of the tokens of each segment.

    Args:
        hidden_NH: token states, any float dtype, any strides.
        segment_ids_N: integer, −1 … S − 1, in any order; −1 = in no segment (such a state may hold anything).
        num_segments: S.
        backend: ``"triton"`` lets the host wait for the GPU, as it has to know the number of runs, and with it whether
            the ids are in range; ``"torch"`` does not wait. ``"auto"``: Triton for tensors on a GPU.

    Returns:
        ``pooled_SH``, float32, differentiable in ``hidden_NH``: once, as the kernels' gradient has no graph
        (``create_graph=True``). An empty segment is a row of zeros.

    Raises:
        RuntimeError: an id outside −1 … S − 1 (from ``"torch"`` on a GPU a device-side assertion); lengths that differ;
            a backend that cannot run.
        ValueError: no such backend.
    """
    return segment_means(hidden_NH, ((segment_ids_N, num_segments),), backend=backend)[0]
