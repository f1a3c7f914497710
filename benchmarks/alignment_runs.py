"""The arms of a comparison, and how their runs are made, taken up again, and measured."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from live_run import ROOT, Hang, LiveRun, Progress
from pydantic import ValidationError
from world import World, WorldConfig

from asa_dist.config import Config, ConfigError
from asa_dist.config_text import read_tree

if TYPE_CHECKING:
    from alignment_measures import Exam

CONFIG = ROOT / "benchmarks/alignment.yaml"


@dataclass(frozen=True)
class Arm:
    title: str
    overrides: tuple[str, ...] = ()


SHARPENING = (
    "evaluator.trust=never", "evaluator.intrinsic.self_consistency=0.0", "evaluator.intrinsic.coherence=0.0",
    "evaluator.intrinsic.quality=0.0", "evaluator.intrinsic.certainty=1.0",
)  # fmt: skip
ARMS = {
    "b": Arm("ASA"),
    "d": Arm("R_intrinsic only", ("evaluator.trust=never",)),
    "e": Arm("MLE, as certain as (b)"),  # no run of its own
    "f": Arm("R = mean log-probability", SHARPENING),
    # the fairest: of several phrasings in a group some have likelier answers, for no merit of the answer
    "g": Arm("R = mean log-probability, one phrasing a group", (*SHARPENING, "rollout.prompt_variants=1")),
    "a": Arm("MLE only", (
        "objective.beta=0.0", "rollout.prompts_per_step=1", "rollout.responses_per_prompt=2",
        "rollout.prompt_variants=1", "rollout.max_new_tokens=1")),  # the fewest rollouts there can be
    "c": Arm("the paper's letter", (
        "evaluator.trust=always", "evaluator.max_warmup_steps=0", "evaluator.embedding=raw",
        "evaluator.omega_floor=0.0", "evaluator.token_weights=uniform", "evaluator.vote_sharpness=0.0",
        "evaluator.substance=0.0", "objective.beta=0.4", "objective.advantage=none", "objective.phi_self_align=paper",
        "objective.meta_loss=paper", "objective.importance=none", "objective.embedding_loss_weight=0.0",
        "objective.indicator_loss_weight=0.0", "objective.principle_loss_weight=0.0")),
    # (b) without one of its parts each
    "b-phrasings": Arm("(b), one phrasing a group", ("rollout.prompt_variants=1",)),
    "b-weights": Arm("(b), all tokens weigh alike", ("evaluator.token_weights=uniform",)),
    "b-votes": Arm("(b), all siblings count alike", ("evaluator.vote_sharpness=0.0",)),
    "b-substance": Arm("(b), who says nothing earns as well", ("evaluator.substance=0.0",)),
    "b-meta": Arm("(b), L_meta on the rewards as they are", ("objective.meta_loss=paper",)),
    "b-self-align": Arm("(b), no alignment term for φ", ('objective.phi_self_align="off"',)),
    "b-uncertainty": Arm("(b), no penalty on uncertainty", ("evaluator.uncertainty_weight=0.0",)),
}  # fmt: skip
ABLATIONS = tuple(arm for arm in ARMS if arm.startswith("b-"))
METHOD_SECTIONS = ("rollout", "evaluator", "objective")
SIZES = {"prompts_per_step", "responses_per_prompt", "min_prompt_tokens", "max_new_tokens", "embedding_size"}
TEMPERED, TEMPERED_NEEDS = "e", ("a", "b")  # whose model; whose entropy
TEMPERING_ROUNDS, ENTROPY_TOLERANCE = 2, 0.01  # of the entropy that is to be met
POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = {True: 1.0, False: 30.0}  # of progress; True: in a terminal


@dataclass(frozen=True)
class Run:
    """One arm with one seed in one world."""

    arm: str
    world: WorldConfig
    overrides: tuple[str, ...]  # of all arms
    root: Path

    @property
    def name(self) -> str:
        lies = f", {self.world.false_majority:.0%} false majorities" if self.world.false_majority else ""
        return f"({self.arm}) seed {self.world.seed}{lies}"

    @property
    def settings(self) -> list[str]:
        """Without the paths of the world's files."""
        return [f"seed={self.world.seed}", *self.overrides, *ARMS[self.arm].overrides]

    @cached_property
    def folder(self) -> Path:
        """Named after everything that the run depends on, the code included."""
        needed = {self, *(replace(self, arm=arm) for arm in TEMPERED_NEEDS if self.arm == TEMPERED)}
        configs = {run.arm: resolved(run.settings).model_dump(mode="json") for run in needed}
        depends_on = json.dumps([asdict(self.world), configs, sources_digest()], sort_keys=True)
        return self.root / f"{self.arm}-{self.world.seed}-{hashlib.sha256(depends_on.encode()).hexdigest()[:12]}"

    @property
    def measures_path(self) -> Path:
        return self.folder / "measures.json"

    def start(self) -> LiveRun:
        """From the beginning, or where it was interrupted."""
        World(self.world).write(self.folder)
        run = LiveRun(self.folder)
        if (run.run_dir / "config.yaml").exists():
            run.start("resume", str(run.run_dir))
            return run
        files = f"data.sources.0.path={self.folder}/corpus.jsonl", f"rollout.prompt_file={self.folder}/prompts.jsonl"
        run.start("train", str(CONFIG), *files, *self.settings, "--run-dir", str(run.run_dir))
        return run

    def exam(self, progress: Callable[[str], None]) -> Exam:
        """The questions, for the model that the run has ended with. All arms may answer at equal length."""
        from alignment_measures import Exam

        from asa_dist.evaluation.checkpoint_model import open_checkpoint

        checkpoint, rollout = open_checkpoint(self.folder / "run"), resolved(self.overrides).rollout
        return Exam(checkpoint, World(self.world), rollout, self.world.seed, progress)

    def keep(self, measures: dict[str, Any]) -> dict[str, Any]:
        from asa_dist.runtime.checkpoint_files import write_atomically

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.measures_path, json.dumps(measures, indent=1) + "\n")
        return measures

    def kept(self) -> dict[str, Any] | None:
        return json.loads(self.measures_path.read_text(encoding="utf-8")) if self.measures_path.exists() else None


def resolved(overrides: Sequence[str], path: Path = CONFIG) -> Config:
    """alignment.yaml, or another config; the files that its paths name are not looked for.

    Raises:
        ConfigError: what is no config.
    """
    try:
        return Config.model_validate(read_tree(path, overrides))
    except ValidationError as error:
        raise ConfigError(f"{path.name} with {' '.join(overrides)}: {error}") from None


def differences_from_defaults(config: Config) -> dict[str, dict[str, Any]]:
    """{key: {"here", "default"}} of the method's own settings: what is rewarded, trusted and optimised, no size."""
    differing: dict[str, dict[str, Any]] = {}
    for section in METHOD_SECTIONS:
        here, default = (getattr(of, section).model_dump(mode="json") for of in (config, Config()))
        differing |= {f"{section}.{name}": {"here": value, "default": default[name]} for name, value in here.items()
                      if value != default[name] and name not in SIZES}  # fmt: skip
    return differing


@cache
def sources_digest() -> str:
    """Of the code that makes a run and its measures."""
    measuring = [ROOT / "benchmarks" / f"{name}.py" for name in ("world", "alignment_measures", "alignment_runs")]
    digest = hashlib.sha256()
    for path in [*sorted((ROOT / "asa_dist").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py")), *measuring]:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


class RunFailed(Exception):
    """A run without measures."""


class Status(Progress):
    """What is under way: one live line in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._next_seconds = 0.0
        self._is_live = sys.stderr.isatty()

    def say(self, message: str) -> None:
        if self._is_live:
            print("\r\x1b[K", end="", file=sys.stderr)
        super().say(message)

    def show(self, share_done: float, *under_way: str) -> None:
        """Not more often than anyone wants to read it."""
        if self.seconds < self._next_seconds:
            return
        self._next_seconds = self.seconds + SECONDS_BETWEEN_LINES[self._is_live]
        left = f"{self.seconds / 60 * (1 / share_done - 1):.0f} minutes left" if share_done > 0 else "starting"
        text = "; ".join([left, *under_way])
        if self._is_live:
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:columns]}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            self.say(text)


class Comparison:
    """Trains and measures; a failed run is told of, and the others go on.

    Args:
        num_jobs: runs that train at once. Measuring goes on beside them, in this process.
    """

    def __init__(self, runs: Sequence[Run], num_jobs: int) -> None:
        self.failed: list[Run] = []
        self.measures: dict[Run, dict[str, Any]] = {run: kept for run in runs if (kept := run.kept()) is not None}
        missing = [run for run in runs if run not in self.measures]
        self._to_temper = [run for run in missing if run.arm == TEMPERED]
        self._to_train = deque(run for run in missing if run.arm != TEMPERED)
        self._num_jobs, self._num_runs, self._num_ended = num_jobs, len(self._to_train), 0
        self._status = Status()
        if self.measures:
            self._status.say(f"{len(self.measures)} of {len(runs)} are there already")

    def complete(self) -> None:
        """All measures that can be had."""
        import torch

        torch.set_num_threads(1)  # the other cores train
        live: dict[Run, LiveRun] = {}
        with ExitStack() as ends:
            self._temper()
            while self._to_train or live:
                ended = {run: live.pop(run) for run, process in [*live.items()] if process.has_ended}
                while self._to_train and len(live) < self._num_jobs:
                    run = self._to_train.popleft()
                    live[run] = ends.enter_context(run.start())
                for run, process in ended.items():
                    self._try(run, lambda run=run, process=process: self._trained(run, process))
                    self._num_ended += 1
                    self._temper()
                self._show(live)
                time.sleep(POLL_SECONDS)
        for run in self._to_temper:
            self._fail(run, f"it needs arms {' and '.join(TEMPERED_NEEDS)}")

    def _show(self, live: dict[Run, LiveRun]) -> None:
        shares = {run: process.last_step / resolved(run.settings).train.steps for run, process in live.items()}
        self._status.show((self._num_ended + sum(shares.values())) / max(1, self._num_runs),
                          f"{self._num_ended} of {self._num_runs} runs have ended",
                          *(f"{run.name} {share:.0%}" for run, share in shares.items()))  # fmt: skip

    def _temper(self) -> None:
        """Whatever has all it needs by now."""
        for run in [*self._to_temper]:
            model, sharp = (replace(run, arm=arm) for arm in TEMPERED_NEEDS)
            if model in self.measures and sharp in self.measures:
                self._to_temper.remove(run)
                self._try(run, lambda model=model, sharp=sharp: self._tempered(model, sharp))

    def _try(self, run: Run, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            measures = self.measures[run] = run.keep(measure())
        except (ConfigError, Hang, RunFailed) as error:
            self._fail(run, str(error))
            return
        self._status.say(f"{run.name}: truth {measures['all']['truth']:.3f}, "
                         f"greedy {measures['all']['greedy_truth']:.3f}, entropy {measures['entropy']:.3f}")

    def _fail(self, run: Run, why: str) -> None:
        self.failed.append(run)
        self._status.say(f"{run.name} FAILED: {why}")

    def _trained(self, run: Run, process: LiveRun) -> dict[str, Any]:
        if (code := process.wait()) != 0:
            raise RunFailed(f"exit code {code}; the last lines of {process.output}:\n{process.last_words()}")
        return run.exam(self._status.say).measures()

    def _tempered(self, model: Run, sharp: Run) -> dict[str, Any]:
        """The model, as certain as the sharp one to 1 %, or as nearly as it was found: both entropies are reported."""
        exam, wanted = model.exam(self._status.say), self.measures[sharp]["entropy"]
        best = known = self.measures[model]
        for _ in range(TEMPERING_ROUNDS):  # the first one's error tells the second
            temperature = exam.temperature_of_entropy(wanted, known["temperature"], known["entropy"])
            known = exam.measures(temperature)
            best = min(best, known, key=lambda measures: abs(measures["entropy"] - wanted))
            if abs(best["entropy"] - wanted) <= ENTROPY_TOLERANCE * wanted:
                break
        return best
