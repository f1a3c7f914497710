"""The `asa` command. Imports nothing heavy: `asa --help` answers at once, a wrong config fails within seconds."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asa_dist import __version__
from asa_dist.config import Config, ConfigError, dump_config, load_config
from asa_dist.config_text import read_tree
from asa_dist.runtime.stopping import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asa", description="Train language models that align themselves.")
    parser.add_argument("--version", action="version", version=f"asa-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on this machine", description="Train on this machine.")
    train.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
    _add_run_options(train)
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/CONFIG-DATE-TIME)")
    train.set_defaults(action=train_command)

    resume = commands.add_parser(
        "resume", help="go on with a run", description="Go on with a run from its newest checkpoint that is complete."
    )
    resume.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    _add_run_options(resume)
    resume.set_defaults(action=resume_command)

    inspect = commands.add_parser(
        "inspect", help="what a run has done and can go on from",
        description="Ledger totals, checkpoints with their verdicts, deaths and restarts of a run. Exit code 1 if "
        "prompts were lost or repeated, or if there are checkpoints and none of them can be used.",
    )  # fmt: skip
    inspect.add_argument("run_dir", type=Path, metavar="RUN", help="run folder")
    inspect.add_argument("--json", action="store_true", help="one JSON object instead of text")
    inspect.add_argument("--quick", action="store_true", help="check sizes of checkpoint files, not their checksums")
    inspect.set_defaults(action=inspect_command)
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    command.add_argument("--ranks", type=int, metavar="N", help="trainer ranks (GPUs, if the config trains on GPUs)")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="print resolved config, parameter counts and process layout; start nothing",
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after the options; argparse by itself takes only the first batch of them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = "overrides" in options
    if unknown := [word for word in rest if not takes_overrides or word.startswith("-") or "=" not in word]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        options.overrides += rest
    return options


def _overrides(options: argparse.Namespace, path: Path) -> list[str]:
    """Those of the command line; `--ranks` is one, too. ``path``: the config they are for."""
    overrides = list(options.overrides)
    if options.ranks is not None:
        train = read_tree(path, overrides).get("train")
        trains_on_gpus = isinstance(train, dict) and bool(train.get("gpus"))
        overrides.append(f"train.{'gpus' if trains_on_gpus else 'ranks'}={options.ranks}")
    return overrides


def train_command(options: argparse.Namespace) -> int:
    config = load_config(options.config, _overrides(options, options.config))
    run_dir = options.run_dir or Path("runs") / f"{options.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _run(config, run_dir, str(options.config), options, resume=False)


def resume_command(options: argparse.Namespace) -> int:
    from asa_dist.resume import config_path, latest_step, load_run_config

    run_dir = options.run_dir
    path = config_path(run_dir)
    config = load_run_config(run_dir, _overrides(options, path))
    num_steps = config.train.steps
    step = latest_step(run_dir, num_steps)
    if step is None:
        print("there is no checkpoint yet: starting from the beginning", flush=True)
    elif step < num_steps:
        print(f"going on after step {step} of {num_steps}", flush=True)
    else:
        longer = f"asa resume {shlex.quote(str(run_dir))} train.steps=…"
        print(f"{run_dir} has finished: step {step} of train.steps = {num_steps}; to go on longer: {longer}")
        return 0
    return _run(config, run_dir, str(path), options, resume=True)


def _run(config: Config, run_dir: Path, origin: str, options: argparse.Namespace, *, resume: bool) -> int:
    """``origin``: the config's name in messages."""
    from asa_dist.launcher import assign_gpus, describe, run_training

    gpus = None if options.dry_run else assign_gpus(config, origin)
    from asa_dist.rollout.cluster import ClusterError  # seconds, from here on
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.model import ModelError

    try:
        if gpus is None:
            print(f"{dump_config(config)}\n{describe(config)}")
            return 0
        return run_training(config, run_dir, gpus, resume=resume, started_at=options.started_at)
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    except ClusterError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_FAILED


def inspect_command(options: argparse.Namespace) -> int:
    from asa_dist.inspection import as_json, as_text, inspect_run

    def show(message: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{f'checking {message}' if message else ''}\x1b[K", end="", file=sys.stderr, flush=True)

    found = inspect_run(options.run_dir, is_quick=options.quick, progress=show)
    show("")
    print(as_json(found) if options.json else as_text(found))
    return 0 if found.is_sound else EXIT_FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, or stopped as asked; 1 failed; 2 the config or its content cannot be used; 75 ended
    early, start again with `asa resume`; 128 + n stopped at once by signal n."""
    options = parse_arguments(arguments)
    options.started_at = time.time()
    try:
        return options.action(options)
    except ConfigError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
