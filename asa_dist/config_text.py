"""Config files as text: YAML plus ``key.sub=value`` overrides to a plain tree, and a plain tree back to YAML.

A file whose key ``base`` names another one (from its own folder) holds only what differs from that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

BASE = "base"


class ConfigError(Exception):
    """A config that cannot be used: the message names file, key, value and what is allowed."""


# What YAML 1.2 calls a number and YAML 1.1, which PyYAML reads, a text: 2e-4. (Tag, pattern, first characters.)
SCIENTIFIC = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Loader(yaml.SafeLoader):
    """safe_load with two mends: ``2e-4`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise ConfigError(f"line {node.value[index][0].start_mark.line + 1}: key {key!r} is given twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would take for numbers."""


_Loader.add_implicit_resolver(*SCIENTIFIC)
_Dumper.add_implicit_resolver(*SCIENTIFIC)


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{origin}: {line}not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a forbidden character; a date or number that does not exist
        raise ConfigError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not separator or "" in (*parents, last):
        raise ConfigError(f"override {override!r}: write key.sub=value")
    node: Any = tree
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_place(node, part, override)]
    node[_place(node, last, override)] = _parse_yaml(text, f"override {override!r}")


def _place(node: Any, part: str, override: str) -> str | int:
    """The key or index that ``part`` of an override's key means in ``node``."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"override {override!r}: there is no {part!r} below the value {node!r}")
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override {override!r}: {part!r} is not an index of a list of {len(node)}")
    return int(part)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of a YAML file, on top of its base, plus overrides; not yet validated.

    Raises:
        ConfigError: a file cannot be read, is no mapping, or is its own base; an override that cannot be applied.
    """
    tree = _with_base(Path(path), ())
    for override in overrides:
        _apply_override(tree, override)
    return tree


def _with_base(path: Path, on_top: tuple[Path, ...]) -> dict[str, Any]:
    """``on_top``: the files that have asked for this one."""
    if path.resolve() in on_top:
        raise ConfigError(f"{path}: its base leads back to itself")
    tree = _read_file(path)
    if (base := tree.pop(BASE, None)) is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r}: must be the name of a config file")
    return _merged(_with_base(path.parent / base, (*on_top, path.resolve())), tree)


def _merged(base: Any, tree: Any) -> Any:
    """Mappings key by key; whatever else ``tree`` has takes the place of the base's."""
    if not (isinstance(base, dict) and isinstance(tree, dict)):
        return tree
    return base | {key: _merged(base.get(key), value) for key, value in tree.items()}


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path}: cannot read the config: {reason}") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, not {type(tree).__name__}")
    return tree


def dump_tree(tree: dict[str, Any]) -> str:
    """YAML that :func:`read_tree` reads back unchanged."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
