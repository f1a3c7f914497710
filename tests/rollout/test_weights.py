"""Shards and manifests: what the ranks publish is, joined, bit for bit what they hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class CopyCounter(TorchDispatchMode):
    """Counts the copies made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


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


def flat_pieces(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Views of one buffer, one behind the other, as ZeRO-3's partitions lie."""
    return list(values.split(list(lengths)))


def test_neighbours_in_memory_are_one_copy_and_every_version_has_its_own_values() -> None:
    buffer = ShardBuffer(tensor_specs([("a", (2, 2)), ("b", (3,)), ("c", (2,))], 1), "float32", 0)
    weights = torch.arange(9.0)
    pieces = flat_pieces(weights, [4, 3, 2])
    with CopyCounter() as copies:
        for version in range(4):
            shard = buffer.copy_in(version, pieces)
            assert shard.view(np.float32).tolist() == weights.tolist()
            weights.add_(10)  # training goes on in place
    assert copies.count == 4


def test_what_lies_elsewhere_or_is_padded_is_a_copy_of_its_own() -> None:
    specs = tensor_specs([("a", (3,)), ("b", (4,)), ("c", (2,))], 2)  # rank 1: one number and padding, two, one
    weights = torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0])
    buffer = ShardBuffer(specs, "float32", 1)
    with CopyCounter() as copies:
        shard = buffer.copy_in(0, flat_pieces(weights, [2, 2, 1]))
    assert shard.view(np.float32).tolist() == [1, 0, 2, 3, 4] and copies.count == 2
    first, _, third = flat_pieces(weights, [2, 2, 1])
    with CopyCounter() as copies:
        shard = buffer.copy_in(1, [first, torch.tensor([5.0, 6.0]), third])
    assert shard.view(np.float32).tolist() == [1, 0, 5, 6, 4] and copies.count == 3


def test_weights_that_moved_are_not_taken_from_where_they_were() -> None:
    buffer = ShardBuffer(tensor_specs([("a", (2,)), ("b", (2,))], 1), "float32", 0)
    pieces = flat_pieces(torch.arange(4.0), [2, 2])
    buffer.copy_in(0, pieces)
    pieces[1].data = torch.tensor([7.0, 8.0])  # the same objects, as DeepSpeed moves a partition
    assert buffer.copy_in(1, pieces).view(np.float32).tolist() == [0, 1, 7, 8]
    every_other = torch.arange(8.0)[::2]
    assert buffer.copy_in(2, [every_other[:2], every_other[2:]]).view(np.float32).tolist() == [0, 2, 4, 6]


def test_shard_buffer_checks_pieces_that_lie_where_right_ones_lay() -> None:
    buffer = ShardBuffer(tensor_specs([("a", (2,)), ("b", (2,))], 1), "float32", 0)
    pieces = flat_pieces(torch.arange(4.0), [2, 2])
    buffer.copy_in(0, pieces)
    with pytest.raises(ValueError, match=r"version 1, rank 0's piece of b: torch.float32 \(1,\)"):
        buffer.copy_in(1, [pieces[0], pieces[1][:1]])
    with pytest.raises(ValueError, match=r"torch\.int32"):
        buffer.copy_in(2, [pieces[0], pieces[1].view(torch.int32)])


@pytest.mark.parametrize(("pieces", "message"), [
    ([], "0 pieces for the manifest's 2 tensors: the first one missing is a"),
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
