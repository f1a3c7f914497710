"""A machine file: what the simulator of `scaling.py` has to know about a node.

    python benchmarks/scaling_machine.py H100x8 > mine.yaml     one that is known, to be edited
    python benchmarks/scaling.py --simulate --machine mine.yaml

YAML; its keys are those of `asa_dist.plan.machine.Machine` for a node with GPUs. Assumptions that it does not name are
those of `asa plan`. A file may begin with `base: OTHER.yaml` and hold only what differs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from asa_dist.config_text import ConfigError, dump_tree, read_tree
from asa_dist.plan.machine import ASSUMED, MACHINES, Machine
from asa_dist.plan.shape import BYTES_OF

GIVEN = {"has_gpus": True, "measured": {}}  # what is not measured here has GPUs
KEYS = [field.name for field in fields(Machine) if field.name not in GIVEN]
TEXTS, TABLES = ("name", "source"), ("peak_flops", "assumptions")
MAY_BE_ZERO = ("overlap", "hop_seconds", "reserved_bytes")
SHARES = ("overlap", *(name for name in ASSUMED if name.endswith(("_efficiency", "_share"))))


def read_machine(path: Path) -> Machine:
    """
    Raises:
        ConfigError: not readable; a key that is missing or unknown; a value that cannot be.
    """
    tree = read_tree(path)
    _check_keys(str(path), tree, KEYS, optional=("assumptions",))
    for key in TABLES:
        if not isinstance(tree.get(key, {}), dict):
            raise ConfigError(f"{path}: {key} = {tree[key]!r}: must be a mapping of names to numbers")
    for key in TEXTS:
        if not isinstance(tree[key], str) or not tree[key]:
            raise ConfigError(f"{path}: {key} = {tree[key]!r}: must be a text")
    _check_keys(f"{path}: peak_flops", tree["peak_flops"], list(BYTES_OF), optional=tuple(BYTES_OF))
    _check_keys(f"{path}: assumptions", tree.get("assumptions", {}), list(ASSUMED), optional=tuple(ASSUMED))
    tree["assumptions"] = ASSUMED | tree.get("assumptions", {})
    for key, value in _numbers(tree):
        _check_number(f"{path}: {key} = {value!r}", key.rpartition(".")[2], value)
    if not tree["peak_flops"]:
        raise ConfigError(f"{path}: peak_flops: names no dtype; known: {', '.join(BYTES_OF)}")
    return Machine(**tree, **GIVEN)


def _check_keys(where: str, tree: Mapping[str, Any], known: list[str], optional: tuple[str, ...] = ()) -> None:
    if unknown := [key for key in tree if key not in known]:
        raise ConfigError(f"{where}: unknown: {', '.join(map(str, unknown))}; known: {', '.join(known)}")
    if missing := [key for key in known if key not in tree and key not in optional]:
        raise ConfigError(f"{where}: missing: {', '.join(missing)}")


def _numbers(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat = [(key, value) for key, value in tree.items() if key not in (*TEXTS, *TABLES)]
    return flat + [(f"{key}.{name}", value) for key in TABLES for name, value in tree[key].items()]


def _check_number(what: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what}: must be a number")
    if not 0 <= value < float("inf") or (value == 0 and name not in MAY_BE_ZERO):
        raise ConfigError(f"{what}: must be finite and {'not negative' if name in MAY_BE_ZERO else 'positive'}")
    if name in SHARES and value > 1:
        raise ConfigError(f"{what}: is a share, at most 1")
    if name == "num_devices" and not isinstance(value, int):
        raise ConfigError(f"{what}: must be a whole number")


def as_file(machine: Machine) -> str:
    """What :func:`read_machine` reads as the same machine."""
    return dump_tree({key: value for key, value in asdict(machine).items() if key in KEYS})


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in MACHINES:
        sys.exit(f"scaling_machine: which machine? one of {', '.join(MACHINES)}")
    print(as_file(MACHINES[sys.argv[1]]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
