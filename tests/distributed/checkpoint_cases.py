"""What the ranks of test_checkpoint.py and of tests/faults/test_checkpoints.py run."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asa_dist.config import CheckpointConfig
from asa_dist.run_folder import taken_over_together
from asa_dist.runtime.checkpoint import Checkpointer, SaveResult
from asa_dist.runtime.checkpoint_files import CheckpointError, list_checkpoints, read_manifest
from asa_dist.runtime.engine import Placement, TrainEngine
from asa_dist.runtime.model import PHI, PSI, XI
from asa_dist.runtime.ownership import TakenOver
from asa_dist.runtime.parameter_state import local_pieces
from tests.distributed import tiny
from tests.run_folders import flip_a_bit

RATES = {PSI: 1e-2, PHI: 5e-3, XI: 2e-3}
SAVED_AFTER, NUM_STEPS = 2, 6
GATHERED = 1_000_000  # as persistence threshold: ZeRO-3 keeps every parameter of the tiny model gathered
Case = tuple[int, str, int]  # ZeRO stage, dtype, persistence threshold
FLOAT32: Case = (3, "float32", 0)
CASES: list[Case] = [
    *((stage, dtype, 0) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16")),
    (3, "float32", GATHERED),
    (3, "bfloat16", GATHERED),
]


@dataclass
class Seen:
    """Of one rank."""

    losses: list[float] = field(default_factory=list)  # after each step, over all ranks
    served: list[np.ndarray] = field(default_factory=list)  # generator shards where the checkpoint stands
    state: dict[str, np.ndarray] = field(default_factory=dict)  # at the end: KIND/NAME → this rank's piece
    adam_steps: set[int] = field(default_factory=set)


@contextmanager
def started(placement: Placement, case: Case, moved: bool = False, **changes: Any) -> Iterator[TrainEngine]:
    """A fresh engine; ``moved``: with weights that nothing but a load puts right."""
    stage, dtype, threshold = case
    settings = tiny.config(
        stage, placement.num_ranks, model__dtype=dtype, train__zero_persistence_threshold=threshold, **changes
    )
    model = tiny.model(settings)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
    engine = tiny.engine(model, settings, placement)
    yield engine
    engine.engine.destroy()


def checkpointer(engine: TrainEngine, folder: Path, told: dict[str, str] | None = None) -> Checkpointer:
    """Of a start that takes over; rank 0's notes the damaged ones in ``told``: name → what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    ownership = taken_over_together(folder, engine.placement.rank)
    noted: dict[str, str] = {} if told is None else told
    return Checkpointer(ownership, CheckpointConfig(keep=3, timeout_seconds=60.0), engine, noted.__setitem__)


def folder_of(root: str, num_ranks: int, case: Case) -> Path:
    return Path(root) / "-".join(map(str, (num_ranks, *case)))


def train(engine: TrainEngine, num_steps: int) -> list[float]:
    """The loss before each of ``num_steps`` updates."""
    placement, losses = engine.placement, []
    for _ in range(num_steps):
        batches = tiny.micro_batches(placement.num_ranks, placement.rank, 1)
        result = engine.train_step(batches, tiny.inputs(), RATES)
        losses.append(float(engine.sum_over_ranks(result.sums["loss/total"])))
    return losses


def loop_state(step: int) -> dict[str, torch.Tensor]:
    table = torch.arange(12.0).reshape(3, 4)
    return {"step": torch.tensor(step), "mean": table[:, 1], "is_on": torch.tensor([True, False]), "rho": table[0, 3]}


def served(engine: TrainEngine) -> list[np.ndarray]:
    return [shard.float().numpy().copy() for shard in engine.generator_shards()]


def state(engine: TrainEngine) -> dict[str, np.ndarray]:
    pieces = local_pieces(engine.engine.module, engine.optimizer)
    return {f"{kind}/{p.name}": tensor.numpy().copy() for p in pieces for kind, tensor in p.tensors.items()}


def adam_steps(engine: TrainEngine) -> set[int]:
    return {piece.adam_step for piece in local_pieces(engine.engine.module, engine.optimizer)}


def straight(placement: Placement, root: str) -> dict[Case, Seen]:
    """Undisturbed runs, each with a checkpoint on the way."""
    runs = {}
    for case in CASES:
        with started(placement, case) as engine:
            seen = Seen(train(engine, SAVED_AFTER), served(engine))
            folder = folder_of(root, placement.num_ranks, case)
            result = checkpointer(engine, folder).save(SAVED_AFTER, loop_state(SAVED_AFTER), b"open groups")
            assert result.ok, result.reason
            seen.losses += train(engine, NUM_STEPS - SAVED_AFTER)
            seen.state, seen.adam_steps = state(engine), adam_steps(engine)
            runs[case] = seen
    return runs


def resumed(placement: Placement, root: str) -> dict[Case, Seen]:
    """The same runs from their checkpoints on; ``losses`` holds the later ones."""
    runs = {}
    for case in CASES:
        with started(placement, case, moved=True) as engine:
            rates = [group["lr"] for group in engine.optimizer.param_groups]
            folder = folder_of(root, placement.num_ranks, case)
            manifest = read_manifest(folder / "checkpoints" / f"step-{SAVED_AFTER:08d}")
            assert (manifest.num_ranks, manifest.zero_stage) == (placement.num_ranks, case[0])
            loaded = checkpointer(engine, folder).load()
            assert loaded is not None and loaded.step == manifest.step == SAVED_AFTER
            assert loaded.rollouts == (b"open groups" if placement.rank == 0 else None)
            for name, tensor in loop_state(SAVED_AFTER).items():
                found = loaded.loop_state[name]
                assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
            assert [group["lr"] for group in engine.optimizer.param_groups] == rates
            shards = served(engine)
            runs[case] = Seen(train(engine, NUM_STEPS - SAVED_AFTER), shards, state(engine), adam_steps(engine))
    return runs


def continued(placement: Placement, source: Path, target: Path, case: Case, num_steps: int) -> list[float]:
    """Loads, trains, saves elsewhere; the losses."""
    with started(placement, case, moved=True) as engine:
        loaded = checkpointer(engine, source).load()
        assert loaded is not None
        losses = train(engine, num_steps)
        step = loaded.step + num_steps
        assert checkpointer(engine, target).save(step, loop_state(step), None).ok
    return losses


def one_rank(placement: Placement, root: str) -> tuple[dict[Case, Seen], dict[str, list[float]]]:
    """Undisturbed runs at one rank, and what two ranks began: at stage 3, and at stage 1 in a group's flat order."""
    went_on = {}
    for stage in (3, 1):
        case = (stage, "float32", 0)
        went_on[str(stage)] = continued(placement, folder_of(root, 2, case), Path(root) / f"2-1-{stage}", case, 2)
    return straight(placement, root), went_on


def two_ranks_again(placement: Placement, root: str) -> tuple[dict[Case, Seen], dict[str, list[float]]]:
    """Resumed runs at two ranks; what one rank handed back; other stages on the way (their names: first to last)."""
    folder, start = Path(root), folder_of(root, 2, FLOAT32)
    chains = {
        str(stage): continued(placement, folder / f"2-1-{stage}", folder / "end", (stage, "float32", 0), 2)
        for stage in (3, 1)
    }
    for middle, last in ((2, 3), (0, 1)):
        between = folder / f"3-{middle}"
        chains[f"3-{middle}-{last}"] = [
            *continued(placement, start, between, (middle, "float32", 0), 2),
            *continued(placement, between, folder / f"3-{middle}-{last}", (last, "float32", GATHERED), 2),
        ]
    return resumed(placement, root), chains


def another_model(placement: Placement, root: str) -> tuple[dict[Case, Seen], list[str]]:
    """Resumed runs at one rank, and what loading says to a model of another shape, or with another set of weights."""
    said = []
    for changes in ({"model__intermediate_size": 64}, {"model__tie_word_embeddings": False}):
        with started(placement, FLOAT32, **changes) as engine:
            try:
                checkpointer(engine, folder_of(root, 1, FLOAT32)).load()
            except CheckpointError as error:
                said.append(str(error))
    return resumed(placement, root), said


# --- faults -----------------------------------------------------------------------------------------------------
def remove_named_by_latest(folder: Path) -> None:
    """``latest`` goes on naming it."""
    shutil.rmtree(folder)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda folder: os.truncate(folder / "shards/rank-00001.safetensors", 5000),
    "flipped": lambda folder: flip_a_bit(folder / "shards/rank-00000.safetensors"),
    "missing": lambda folder: (folder / "loop.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: os.truncate(folder / "manifest.json", 400),
    "removed": remove_named_by_latest,
}


def file_faults(placement: Placement, root: str) -> dict[str, Any]:
    """Everything that needs no killing, in one start of the processes."""
    with started(placement, FLOAT32) as engine:
        undisturbed = train(engine, 3)
    return {
        "undisturbed": undisturbed,
        "damaged": damaged_ones(placement, f"{root}/damaged"),
        "all damaged": all_damaged(placement, f"{root}/all damaged"),
        "full disk": full_disk(placement, f"{root}/full"),
        "untidy": untidy(placement, f"{root}/untidy"),
        "taken over": taken_over(placement, f"{root}/taken over"),
    }


def damaged_ones(placement: Placement, root: str) -> dict[str, tuple[dict[str, str], int, bool]]:
    """By damage done to the newer of two: (what rank 0 was told, step loaded, whether its weights are that step's)."""
    outcomes = {}
    with started(placement, FLOAT32) as engine:
        intact = Path(root) / "intact"
        writer = checkpointer(engine, intact)
        states = {}
        for step in (1, 2):
            train(engine, 1)
            assert writer.save(step, loop_state(step), None).ok
            states[step] = state(engine)
        for damage, act in DAMAGES.items():
            folder, told = Path(root) / damage, dict[str, str]()
            if placement.rank == 0:
                shutil.copytree(intact, folder)
                act(folder / "checkpoints" / "step-00000002")
            dist.barrier()
            loaded = checkpointer(engine, folder, told).load()
            assert loaded is not None and int(loaded.loop_state["step"]) == loaded.step
            outcomes[damage] = (told, loaded.step, same(state(engine), states[loaded.step]))
            train(engine, 1)
    return outcomes


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def all_damaged(placement: Placement, root: str) -> str:
    """Both of them, each in another way; what the error says. Without any checkpoint there is none."""
    with started(placement, FLOAT32) as engine:
        assert checkpointer(engine, Path(root) / "nothing yet").load() is None
        writer = checkpointer(engine, Path(root))
        for step in (1, 2):
            assert writer.save(step, loop_state(step), None).ok
        if placement.rank == 0:
            DAMAGES["truncated"](Path(root) / "checkpoints" / "step-00000001")
            DAMAGES["no manifest"](Path(root) / "checkpoints" / "step-00000002")
        dist.barrier()
        before = state(engine)
        try:
            checkpointer(engine, Path(root)).load()
        except CheckpointError as error:
            assert same(before, state(engine)), "something was loaded"
            return str(error)
    return "no error"


def full_disk(placement: Placement, root: str) -> dict[str, Any]:
    """Rank 1, then rank 0, may write no file as large as its shard; then the logs; then all is well again."""
    seen: dict[str, Any] = {}
    with started(placement, FLOAT32) as engine:
        writer = checkpointer(engine, Path(root))
        train(engine, 1)
        assert writer.save(1, loop_state(1), b"kept").ok
        before = state(engine)
        for rank in (1, 0):
            with largest_file(8000 if placement.rank == rank else resource.RLIM_INFINITY):
                seen[f"rank {rank}"] = writer.save(2, loop_state(2), None).reason
        seen["logs"] = writer.save(2, loop_state(2), None, before_commit=lambda: placement.rank != 0).reason
        dist.barrier()
        folders = Path(root) / "checkpoints", Path(root) / ".start-1"
        seen["left"] = [sorted(path.name for path in folder.iterdir()) for folder in folders]
        seen["unharmed"] = same(before, state(engine))
        dist.barrier()
        later = writer.save(2, loop_state(2), None, before_commit=lambda: True)
        seen["later"] = (later.ok, later.name, later.num_bytes > 0)
        seen["losses"] = train(engine, 2)
    return seen


def untidy(placement: Placement, root: str) -> tuple[SaveResult, int]:
    """(how a save went that could neither remove what is stale nor write ``latest``, step that loads then)."""
    with started(placement, FLOAT32) as engine:
        writer, folder = checkpointer(engine, Path(root)), Path(root) / "checkpoints"
        assert writer.save(1, loop_state(1), None).reason == ""
        if placement.rank == 0:
            (Path(root) / ".start-1" / "step-00000002").write_text("no folder")
            (folder / "latest").unlink()
            (folder / "latest").mkdir()
        dist.barrier()
        result = writer.save(2, loop_state(2), None)
        loaded = writer.load()
        assert loaded is not None
    return result, loaded.step


def taken_over(placement: Placement, root: str) -> dict[str, Any]:
    """While a start writes its second checkpoint another one takes over and makes its own; then the first wakes up."""
    seen: dict[str, Any] = {"said": []}
    successors = []
    with started(placement, FLOAT32) as engine:
        zombie = checkpointer(engine, Path(root))
        assert zombie.save(1, loop_state(1), None).ok

        def another_start_comes() -> bool:
            successor = checkpointer(engine, Path(root))
            loaded = successor.load()
            assert loaded is not None and loaded.step == 1
            assert successor.save(2, loop_state(2), None).ok
            successors.append(successor)
            return True  # nothing keeps the zombie from its commit

        for act in (
            lambda: zombie.save(3, loop_state(3), None, before_commit=another_start_comes),
            lambda: zombie.save(4, loop_state(4), None),
            lambda: damaged_then_loaded(placement, root, zombie),
        ):
            try:
                seen["said"].append(f"done: {act()}")
            except TakenOver as error:
                seen["said"].append(str(error))
        seen["steps"] = [entry.step for entry in list_checkpoints(Path(root))]
        dist.barrier()
        assert successors[0].save(3, loop_state(3), None).ok
        loaded = successors[0].load()
        assert loaded is not None
        seen["loaded"] = loaded.step
    return seen


def damaged_then_loaded(placement: Placement, root: str, zombie: Checkpointer) -> Any:
    """What it would set aside is not its own any more."""
    if placement.rank == 0:
        DAMAGES["missing"](Path(root) / "checkpoints" / "step-00000002")
    dist.barrier()
    return zombie.load()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A write beyond that fails, as on a full disk (EFBIG instead of ENOSPC), without root and without a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save_for_ever(placement: Placement, root: str) -> None:
    """One checkpoint after the other; every weight of that of step s is s. Ends when a rank is killed."""
    with started(placement, FLOAT32) as engine:
        writer, pieces = checkpointer(engine, Path(root)), local_pieces(engine.engine.module, engine.optimizer)
        (Path(root) / f"pid-{placement.rank}").write_text(str(os.getpid()))
        for step in itertools.count(1):
            for piece in pieces:
                piece.tensors["weight"].fill_(step)
            assert writer.save(step, loop_state(step), None).ok


def after_the_kill(placement: Placement, roots: list[str]) -> list[tuple[int, set[float]]]:
    """(step loaded, all values that weights have then) in each folder; saving goes on there."""
    found = []
    with started(placement, FLOAT32) as engine:
        for root in roots:
            told: dict[str, str] = {}
            reader = checkpointer(engine, Path(root), told)
            loaded = reader.load()
            assert loaded is not None and told == {} and int(loaded.loop_state["step"]) == loaded.step
            values = {float(v) for shard in served(engine) for v in shard}
            assert reader.save(loaded.step + 1, loop_state(loaded.step + 1), None).ok
            found.append((loaded.step, values))
    return found
