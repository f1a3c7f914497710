"""The hot operations of self-aligned training, one per file: formula, clear reference, PyTorch path, Triton kernels.

Every operation accumulates in float32 whatever the dtype of its inputs. ``backend="auto"`` launches Triton kernels for
tensors on a GPU, which are deterministic, and runs vectorised PyTorch elsewhere.
"""

from __future__ import annotations

from asa_kernels.backend import Backend
from asa_kernels.group_consistency import group_consistency, group_consistency_reference
from asa_kernels.segment_mean import segment_mean, segment_mean_reference, segment_means
from asa_kernels.token_f1 import token_f1, token_f1_reference
from asa_kernels.token_logprob import token_logprob, token_logprob_reference

__all__ = [
    "Backend",
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
