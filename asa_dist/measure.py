"""What `asa` starts to measure a round of UDASA: responses to every prompt, and how uncertain each is.

    asa train CONFIG                            starts this for every round, then the trainers
    python -m asa_dist.measure ROUND_FOLDER …   what `asa` then runs, while it holds the folder; starts Ray here
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asa_dist.config import Config, ConfigError, load_config
from asa_dist.runtime.stopping import ENDED_EARLY, EXIT_BAD_CONFIG, EXIT_ENDED_EARLY, EXIT_FAILED, StopRequests

if TYPE_CHECKING:
    from asa_dist.rollout.measuring import MeasuringConfig

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal
OBJECT_STORE_BYTES = 512 * 2**20  # for bundles of texts under way


class Stopped(Exception):
    """The measuring is to end before it is complete; ``code``: of ``StopRequests.code``."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m asa_dist.measure", description="Measures one round of a UDASA run."
    )
    parser.add_argument("round_folder", type=Path, help="with the round's config.yaml")
    parser.add_argument("--policy-version", type=int, required=True, metavar="N", help="the round, from 0")
    parser.add_argument("--started-at", type=float, metavar="SECONDS", help="Unix time at which the run was started")
    parser.add_argument("--ray-address", help="host:port of a running Ray; without it one is started here")
    return parser.parse_args(arguments)


def measure_round(
    config: Config, folder: Path, policy_version: int, stopping: StopRequests, address: str | None
) -> None:
    """Measures what is missing; ``folder/measured.json`` says that nothing is.

    Raises:
        Stopped: as ``stopping`` wants it.
        as :func:`asa_dist.rollout.measuring.measure`; ConfigError, DataError: prompts, model or files that cannot be
        used.
    """
    from asa_dist.estimators.build import build_estimators
    from asa_dist.rollout.measuring import MeasuringConfig, measure
    from asa_dist.runtime.data.text_prompts import read_text_prompts
    from asa_dist.runtime.data.tokenizer import load_pretrained_tokenizer
    from asa_dist.runtime.measurements import MeasurementFiles
    from asa_dist.runtime.run_log import EVENT_LOG, RunLog, event_row

    model_folder = Path(str(config.model.name_or_path))
    udasa = config.udasa
    settings = MeasuringConfig(
        config.model, config.rollout, udasa, config.seed, policy_version, config.groups_per_lease)
    prompts, left_out = read_text_prompts(
        load_pretrained_tokenizer(str(model_folder)), config.rollout, udasa.prompts,
        max_instruction_tokens=_room_for_instruction(settings, model_folder))  # fmt: skip
    files = _open_files(MeasurementFiles, folder)
    log = RunLog(folder / f"{EVENT_LOG}.jsonl")
    shown = Shown()

    def happened(name: str, details: dict[str, Any]) -> None:
        log.append(event_row(name, details))
        if told := _told(name, details):
            shown.say(told)

    def progress(line: str) -> None:
        if code := stopping.code():
            raise Stopped(code)
        shown.show(line)

    if left_out:
        happened("prompts_left_out", {"count": len(left_out), "reason": next(iter(left_out.values()))})
    try:
        with _ray(config, address):
            measure(prompts, model_folder, settings, files, build_estimators=build_estimators, on_event=happened,
                    progress=progress)  # fmt: skip
        files.complete(left_out)
    finally:
        shown.close()
        log.close()


def _room_for_instruction(settings: MeasuringConfig, model_folder: Path) -> int | None:
    """Tokens that `udasa.sampling: one_prompt` may ask with, beside the answers; None: it is not used."""
    if settings.udasa.sampling != "one_prompt":
        return None
    from transformers import AutoConfig

    trunk = AutoConfig.from_pretrained(model_folder, trust_remote_code=False)
    context_tokens = getattr(trunk, "max_position_embeddings", None)
    return sys.maxsize if context_tokens is None else context_tokens - settings.sampling.max_new_tokens


def _open_files(kind: Callable[[Path], Any], folder: Path) -> Any:
    try:
        return kind(folder)
    except ValueError as error:
        raise ConfigError(
            f"what was measured cannot be read: {error}; remove that line: what it held is measured again"
        ) from None


@contextmanager
def _ray(config: Config, address: str | None) -> Iterator[None]:
    """Connected; without an address to a Ray of its own, which ends with it."""
    from asa_dist.rollout.cluster import connection, start_local_ray
    from asa_dist.rollout.measuring import measuring_resources

    handle = None
    if address is None:
        needed = measuring_resources(config.rollout, config.udasa)
        handle = start_local_ray(needed["CPU"], needed["GPU"], OBJECT_STORE_BYTES)
        os.environ.update(handle.environment)
        address = handle.address
    with connection(address, handle):
        yield


def _told(name: str, details: dict[str, Any]) -> str:
    """What of an event a person is told at once; empty: nothing."""
    match name:
        case "worker_died":
            return f"asa: warning: {details['worker']} died {details['reason']}"
        case "worker_given_up":
            return f"asa: warning: {details['worker']} is given up"
        case "estimator_notice":
            return f"asa: warning: {details['notice']}"
        case "prompts_left_out":
            return f"asa: warning: {details['count']} prompts are left out; the first: {details['reason']}"
        case "measured":
            counts = ", ".join(f"{count:,} {what}" for what, count in details.items())
            return f"measured: {counts}"
    return ""


class Shown:
    """Progress: a live line in a terminal, a plain one now and then elsewhere."""

    def __init__(self) -> None:
        self._is_live = sys.stderr.isatty()
        self._next_seconds = 0.0

    def show(self, line: str) -> None:
        if self._is_live:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next_seconds:
            self._next_seconds = time.monotonic() + SECONDS_BETWEEN_LINES
            print(line, file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line that stays."""
        print(f"\r{message}\x1b[K" if self._is_live else message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._is_live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured, or stopped by `asa`; 1 failed; 2 config or content cannot be used; 75 ended early."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    started = time.monotonic() - (time.time() - options.started_at if options.started_at else 0.0)
    folder = options.round_folder
    try:
        config = load_config(folder / "config.yaml")
    except ConfigError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # should anything import deepspeed here: it looks for no GPU
    from asa_dist.estimators.estimator import EstimatorError
    from asa_dist.rollout.cluster import ClusterError
    from asa_dist.rollout.coordinator import RolloutFailure
    from asa_dist.runtime.data.errors import DataError

    with StopRequests(folder, 0, config.train.max_wall_time_minutes, started) as stopping:
        try:
            measure_round(config, folder, options.policy_version, stopping, options.ray_address)
        except Stopped as stopped:
            print(f"asa: stopped while measuring: {stopping.reason()}; what is measured is kept", file=sys.stderr)
            return EXIT_ENDED_EARLY if stopped.code == ENDED_EARLY else 0
        except (ConfigError, DataError) as error:
            print(f"asa: {error}", file=sys.stderr)
            return EXIT_BAD_CONFIG
        except (RolloutFailure, ClusterError, EstimatorError, OSError) as error:
            print(f"asa: {error}", file=sys.stderr)
            return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
