"""Shards and manifests: what the ranks publish is, joined, bit for bit what they hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from asa_dist.records import WeightManifest
from asa_dist.rollout.weights import (
    DTYPES,
    CorruptShardError,
    ShardBuffer,
    assemble,
    piece_of_rank,
    shard_record,
    tensor_specs,
)

SHAPES = {"embed": (7, 3), "norm": (5,), "scalar": (), "one": (1,), "square": (4, 4)}


def make_tensors(dtype: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in SHAPES.items()}


def publish(tensors: dict[str, Tensor], dtype: str, num_ranks: int, padded: bool = False,
            ) -> tuple[WeightManifest, list[np.ndarray]]:
    specs = tensor_specs(((name, tensor.shape) for name, tensor in tensors.items()), num_ranks)
    shards = []
    for rank in range(num_ranks):
        pieces = [piece_of_rank(tensors[spec.name], spec, rank) for spec in specs]
        if padded:  # like ZeRO-3: garbage behind the end
            pieces = [torch.cat([p, torch.full((s.shard_numel - p.numel(),), 9.0, dtype=p.dtype)])
                      for p, s in zip(pieces, specs, strict=True)]
        shards.append(ShardBuffer(specs, dtype, rank).copy_in(3, pieces))
    records = tuple(shard_record(rank, shard) for rank, shard in enumerate(shards))
    return WeightManifest(3, dtype, specs, records), shards


@pytest.mark.parametrize(("dtype", "num_ranks", "padded"),
                         list(itertools.product(["float32", "bfloat16"], [1, 2, 3, 8], [False, True])))
def test_assembled_tensors_are_bit_equal(dtype: str, num_ranks: int, padded: bool) -> None:
    tensors = make_tensors(dtype)
    manifest, shards = publish(tensors, dtype, num_ranks, padded)
    for shard in shards:
        shard.setflags(write=False)  # as they come from Ray
    found = dict(assemble(manifest, shards))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name


def test_padding_does_not_depend_on_what_lies_behind_the_end() -> None:
    assert publish(make_tensors("float32"), "float32", 3)[0] == publish(make_tensors("float32"), "float32", 3, True)[0]


def test_pieces_have_ceil_size() -> None:
    assert [spec.shard_numel for spec in tensor_specs(SHAPES.items(), 3)] == [7, 2, 1, 1, 6]


def test_every_corruption_is_found_before_anything_is_yielded() -> None:
    manifest, shards = publish(make_tensors("float32"), "float32", 2)
    flipped = shards[1].copy()
    flipped[-1] ^= 1
    for bad in (flipped, shards[1][:-4], np.concatenate([shards[1], shards[1][:4]]), shards[0]):
        with pytest.raises(CorruptShardError, match="version 3, shard of rank 1"):
            assemble(manifest, [shards[0], bad])  # not even iterated
    with pytest.raises(CorruptShardError, match="2 shards, 1 arrived"):
        assemble(manifest, shards[:1])


def test_shard_buffer_keeps_the_version_before() -> None:
    specs = tensor_specs([("w", (3,))], 1)
    buffer = ShardBuffer(specs, "float32", 0)
    first = buffer.copy_in(0, [torch.tensor([1.0, 2.0, 3.0])])
    second = buffer.copy_in(1, [torch.tensor([4.0, 5.0, 6.0])])
    assert first.view(np.float32).tolist() == [1, 2, 3]
    assert second.view(np.float32).tolist() == [4, 5, 6]
    third = buffer.copy_in(5, [torch.tensor([7.0, 8.0, 9.0])])
    assert np.shares_memory(first, third) and not np.shares_memory(second, third)


@pytest.mark.parametrize(("pieces", "message"), [
    ([torch.zeros(2)], "1 pieces for the manifest's 2 tensors: the first one missing is b"),
    ([torch.zeros(2), torch.zeros(1), torch.zeros(1)], "more pieces than the manifest's 2 tensors"),
    ([torch.zeros(3), torch.zeros(1)], "piece of a: .* expected torch.float32 .2,."),
    ([torch.zeros(2, dtype=torch.float64), torch.zeros(1)], "piece of a: torch.float64"),
    ([torch.zeros(2, 1), torch.zeros(1)], "piece of a"),
])
def test_shard_buffer_refuses_wrong_pieces(pieces: list[Tensor], message: str) -> None:
    buffer = ShardBuffer(tensor_specs([("a", (2, 2)), ("b", (2,))], 2), "float32", 0)
    with pytest.raises(ValueError, match=message):
        buffer.copy_in(0, pieces)
