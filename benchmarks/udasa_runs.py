"""The arms of benchmarks/udasa.py, and how their runs are made, taken up again, and measured.

    start        an `asa train` of alignment.yaml, MLE only; its last checkpoint, exported
    every arm    an `asa train` of udasa.yaml that begins there; for `tempered` the start model itself, sampled colder
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alignment_runs
from alignment_runs import ENTROPY_TOLERANCE, TEMPERING_ROUNDS, RunFailed, sources_digest
from live_run import ROOT, Hang, LiveRun, Progress
from world import World, WorldConfig

from asa_dist.config import Config, ConfigError

if TYPE_CHECKING:
    from udasa_measures import PlainExam

CONFIG = ROOT / "benchmarks/udasa.yaml"
START, CURRICULUM, TEMPERED = "start", "curriculum", "tempered"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Arm:
    title: str
    overrides: tuple[str, ...] = ()


ARMS = {
    CURRICULUM: Arm("UDASA, three stages"),
    "one-stage": Arm("UDASA, all pairs in one stage", ("udasa.curriculum.thresholds=[]",)),
    "random": Arm("UDASA, stages in random order", ("udasa.curriculum.order=random",)),
    "semantic": Arm("three stages, by semantic uncertainty alone", ("udasa.uncertainties=[semantic]",)),
    "factual": Arm("three stages, by factual uncertainty alone", ("udasa.uncertainties=[factual]",)),
    TEMPERED: Arm("start, as certain as UDASA"),  # no run of its own
    START: Arm("start: MLE only"),
}
# Deep enough to compare an answer with what it knows; longer training learns the corpus's noise by heart.
START_OVERRIDES = (*alignment_runs.ARMS["a"].overrides, "model.architecture.num_layers=5", "train.steps=800")
PROMPTS_PER_QUESTION = 6  # of every phrasing, each with samples of its own: a single pair is mostly chance


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    world: WorldConfig
    overrides: tuple[str, ...]  # of all arms but the start
    root: Path

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.world.seed}"

    @property
    def settings(self) -> list[str]:
        """Without the paths of model and prompts."""
        own = START_OVERRIDES if self.arm == START else (*self.overrides, *ARMS[self.arm].overrides)
        return [f"seed={self.world.seed}", *own]

    def of_arm(self, arm: str) -> Run:
        return replace(self, arm=arm)

    @cached_property
    def folder(self) -> Path:
        """Named after everything that the run depends on, the code included."""
        needed = {START, self.arm, *({CURRICULUM} if self.arm == TEMPERED else ())}
        configs = {arm: _tree(self.of_arm(arm)) for arm in needed}
        asked = resolved(self.overrides).rollout.max_new_tokens  # of the exam
        depends_on = json.dumps([asdict(self.world), configs, asked, _digest()], sort_keys=True)
        return self.root / f"{self.arm}-{self.world.seed}-{hashlib.sha256(depends_on.encode()).hexdigest()[:12]}"

    @property
    def exported(self) -> Path:
        """The start model as a plain transformers folder."""
        return self.of_arm(START).folder / "model"

    @property
    def round_folder(self) -> Path:
        """What holds checkpoints."""
        return self.folder / "run" if self.arm == START else self.folder / "run/round-1"

    def start(self) -> LiveRun:
        """From the beginning, or where it was interrupted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run = LiveRun(self.folder)
        if (run.run_dir / "config.yaml").exists():
            run.start("resume", str(run.run_dir))
        elif self.arm == START:
            World(self.world).write(self.folder)
            corpus, prompts = self.folder / "corpus.jsonl", self.folder / "prompts.jsonl"
            run.start("train", str(alignment_runs.CONFIG), f"data.sources.0.path={corpus}",
                      f"rollout.prompt_file={prompts}", *self.settings, "--run-dir", str(run.run_dir))  # fmt: skip
        else:
            prompts = write_questions(self.folder / "questions.txt", World(self.world))
            run.start("train", str(CONFIG), f"model.name_or_path={self.exported}", f"rollout.prompt_file={prompts}",
                      *self.settings, "--run-dir", str(run.run_dir))  # fmt: skip
        return run

    def exam(self, progress: Progress) -> PlainExam:
        """The questions, for the model that the run has ended with. All arms may answer at equal length."""
        from udasa_measures import PlainExam

        from asa_dist.evaluation.checkpoint_model import open_checkpoint

        rollout = resolved(self.overrides).rollout
        return PlainExam(open_checkpoint(self.round_folder), World(self.world), rollout, self.world.seed, progress.say)

    @property
    def _measures_path(self) -> Path:
        return self.folder / "measures.json"

    def keep(self, measures: dict[str, Any]) -> dict[str, Any]:
        from asa_dist.runtime.checkpoint_files import write_atomically

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._measures_path, json.dumps(measures, indent=1) + "\n")
        return measures

    def kept(self) -> dict[str, Any] | None:
        path = self._measures_path
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_questions(path: Path, world: World) -> Path:
    questions = [question for fact in world.facts for question in world.questions(fact)]
    path.write_text("".join(f"{question}\n" for question in questions * PROMPTS_PER_QUESTION), encoding="utf-8")
    return path


def resolved(overrides: Sequence[str]) -> Config:
    """udasa.yaml, as :func:`alignment_runs.resolved`."""
    return alignment_runs.resolved(overrides, CONFIG)


def _tree(run: Run) -> dict[str, Any]:
    of = alignment_runs.resolved if run.arm == START else resolved
    return of(run.settings).model_dump(mode="json")


@cache
def _digest() -> str:
    """Of the code that makes a run and its measures."""
    own = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in ("udasa_runs", "udasa_measures"))
    return hashlib.sha256(b"".join([sources_digest().encode(), *own])).hexdigest()


class Comparison:
    """Trains and measures the arms of each seed one after the other; a seed that fails is told of, others go on.

    Args:
        runs: a seed's start comes first of its runs, ``tempered`` behind ``curriculum``.
        num_jobs: seeds at once.
    """

    def __init__(self, runs: Sequence[Run], num_jobs: int) -> None:
        self.failed: list[Run] = []
        self.measures: dict[Run, dict[str, Any]] = {}
        self._by_seed: dict[int, list[Run]] = {}
        for run in runs:
            self._by_seed.setdefault(run.world.seed, []).append(run)
        self._num_jobs, self._progress = num_jobs, Progress()

    def complete(self) -> None:
        """All measures that can be had."""
        import torch

        torch.set_num_threads(1)  # the other cores train
        waiting = [*self._by_seed.values()]
        live: list[tuple[Iterator[LiveRun], LiveRun]] = []
        with ExitStack() as ends:
            while waiting or live:
                going = [seed for seed, process in live if process.has_ended]
                live = [entry for entry in live if not entry[1].has_ended]
                while waiting and len(live) + len(going) < self._num_jobs:
                    going.append(self._all_of(waiting.pop(0)))
                for seed in going:
                    if (process := next(seed, None)) is not None:
                        live.append((seed, ends.enter_context(process)))
                time.sleep(POLL_SECONDS)

    def _all_of(self, runs: Sequence[Run]) -> Iterator[LiveRun]:
        """Each process that has to end before this generator can go on."""
        for run in runs:
            try:
                found = run.kept()
                if found is None:
                    found = run.keep(self._tempered(run) if run.arm == TEMPERED else (yield from self._trained(run)))
            except (ConfigError, Hang, RunFailed) as error:
                self.failed.append(run)
                self._progress.say(f"{run.name} FAILED: {error}")
                if run.arm in (START, CURRICULUM):
                    return  # the others need it
                continue
            self.measures[run] = found
            self._progress.say(f"{run.name}: truth {found['all']['truth']:.3f}, greedy "
                               f"{found['all']['greedy_truth']:.3f}, entropy {found['entropy']:.3f}")  # fmt: skip

    def _trained(self, run: Run) -> Iterator[LiveRun]:
        """Returns its measures."""
        process = run.start()
        self._progress.say(f"{run.name} has begun")
        yield process
        if (code := process.wait()) != 0:
            raise RunFailed(f"exit code {code}; the last lines of {process.output}:\n{process.last_words()}")
        return _measured(run, self._progress)

    def _tempered(self, run: Run) -> dict[str, Any]:
        """The start model, as certain as UDASA's to 1 %, or as nearly as it was found: both entropies are reported."""
        exam, wanted = run.of_arm(START).exam(self._progress), self.measures[run.of_arm(CURRICULUM)]["entropy"]
        best = known = self.measures[run.of_arm(START)]
        for _ in range(TEMPERING_ROUNDS):  # the first one's error tells the second
            temperature = exam.temperature_of_entropy(wanted, known["temperature"], known["entropy"])
            known = exam.measures(temperature)
            best = min(best, known, key=lambda measures: abs(measures["entropy"] - wanted))
            if abs(best["entropy"] - wanted) <= ENTROPY_TOLERANCE * wanted:
                break
        return best


def _measured(run: Run, progress: Progress) -> dict[str, Any]:
    """Of a run that has ended; a start is exported, too."""
    from udasa_measures import round_measures

    from asa_dist.evaluation.export import export_run

    measures = run.exam(progress).measures()
    if run.arm != START:
        return measures | {"round": round_measures(World(run.world), run.round_folder)}
    if not run.exported.exists():
        export_run(run.folder / "run", run.exported)
    return measures
