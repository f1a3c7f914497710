"""The hot operations of self-aligned training, one per file: formula, clear reference, fast path, public function.

Every operation computes and accumulates in float32 whatever the dtype of its inputs.
"""

from __future__ import annotations

from asa_kernels.group_consistency import group_consistency, group_consistency_reference
from asa_kernels.segment_mean import segment_mean, segment_mean_reference, segment_means
from asa_kernels.token_f1 import token_f1, token_f1_reference
from asa_kernels.token_logprob import token_logprob, token_logprob_reference

__all__ = [
    "group_consistency",
    "group_consistency_reference",
    "segment_mean",
    "segment_mean_reference",
    "segment_means",
    "token_f1",
    "token_f1_reference",
    "token_logprob",
    "token_logprob_reference",
]
