"""The config of a run beside the defaults, as flat keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from asa_dist.config import Config

INDEX = re.compile(r"\.\d+(?=\.)")
MISSING = object()


@dataclass(frozen=True)
class Setting:
    key: str
    value: Any
    default: Any  # MISSING: the schema has no such key

    @property
    def is_default(self) -> bool:
        return bool(self.value == self.default)


def settings(tree: dict[str, Any]) -> list[Setting]:
    """Every leaf of config.yaml, in its order. The entries of a list have the defaults of the default list's first."""
    defaults = dict(_leaves(Config().model_dump(), ""))
    return [Setting(key, value, defaults.get(INDEX.sub(".0", key), MISSING)) for key, value in _leaves(tree, "")]


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and any(isinstance(entry, dict) for entry in node):
        for index, entry in enumerate(node):
            yield from _leaves(entry, f"{key}.{index}")
    else:
        yield key, node
