"""How a policy version travels: every rank's own shard, and the manifest that makes the shards one version.

    parameter, flattened       | piece of rank 0 | piece of rank 1 | piece of rank 2 |0|    piece = ceil(numel / ranks)
    shard of rank r            piece r of tensor 0 | piece r of tensor 1 | …                (compute dtype, bytes)
    assemble                   verify all shards, then tensor by tensor: join the pieces, cut the padding, reshape

This is how ZeRO-3 partitions (``param.ds_tensor``), so that publishing gathers nothing. No Ray here: the coordinator
moves the shards, this file is their format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from asa_dist.records import ShardRecord, TensorSpec, WeightManifest

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CorruptShardError(Exception):
    """A shard that is not what its rank published; the message names version and rank."""


def tensor_specs(names_and_shapes: Iterable[tuple[str, Sequence[int]]], num_ranks: int) -> tuple[TensorSpec, ...]:
    """The manifest's tensors, in the given order, each cut into ``num_ranks`` pieces of ceil(numel / num_ranks)."""
    specs = []
    for name, shape in names_and_shapes:
        numel = int(np.prod(shape, dtype=np.int64))
        specs.append(TensorSpec(name, tuple(shape), -(-numel // num_ranks)))
    return tuple(specs)


def piece_of_rank(tensor: Tensor, spec: TensorSpec, rank: int) -> Tensor:
    """Rank ``rank``'s piece of a whole tensor: a flat view, not padded (so it may be short, or empty)."""
    return tensor.reshape(-1)[rank * spec.shard_numel:(rank + 1) * spec.shard_numel]


def shard_num_bytes(tensors: Iterable[TensorSpec], dtype: str) -> int:
    return sum(spec.shard_numel for spec in tensors) * DTYPES[dtype].itemsize


def checksum(buffer: np.ndarray) -> str:
    """xxh3_128 of a contiguous uint8 array, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(buffer.data)


def shard_record(rank: int, buffer: np.ndarray) -> ShardRecord:
    return ShardRecord(rank, buffer.nbytes, checksum(buffer))


def assemble(manifest: WeightManifest, shards: Sequence[np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """Verifies *all* shards, then yields every tensor whole, in manifest order, in the manifest's dtype.

    Args:
        shards: one flat uint8 array per rank, in rank order; read-only ones are fine, nothing yielded aliases them.

    Raises:
        CorruptShardError: from the call itself, before the first tensor, on a wrong count, length or checksum.
    """
    if len(shards) != len(manifest.shards):
        raise CorruptShardError(f"version {manifest.version} has {len(manifest.shards)} shards, {len(shards)} arrived")
    expected_bytes = shard_num_bytes(manifest.tensors, manifest.dtype)
    for record, shard in zip(manifest.shards, shards, strict=True):
        where = f"version {manifest.version}, shard of rank {record.rank}"
        if not record.num_bytes == shard.nbytes == expected_bytes:
            raise CorruptShardError(f"{where}: {shard.nbytes} bytes arrived, its rank published {record.num_bytes}, "
                                    f"the manifest's tensors need {expected_bytes}")
        if (found := checksum(shard)) != record.checksum:
            raise CorruptShardError(f"{where}: checksum {found}, its rank published {record.checksum}")
    return _join(manifest, shards)


def _join(manifest: WeightManifest, shards: Sequence[np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    dtype = DTYPES[manifest.dtype]
    start = 0
    for spec in manifest.tensors:
        stop = start + spec.shard_numel * dtype.itemsize
        whole = torch.from_numpy(np.concatenate([shard[start:stop] for shard in shards])).view(dtype)
        yield spec.name, whole[:spec.numel].view(spec.shape)
        start = stop


class ShardBuffer:
    """Two preallocated host buffers for one rank's shard: one is filled while the other is being published.

    Pinned where CUDA is available. The caller makes sure that publishing has ended before the copy after the next.
    Pieces that follow each other in memory, as ZeRO-3's do, are one copy; which ones do is found once, and again
    whenever a piece lies elsewhere.
    """

    def __init__(self, tensors: Sequence[TensorSpec], dtype: str, rank: int) -> None:
        self._tensors = tuple(tensors)
        self._dtype = DTYPES[dtype]
        self._rank = rank
        numel = sum(spec.shard_numel for spec in self._tensors)
        self._pinned = torch.cuda.is_available()
        # Zeroed once: what is padding is never written. And touched now, not within the first publications.
        self._slots = [torch.empty(numel, dtype=self._dtype, pin_memory=self._pinned).zero_() for _ in range(2)]
        self._shards = [slot.view(torch.uint8).numpy() for slot in self._slots]
        self._layout: list[tuple[object, ...]] | None = None  # where the pieces lay that were copied last
        self._copies: list[list[tuple[Tensor, Tensor]]] = [[], []]  # from them into each slot: (source, place)

    def copy_in(self, version: int, pieces: Iterable[Tensor]) -> np.ndarray:
        """Copies this rank's pieces; the only moment publishing takes from training.

        Args:
            version: the policy version, for error messages.
            pieces: flat tensors in manifest order, in the compute dtype, on any device; each
                :func:`piece_of_rank`, or padded to ``shard_numel`` like ZeRO-3's ``ds_tensor``. In the
                shard the padding is zero.

        Returns:
            The shard: flat uint8, a view of the slot, valid until the copy after the next.

        Raises:
            ValueError: too few or too many pieces, a wrong length or dtype; names the tensor.
        """
        found = list(pieces)
        layout: list[tuple[object, ...]] = [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in found]
        if layout != self._layout:
            joined = self._joined(version, found)
            self._copies = [[(source, slot[start:start + source.numel()]) for source, start in joined]
                            for slot in self._slots]
            self._layout = layout
        for source, place in self._copies[0]:
            place.copy_(source, non_blocking=True)
        if self._pinned:
            torch.cuda.synchronize()  # the copies were only enqueued
        for of_slots in (self._slots, self._shards, self._copies):
            of_slots.reverse()
        return self._shards[-1]

    def _joined(self, version: int, pieces: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """What is to be copied, without padding, and where in the shard it begins."""
        self._check(version, pieces)
        joined: list[tuple[Tensor, int]] = []
        begin = 0
        for spec, piece in zip(self._tensors, pieces, strict=True):
            source = piece.detach()[:self._length(spec)]
            if joined and begin == joined[-1][1] + joined[-1][0].numel() and _follows(source, joined[-1][0]):
                before, start = joined.pop()
                joined.append((before.as_strided((before.numel() + source.numel(),), (1,)), start))
            else:
                joined.append((source, begin))
            begin += spec.shard_numel
        return joined

    def _check(self, version: int, pieces: Sequence[Tensor]) -> None:
        if len(pieces) > len(self._tensors):
            raise ValueError(f"more pieces than the manifest's {len(self._tensors)} tensors")
        if len(pieces) < len(self._tensors):
            raise ValueError(f"{len(pieces)} pieces for the manifest's {len(self._tensors)} tensors: "
                             f"the first one missing is {self._tensors[len(pieces)].name}")
        for spec, piece in zip(self._tensors, pieces, strict=True):
            length = self._length(spec)
            if piece.dtype != self._dtype or piece.dim() != 1 or piece.numel() not in (length, spec.shard_numel):
                raise ValueError(f"version {version}, rank {self._rank}'s piece of {spec.name}: {piece.dtype} "
                                 f"{tuple(piece.shape)}, expected {self._dtype} ({length},), or "
                                 f"({spec.shard_numel},) with padding")

    def _length(self, spec: TensorSpec) -> int:
        """Of this rank's piece of a tensor, without padding."""
        return min(max(spec.numel - self._rank * spec.shard_numel, 0), spec.shard_numel)


def _follows(piece: Tensor, before: Tensor) -> bool:
    """Whether a flat tensor begins where another one ends."""
    return (piece.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
            and piece.is_contiguous() and before.is_contiguous()
            and piece.storage_offset() == before.storage_offset() + before.numel())
