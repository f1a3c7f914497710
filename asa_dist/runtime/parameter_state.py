"""This rank's float32 weights and Adam states by parameter name, wherever DeepSpeed keeps them; and as shard files.

    parameter, flattened  |      piece of rank 0      |      piece of rank 1      |     cut differently at every stage
    piece                 name, start, three float32 tensors that are views of what the optimizer works on

What a stage keeps:
    0          whole parameters, the same on every rank; in bfloat16, whole float32 copies beside them
    1, 2       a rank's range of each parameter group, flattened and joined; beside them, whole weights to compute with
    3          a rank's part of each parameter, joined per sub-group; small weights may be gathered (persistence)

A shard file holds the pieces of one rank under their names, so that any number of ranks at any stage can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors import safe_open
from torch import Tensor, nn

from asa_dist.runtime.checkpoint_files import CheckpointError, FileRecord, write_file
from asa_dist.runtime.gradients import is_partitioned

KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A range of one flattened parameter: views, so that writing to them changes the training state."""

    name: str  # as in ``model.named_parameters()``
    start: int  # first element within the flattened parameter
    tensors: dict[str, Tensor]  # by kind, each float32, flat, of the same length
    adam: dict[str, Any]  # the optimizer's state that ``exp_avg`` is part of; "step" counts its updates

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()

    @property
    def adam_step(self) -> int:
        return int(self.adam["step"])

    def part(self, start: int, stop: int) -> Piece:
        """Elements ``start`` to ``stop``, counted within the piece."""
        views = {kind: tensor[start:stop] for kind, tensor in self.tensors.items()}
        return replace(self, start=self.start + start, tensors=views)


@dataclass(frozen=True)
class _Range:
    """Where a range of a parameter lies in a flat float32 tensor of the optimizer's."""

    parameter: nn.Parameter
    start: int  # within the flattened parameter
    offset: int  # within the flat tensor
    numel: int


# --- what this rank holds ---------------------------------------------------------------------------------------
def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes, also of parameters that ZeRO-3 has emptied."""
    named = model.named_parameters()
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}


def local_pieces(model: nn.Module, optimizer: Any) -> list[Piece]:
    """All that this rank updates; at stage 0 that is everything. Padding is in no piece.

    Adam's states, which the first update would create, are created.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adam = getattr(optimizer, "optimizer", optimizer)  # within DeepSpeed's wrapper, if it has one
    pieces = []
    for flat, ranges in _flat_tensors(optimizer):
        state = _adam_state(adam, flat)
        whole = {"weight": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        whole = {kind: tensor.view(-1) for kind, tensor in whole.items()}
        for part in ranges:
            views = {kind: tensor[part.offset : part.offset + part.numel] for kind, tensor in whole.items()}
            pieces.append(Piece(names[id(part.parameter)], part.start, views, state))
    return pieces


def pieces_to_save(model: nn.Module, optimizer: Any, rank: int, num_ranks: int) -> list[Piece]:
    """This rank's pieces, disjoint from those of the others: of a state that all hold alike, a slice."""
    pieces = local_pieces(model, optimizer)
    if not is_partitioned(optimizer):
        sizes = [-(-piece.numel // num_ranks) for piece in pieces]
        pieces = [piece.part(rank * size, (rank + 1) * size) for piece, size in zip(pieces, sizes, strict=True)]
    return [piece for piece in pieces if piece.numel]


def refresh_weights(optimizer: Any) -> None:
    """Computes with the float32 weights as they are now, rounded to the compute dtype. A collective."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()  # frees gathered weights
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers those that persist
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    else:
        for parameter, master in _whole_parameters(optimizer):
            if master is not parameter:
                parameter.data.copy_(master.data)


def _flat_tensors(optimizer: Any) -> Iterator[tuple[Tensor, list[_Range]]]:
    """Every tensor that Adam updates on this rank, with what lies in it."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield flat, list(_partitions(parameters, optimizer))
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        yield from zip(optimizer.single_partition_of_fp32_groups, map(_fragments, optimizer.bit16_groups), strict=True)
    elif isinstance(optimizer, BF16_Optimizer):
        yield from zip(optimizer.fp32_groups_flat_partition, map(_fragments, optimizer.bf16_groups), strict=True)
    else:
        for parameter, master in _whole_parameters(optimizer):
            yield master, [_Range(parameter, 0, 0, parameter.numel())]


def _partitions(parameters: Sequence[nn.Parameter], optimizer: Any) -> Iterator[_Range]:
    """Stage 3 pads every parameter to a multiple of the ranks and gives each an equal part."""
    offset = 0
    for parameter in parameters:
        size = parameter.partition_numel()  # type: ignore[attr-defined]  # ZeRO-3 adds these
        start = size * optimizer._get_param_partition_rank(parameter)
        if (numel := min(size, parameter.ds_numel - start)) > 0:  # type: ignore[attr-defined]
            yield _Range(parameter, start, offset, numel)
        offset += size


def _fragments(parameters: Iterable[nn.Parameter]) -> list[_Range]:
    """Stages 1 and 2 note on each parameter which part of it this rank updates."""
    mappings = [(parameter, parameter._hp_mapping) for parameter in parameters]  # type: ignore[attr-defined]
    return [
        _Range(
            parameter, mapping.lp_fragment_address.start, mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
        )
        for parameter, mapping in mappings if mapping is not None
    ]


def _whole_parameters(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Stage 0: (parameter of the model, what Adam updates), the same thing in float32."""
    masters = [group["params"] for group in optimizer.param_groups]
    for parameters, copies in zip(getattr(optimizer, "fp16_groups", masters), masters, strict=True):
        yield from zip(parameters, copies, strict=True)


def _adam_state(adam: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
    """What Adam keeps of a tensor, created as its first update would."""
    state: dict[str, Any] = adam.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0) if isinstance(adam, torch.optim.AdamW) else 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.detach()), torch.zeros_like(flat.detach())
    return state


# --- shard files ------------------------------------------------------------------------------------------------
def write_shard(path: Path, pieces: Sequence[Piece]) -> FileRecord:
    """Writes pieces in the safetensors format, one tensor at a time: a shard of a large model is never copied whole.

    Tensors are called KIND/NAME; the metadata's ``pieces`` is JSON: name → [start, Adam's step].

    Raises:
        OSError: not written; a part of the file may be there.
    """
    tensors = {f"{kind}/{piece.name}": tensor for piece in pieces for kind, tensor in piece.tensors.items()}
    header: dict[str, Any] = {
        "__metadata__": {"pieces": json.dumps({piece.name: [piece.start, piece.adam_step] for piece in pieces})}
    }
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (tensor.cpu().numpy().data.cast("B") for tensor in tensors.values())
    return write_file(path, chain((len(text).to_bytes(8, "little"), text), data))


class ShardReader:
    """The shards of a checkpoint as one map from names to values.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path]):
        self._sources: dict[str, list[tuple[int, int, Any]]] = {}  # name → (start, Adam's step, open file)
        for path in paths:
            file = safe_open(path, framework="pt")
            for name, (start, adam_step) in json.loads(file.metadata()["pieces"]).items():
                self._sources.setdefault(name, []).append((start, adam_step, file))

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copies what belongs there into pieces; only the ranges they cover are read.

        Raises:
            CheckpointError: no shard has a part of a parameter.
        """
        steps: dict[int, int] = {}
        for piece in pieces:
            adam_step = self._fill(piece)
            # pieces that share a flat tensor share its count; where those differ, the smaller ones had no gradient yet
            steps[id(piece.adam)] = max(adam_step, steps.get(id(piece.adam), 0))
            if isinstance(piece.adam["step"], Tensor):
                piece.adam["step"].fill_(steps[id(piece.adam)])
            else:
                piece.adam["step"] = steps[id(piece.adam)]

    def _fill(self, piece: Piece) -> int:
        missing, adam_step = piece.numel, 0
        for source_start, source_step, file in self._sources.get(piece.name, ()):
            source = {kind: file.get_slice(f"{kind}/{piece.name}") for kind in KINDS}
            first = max(piece.start, source_start)
            last = min(piece.start + piece.numel, source_start + source["weight"].get_shape()[0])
            if first >= last:
                continue
            target = piece.part(first - piece.start, last - piece.start)
            for kind, tensor in target.tensors.items():
                tensor.copy_(source[kind][first - source_start : last - source_start])
            missing, adam_step = missing - target.numel, max(adam_step, source_step)
        if missing:
            raise CheckpointError(
                f"{missing:,} elements of parameter {piece.name} from {piece.start:,} on are in no shard"
            )
        return adam_step


def refuse_other_parameters(folder: Path, saved: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    """Compares the shapes that the checkpoint in ``folder`` holds with those of the model.

    Raises:
        CheckpointError: naming the first parameter that only one side has, or that has another shape.
    """
    held = parameter_shapes(model)
    for name in (*held, *saved):
        if saved.get(name) != held.get(name):
            in_file, in_model = (side.get(name, "absent") for side in (saved, held))
            raise CheckpointError(
                f"{folder} is of another model: parameter {name} is {in_file} there and {in_model} here; resume with "
                "the run's own config"
            )
