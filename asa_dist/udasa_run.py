"""A whole run of UDASA on this machine: rounds of measure → pairs → train; a stage is skipped if its result is there.

    asa train ──┬── asa_dist.measure, with a Ray of its own         one after the other, each in a session of its own;
                └── deepspeed launcher ── rank 0 … rank N − 1       pairs are made, and results exported, in between
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from asa_dist.config import Config, ConfigError, dump_config
from asa_dist.launcher import (
    GpuAssignment,
    StopOnSignal,
    describe_ranks,
    launcher_command,
    rank_environment,
    report_end,
    visible_gpus,
    write_report_or_warn,
)
from asa_dist.resume import BEFORE_TRAINING, refuse_changes
from asa_dist.rollout.engine_choice import describe_engine
from asa_dist.rounds import RESULT, STAGES, Round, Stage, rounds_of, rounds_there
from asa_dist.runtime.run_lock import hold_run_folder
from asa_dist.runtime.stopping import EXIT_ENDED_EARLY


def changeable(run_dir: Path) -> tuple[str, ...]:
    """What may still change of a run: before any training, how pairs are divided and trained on."""
    return () if any(found.has_trained for found in rounds_there(run_dir)) else BEFORE_TRAINING


# --- before anything starts -------------------------------------------------------------------------------------
def describe(config: Config) -> str:
    """Parameter count and process layout.

    Raises:
        ConfigError, DataError, ModelError: what can be said already of model, tokenizer and estimators.
    """
    udasa, rollout = config.udasa, config.rollout
    curriculum = udasa.curriculum
    place = "GPU" if rollout.gpus_per_worker else "CPU"
    return (
        f"parameters\n  ψ generator: {check(config):,}\n"
        f"processes, one stage after the other; rounds: {udasa.rounds}\n"
        f"  measure: {rollout.workers} rollout worker(s) on the {place}, engine {describe_engine(rollout)}, "
        f"prompts per call: {config.groups_per_lease}, responses each: {rollout.responses_per_prompt}; "
        f"{udasa.scorers} scorer(s): {', '.join(udasa.uncertainties)}\n"
        f"  train: {describe_ranks(config)}; ZeRO stage {config.train.zero_stage}\n"
        f"    stages: {len(curriculum.thresholds) + 1}; pairs per step: at most {curriculum.pairs_per_step}; "
        f"micro-batches per rank: {config.train.accumulation_steps}"
    )


def check(config: Config, *, measures: bool = True) -> int:
    """Finds what is wrong without reading weights; gives the number of parameters. Raises as :func:`describe`.

    Args:
        measures: responses are to be measured; else estimators are not looked at.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from asa_dist.estimators.build import check_estimators
    from asa_dist.runtime.data.prompts import read_prompt_file
    from asa_dist.runtime.data.tokenizer import load_pretrained_tokenizer
    from asa_dist.runtime.model import count_parameters
    from asa_dist.runtime.preference_model import PreferenceModel
    from asa_dist.runtime.trunk import trunk_config

    name = str(config.model.name_or_path)
    tokenizer = load_pretrained_tokenizer(name)
    trunk = trunk_config(config.model, len(tokenizer), tokenizer.eos_token_id, config.data.sequence_length)
    _check_weights(Path(name))
    if measures:
        check_estimators(config.udasa, Path(name))
        read_prompt_file(Path(str(config.rollout.prompt_file)))
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(trunk, trust_remote_code=False)
        return count_parameters(PreferenceModel(lm, config.model.logprob_chunk_tokens))["psi"]


def _check_weights(folder: Path) -> None:
    """Of a folder; whether a hub name has any shows when they are loaded."""
    if folder.is_dir() and not [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        raise ConfigError(f"model.name_or_path = {str(folder)!r}: the folder holds no weights (model*.safetensors)")


def assign_gpus(config: Config, origin: str, stages: Collection[Stage] = STAGES) -> GpuAssignment:
    """The stages come one after the other, so they may have the same GPUs.

    Args:
        origin: the config's name in messages.
        stages: that are to be done.

    Raises:
        ConfigError: fewer GPUs than asked for.
    """
    rollout, udasa = config.rollout, config.udasa
    to_measure = rollout.workers * rollout.gpus_per_worker + udasa.scorers * udasa.gpus_per_scorer
    needed = max(config.train.gpus if "train" in stages else 0, to_measure if "measure" in stages else 0)
    devices = visible_gpus() if needed else []
    if len(devices) < needed:
        raise ConfigError(
            f"{origin}: train.gpus = {config.train.gpus}, and {to_measure} GPUs for rollout workers and scorers: this "
            f"machine shows {len(devices)}"
        )
    return GpuAssignment(devices[: config.train.gpus], devices[:to_measure])


# --- the run ----------------------------------------------------------------------------------------------------
def run_training(
    config: Config, run_dir: Path, gpus: GpuAssignment, *, resume: bool, started_at: float,
    stages: Collection[Stage] = STAGES,
) -> int:
    """Does what is missing, round by round; to the end, or until asked to stop. Says how to go on.

    Args:
        resume: the folder may hold a run already, which goes on.
        started_at: Unix time from which `train.max_wall_time_minutes` count.
        stages: only these, of the first round that is not finished.

    Returns:
        as :func:`asa_dist.launcher.run_training`.

    Raises:
        ConfigError, DataError, ModelError: before anything starts; a stage whose predecessor has not been done; a file
        that cannot be written.
    """
    missing = [found for found in rounds_of(config, run_dir) if not found.result.exists()]
    if missing and set(stages) != {"pairs"}:
        check(missing[0].config(config), measures="measure" in stages)
    with hold_run_folder(run_dir) as lock, _said_for_people(run_dir):
        _prepare(config, run_dir, resume)
        run = _UdasaRun(config, run_dir, gpus, lock, started_at)
        for found in rounds_of(config, run_dir):
            if found.result.exists():
                print(f"{found.name} is finished: {found.result}", flush=True)
                continue
            code = run.go_through(found, stages)
            if code is not None:
                return code
            if len(stages) < len(STAGES):
                return 0
    print(f"finished: {run_dir}; the trained model: {rounds_of(config, run_dir)[-1].result}", flush=True)
    return 0


def _prepare(config: Config, run_dir: Path, resume: bool) -> None:
    from asa_dist.runtime.checkpoint_files import write_atomically
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.wandb_log import check_wandb

    check_wandb(config.metrics)
    path = run_dir / "config.yaml"
    if path.exists():
        if not resume:
            raise DataError(
                f"{run_dir} holds a run already: go on with it by `asa resume {shlex.quote(str(run_dir))}`, or choose "
                "another folder with --run-dir"
            )
        refuse_changes(path, config, changeable(run_dir))
    write_atomically(path, dump_config(config))


@contextmanager
def _said_for_people(run_dir: Path) -> Iterator[None]:
    """What the file system refuses becomes a DataError."""
    from asa_dist.runtime.data.errors import DataError

    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or run_dir}: {error.strerror or error}") from None


class _UdasaRun:
    """What every stage needs to know."""

    def __init__(
        self, config: Config, run_dir: Path, gpus: GpuAssignment, lock: tuple[int, ...], started_at: float
    ) -> None:
        self._config, self._run_dir, self._gpus, self._lock = config, run_dir, gpus, lock
        self._started_at = started_at

    def go_through(self, found: Round, stages: Collection[Stage]) -> int | None:
        """The stages of a round; the exit code with which the run ends here, or None: it goes on."""
        config = found.config(self._config)
        with hold_run_folder(found.folder) as lock:
            for stage in STAGES:
                if found.is_done(stage, config):
                    print(f"{found.name}: {stage} is done already", flush=True)
                    continue
                if stage not in stages:
                    if set(STAGES[STAGES.index(stage):]) & set(stages):
                        raise ConfigError(
                            f"{found.name} of {self._run_dir} is not done with {stage}: "
                            f"asa udasa {stage} {shlex.quote(str(self._run_dir))}"
                        )
                    return None
                do = {"measure": self._measure, "pairs": self._pair, "train": self._train}[stage]
                if (code := do(found, config, (*self._lock, *lock))) is not None:
                    return code
        return None

    def _measure(self, found: Round, config: Config, lock: tuple[int, ...]) -> int | None:
        from asa_dist.runtime.checkpoint_files import write_atomically
        from asa_dist.runtime.stopping import forget_stop_request

        print(f"{found.name}: measuring {config.model.name_or_path}", flush=True)
        write_atomically(found.folder / "config.yaml", dump_config(config))
        forget_stop_request(found.folder, self._started_at)
        command = [sys.executable, "-u", "-m", "asa_dist.measure", str(found.folder)]
        command += ["--policy-version", str(found.index), "--started-at", repr(self._started_at)]
        with StopOnSignal(found.folder, "what is measured is kept") as stop:
            environment = {"CUDA_VISIBLE_DEVICES": ",".join(self._gpus.rollout)}
            code = stop.run(command, environment, lock, ends_with_us=True)
        if code == 0 and found.is_done("measure", config) and not stop.was_asked:
            return None
        return self._end(code, stop.killed_by, found, "what was measured is kept")

    def _pair(self, found: Round, config: Config, lock: tuple[int, ...]) -> int | None:
        from asa_dist.pairing import pair_round
        from asa_dist.runtime.run_log import EVENT_LOG, RunLog, event_row
        from asa_dist.udasa.pairs import describe_pairs

        summary = pair_round(found, config).summary
        print(f"{found.name}: {describe_pairs(summary)}", flush=True)
        log = RunLog(found.folder / f"{EVENT_LOG}.jsonl")
        without = {f"without_{reason}": count for reason, count in summary.num_unpaired.items() if count}
        log.append(event_row("paired", {"prompts": summary.num_prompts, "pairs": summary.num_pairs, **without}))
        log.close()
        return None

    def _train(self, found: Round, config: Config, lock: tuple[int, ...]) -> int | None:
        from asa_dist.run_folder import prepare_round
        from asa_dist.runtime.checkpoint_files import list_checkpoints

        was_asked = False
        if (step := found.last_step()) is None:
            is_resumed = found.has_trained or bool(list_checkpoints(found.folder))
            prepare_round(config, found.folder, started_at=self._started_at)
            command = launcher_command(config, self._gpus, found.folder, is_resumed, self._started_at)
            with StopOnSignal(found.folder) as stop:
                code = stop.run(command, rank_environment(config), lock, ends_with_us=True)
            if code != 0 or (step := found.last_step()) is None:
                if stop.killed_by is None:
                    write_report_or_warn(found.folder)
                return report_end(code, stop.killed_by, found.folder, None, self._run_dir)
            was_asked = stop.was_asked  # behind the last step: what is left of the round is done all the same
        self._export(found, step)
        write_report_or_warn(found.folder)
        is_last = found.index + 1 == self._config.udasa.rounds
        return None if is_last or not was_asked else self._end(0, None, found, f"its model is {found.result}")

    def _export(self, found: Round, step: int) -> None:
        from asa_dist.evaluation.export import export_run

        for left in found.folder.glob(f".{RESULT}.*"):  # by an export that was killed
            shutil.rmtree(left)
        export_run(found.folder, found.result, "float32", step, lambda message: None)
        print(f"{found.name}: trained: {found.result}", flush=True)

    def _end(self, code: int, killed_by: int | None, found: Round, kept: str) -> int:
        """Says how the measuring ended, and how to go on; the exit code."""
        go_on = f"{found.name}: {kept}; go on with: asa resume {shlex.quote(str(self._run_dir))}"
        if killed_by is not None:
            print(f"asa: stopped at once; {go_on}", file=sys.stderr, flush=True)
            return 128 + killed_by
        if code in (0, EXIT_ENDED_EARLY):
            print(f"{'stopped' if code == 0 else 'ended early'}; {go_on}", flush=True)
            return code
        print(f"asa: measuring failed (exit code {code}); {go_on}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code
