"""The `asa` command. Imports nothing heavy: `asa --help` answers at once, a wrong config fails within seconds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asa_dist import __version__
from asa_dist.config import Config, ConfigError, dump_config, load_config
from asa_dist.config_text import read_tree

EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asa", description="Train language models that align themselves.")
    parser.add_argument("--version", action="version", version=f"asa-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train on this machine", description="Train on this machine.")
    train.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    train.add_argument("--ranks", type=int, metavar="N", help="trainer ranks (GPUs, if the config trains on GPUs)")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/CONFIG-DATE-TIME)")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print resolved config, parameter counts and process layout; start nothing",
    )
    train.set_defaults(action=train_command)
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after the options; argparse by itself takes only the first batch of them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [argument for argument in rest if argument.startswith("-") or "=" not in argument]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def _load(options: argparse.Namespace) -> Config:
    overrides = list(options.overrides)
    if options.ranks is not None:
        train = read_tree(options.config, overrides).get("train")
        trains_on_gpus = isinstance(train, dict) and bool(train.get("gpus"))
        overrides.append(f"train.{'gpus' if trains_on_gpus else 'ranks'}={options.ranks}")
    return load_config(options.config, overrides)


def train_command(options: argparse.Namespace) -> int:
    from asa_dist.launcher import assign_gpus, describe, run_training

    config = _load(options)
    gpus = None if options.dry_run else assign_gpus(config, origin=str(options.config))
    from asa_dist.rollout.cluster import ClusterError  # seconds, from here on
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.model import ModelError

    try:
        if gpus is None:
            print(f"{dump_config(config)}\n{describe(config)}")
            return 0
        run_dir = options.run_dir or Path("runs") / f"{options.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        return run_training(config, run_dir, gpus)
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    except ClusterError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 the config or its content cannot be used."""
    options = parse_arguments(arguments)
    try:
        return options.action(options)
    except ConfigError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
