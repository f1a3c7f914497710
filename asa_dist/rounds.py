"""UDASA's run as folders: rounds, and which of their stages are done. A stage's result is a file that appears whole.

    RUN/config.yaml
    RUN/round-1/config.yaml        the same, but the model is what this round measures and trains
                responses.jsonl uncertainty.jsonl measured.json         measure
                pairs.parquet pairs.json                                pairs
                tokenizer/ model/ checkpoints/ metrics.jsonl …          train: as in any run folder
                result/                                                 the trained model, a plain transformers folder
    RUN/round-2/…                  starts from round-1/result
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asa_dist.config import Config, ConfigError
from asa_dist.config_text import read_tree
from asa_dist.resume import config_path
from asa_dist.runtime.checkpoint_files import LOOP, list_checkpoints, verify, verify_files
from asa_dist.runtime.measurements import MEASURED

Stage = Literal["measure", "pairs", "train"]
STAGES: tuple[Stage, ...] = ("measure", "pairs", "train")
RESULT = "result"


@dataclass(frozen=True)
class Round:
    """One round of a run; ``index`` from 0."""

    run_dir: Path
    index: int

    @property
    def folder(self) -> Path:
        return self.run_dir / f"round-{self.index + 1}"

    @property
    def name(self) -> str:
        return f"round {self.index + 1}"

    @property
    def result(self) -> Path:
        return self.folder / RESULT

    def config(self, config: Config) -> Config:
        """Of the run, made this round's."""
        if self.index == 0:
            return config
        start = str(Round(self.run_dir, self.index - 1).result.resolve())
        return config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": start})})

    def is_done(self, stage: Stage, config: Config) -> bool:
        """Whether there is nothing left to do in it. Damaged pairs count as none: they are made again, the same."""
        match stage:
            case "measure":
                return (self.folder / MEASURED).exists()
            case "pairs":
                return self._is_paired(config)
            case "train":
                return self.result.exists()

    def _is_paired(self, config: Config) -> bool:
        """With the thresholds of the config: before the first step of training others may be tried."""
        from asa_dist.runtime.data.errors import DataError
        from asa_dist.runtime.pair_files import PAIRS, read_summary

        try:
            made = read_summary(self.folder)
        except DataError:
            return False
        return made.curriculum == paired_as(config) and not verify_files(self.folder, {PAIRS: made.parquet})

    @property
    def has_trained(self) -> bool:
        """Whether a step has been made, or may have been."""
        return (self.folder / "metrics.jsonl").exists()

    def last_step(self) -> int | None:
        """Of the last checkpoint, if it stands behind the last stage of the curriculum: only the result is missing.

        None: there is something left to train, if only because the last checkpoint is damaged: every byte is verified.
        """
        import safetensors.numpy

        from asa_dist.runtime.pair_files import read_summary

        checkpoints = list_checkpoints(self.folder)
        if not checkpoints or verify(checkpoints[0].path):
            return None
        place = safetensors.numpy.load_file(checkpoints[0].path / LOOP).get("place.stage_index")
        num_stages = sum(count > 0 for count in read_summary(self.folder).summary.stage_pairs)
        return checkpoints[0].step if place is not None and int(place) == num_stages else None


def paired_as(config: Config) -> dict[str, object]:
    """What of the config decides which pair is in which stage."""
    curriculum = config.udasa.curriculum
    return {"thresholds": curriculum.thresholds, "threshold_kind": curriculum.threshold_kind}


def rounds_of(config: Config, run_dir: Path) -> list[Round]:
    return [Round(run_dir, index) for index in range(config.udasa.rounds)]


def rounds_there(run_dir: Path) -> Iterator[Round]:
    """Those that have been begun, in order."""
    index = 0
    while (found := Round(run_dir, index)).folder.is_dir():
        yield found
        index += 1


def newest_round(run_dir: Path, holds: str = "config.yaml") -> Path:
    """The folder that holds what a run has made: of UDASA its newest round, else (and for a round) itself.

    Args:
        holds: a file or folder that the round must have.

    Raises:
        ConfigError: no run folder; or UDASA's, and no round has come so far.
    """
    if read_tree(config_path(run_dir)).get("method") != "udasa" or is_round(run_dir):
        return run_dir
    found = [begun.folder for begun in rounds_there(run_dir) if (begun.folder / holds).exists()]
    if not found:
        what = "no round has begun" if holds == "config.yaml" else f"no round has {holds} yet"
        raise ConfigError(f"{run_dir}: {what}; go on with: asa resume {shlex.quote(str(run_dir))}")
    return found[-1]


def is_round(folder: Path) -> bool:
    """Whether it is a round's folder, and not that of a whole run."""
    outer = folder.resolve().parent / "config.yaml"
    return outer.is_file() and read_tree(outer).get("method") == "udasa"
