"""The `asa` command. Imports nothing heavy: `asa --help` answers at once, a wrong config fails within seconds."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from asa_dist import __version__
from asa_dist.config import Config, ConfigError, dump_config, load_config, read_tree

EXIT_BAD_CONFIG = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asa", description="Train language models that align themselves.")
    parser.add_argument("--version", action="version", version=f"asa-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train on this machine", description="Train on this machine.")
    train.add_argument("config", type=Path, help="YAML file, e.g. configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override fields of the config")
    train.add_argument("--ranks", type=int, metavar="N", help="trainer ranks (GPUs, if the config trains on GPUs)")
    train.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/CONFIG-DATE-TIME)")
    train.add_argument("--dry-run", action="store_true", help="print resolved config, parameter counts and process layout; start nothing")
    train.set_defaults(action=train_command)
    return parser


def _load(options: argparse.Namespace) -> tuple[Config, list[str]]:
    """The config, and the overrides that make it (``--ranks`` is one of them)."""
    overrides = list(options.overrides)
    if options.ranks is not None:
        key = "gpus" if read_tree(options.config, overrides).get("train", {}).get("gpus") else "ranks"
        overrides.append(f"train.{key}={options.ranks}")
    return load_config(options.config, overrides), overrides


def train_command(options: argparse.Namespace) -> int:
    config, overrides = _load(options)
    from asa_dist.launcher import describe, run_training
    from asa_dist.rollout.cluster import ClusterError
    from asa_dist.runtime.data.errors import DataError
    from asa_dist.runtime.model import ModelError

    run_dir = options.run_dir or Path("runs") / f"{options.config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        if options.dry_run:
            print(dump_config(config) + "\n" + describe(config))
            return 0
        return run_training(config, options.config, overrides, run_dir)
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from None
    except ClusterError as error:
        print(f"asa: {error}", file=sys.stderr)
        return 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 the config or its content cannot be used."""
    options = build_parser().parse_args(arguments)
    try:
        return options.action(options)
    except ConfigError as error:
        print(f"asa: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
