"""What vLLM's workers can do for our engine. Of a model that is split over GPUs (tensor parallel) each is a process.

    engine    all tensors, one after the other, in memory that has a file descriptor and no name
    workers   map that memory, and stream the tensors into their own part of the model

So the model crosses no pipe, nothing is written to a disk, and whichever process dies, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class SharedTensor:
    """One tensor in the shared memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int

    @property
    def end_byte(self) -> int:
        return self.first_byte + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SharedWeights:
    """What processes of this host and user need to read them, as long as :func:`shared_weights` lasts."""

    path: str
    tensors: tuple[SharedTensor, ...]

    def map(self) -> Tensor:
        """All of the memory, uint8."""
        return torch.from_file(self.path, shared=True, size=self.tensors[-1].end_byte, dtype=torch.uint8)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor is a view of the shared memory."""
        memory = self.map()
        for tensor in self.tensors:
            yield tensor.name, memory[tensor.first_byte:tensor.end_byte].view(tensor.dtype).view(tensor.shape)


@contextlib.contextmanager
def shared_weights(weights: Mapping[str, Tensor]) -> Iterator[SharedWeights]:
    """A copy of all tensors that other processes can map."""
    tensors: list[SharedTensor] = []
    first_byte = 0
    for name, weight in weights.items():
        tensors.append(SharedTensor(name, weight.dtype, tuple(weight.shape), first_byte))
        first_byte = -(-tensors[-1].end_byte // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    descriptor = os.memfd_create("weights")
    try:
        shared = SharedWeights(f"/proc/{os.getpid()}/fd/{descriptor}", tuple(tensors))
        for name, tensor in shared.read():
            tensor.copy_(weights[name])
        yield shared
    finally:
        os.close(descriptor)


class WorkerExtension:
    """What vLLM's worker class gets beside its own methods (`worker_extension_cls`)."""

    reload_weights: Any  # of vLLM's worker
    model_runner: Any

    def receive_weights(self, shared: SharedWeights) -> None:
        self.reload_weights(weights_iterator=shared.read())

    def logprobs_of(self, slots: Sequence[int], num_tokens: int) -> np.ndarray:
        """See :meth:`CounterSampling.logprobs`."""
        from asa_dist.rollout.vllm_sampling import CounterSampling

        processors = self.model_runner.input_batch.logitsprocs.all
        (sampler,) = (processor for processor in processors if isinstance(processor, CounterSampling))
        return sampler.logprobs(slots, num_tokens)
