"""Mean of token states over ragged segments (responses, claims) of a packed batch.

    pooled_s = 1/|s| · Σ_{n: id_n = s} hidden_n,   0 for an empty segment

Shapes: N packed tokens, H hidden size, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def segment_mean_reference(hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int) -> Tensor:
    """The formula, segment by segment, in the dtype of ``hidden_NH``."""
    pooled_SH = hidden_NH.new_zeros(num_segments, hidden_NH.shape[1])
    for segment in range(num_segments):
        inside_N = segment_ids_N == segment
        if inside_N.any():
            pooled_SH[segment] = hidden_NH[inside_N].mean(dim=0)
    return pooled_SH


def segment_means(hidden_NH: Tensor, segmentations: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
    """:func:`segment_mean` for several segmentations ``(segment_ids_N, num_segments)`` of the same tokens.

    The float32 form of a low-precision ``hidden_NH`` is made once and shared.
    """
    hidden_NH = hidden_NH.float()
    pooled: list[Tensor] = []
    for segment_ids_N, num_segments in segmentations:
        # Row 0 collects the tokens without a segment. Ids out of range stay out of range: index_add refuses them.
        row_N = segment_ids_N.long() + 1
        sum_RH = hidden_NH.new_zeros(num_segments + 1, hidden_NH.shape[1]).index_add(0, row_N, hidden_NH)
        count_R = hidden_NH.new_zeros(num_segments + 1).index_add(0, row_N, hidden_NH.new_ones(row_N.shape))
        pooled.append(sum_RH[1:] / count_R[1:].clamp(min=1).unsqueeze(-1))
    return tuple(pooled)


def segment_mean(hidden_NH: Tensor, segment_ids_N: Tensor, num_segments: int) -> Tensor:
    """Mean of the tokens of each segment.

    Args:
        hidden_NH: token states, any float dtype.
        segment_ids_N: integer, −1 … S − 1, in any order; −1 = in no segment (such a state may hold anything).
        num_segments: S.

    Returns:
        ``pooled_SH``, float32, differentiable in ``hidden_NH``; an empty segment is a row of zeros.

    Raises:
        RuntimeError: an id outside −1 … S − 1 (on a GPU a device-side assertion), or lengths that differ.
    """
    return segment_means(hidden_NH, ((segment_ids_N, num_segments),))[0]
