"""The README's config table is what the schema says. Run as a program, it writes the table into the README."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asa_dist.config import Config

README = Path(__file__).parent.parent / "README.md"
REWRITE = "python -m tests.test_config_table"
BEGIN, END = "<!-- config-table:begin -->", "<!-- config-table:end -->"
MARKED = re.compile(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", re.DOTALL)
TYPES = {"integer": "int", "number": "float", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEADER = "| key | type and bounds | default | meaning |\n|---|---|---|---|\n"


def code(value: Any) -> str:
    """A value as one would write it in YAML."""
    match value:
        case None | bool():
            text = json.dumps(value)
        case int():
            text = f"{value:_}"
        case float():
            text = f"{value:g}"
        case list():
            text = f"[{', '.join(map(str, value))}]"
        case _:
            text = value
    return f"`{text}`"


def allowed(schema: dict[str, Any]) -> str:
    """Choices, or type and bounds."""
    if "anyOf" in schema:
        return " or ".join(map(allowed, schema["anyOf"]))
    if "$ref" in schema:
        return "section"
    if "enum" in schema or "const" in schema:
        return ", ".join(map(code, schema.get("enum", [schema.get("const")])))
    if schema["type"] == "array":
        return f"list of: {allowed(schema['items'])}"
    bounds = [f"{sign} {schema[name]:.3g}" if isinstance(schema[name], float) else f"{sign} {schema[name]:_}"
              for name, sign in BOUNDS.items() if name in schema]
    return " ".join([TYPES[schema["type"]], ", ".join(bounds)]).strip()


def nested(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field holds: itself, one or null, or several in a list."""
    for candidate in (schema, *schema.get("anyOf", ()), schema.get("items", {})):
        if "$ref" in candidate:
            return definitions[candidate["$ref"].rpartition("/")[2]]
    return None


def rows(section: dict[str, Any], default: dict[str, Any], key: str, definitions: dict[str, Any]) -> Iterator[str]:
    """One line per field, sections within sections by dotted key; defaults are those of the whole config."""
    for name, schema in section["properties"].items():
        inner, value, path = nested(schema, definitions), default[name], f"{key}{name}"
        is_list = isinstance(value, list) and inner is not None
        if "$ref" not in schema:
            shown = "" if inner is not None else code(value)
            yield f"| `{path}` | {allowed(schema)} | {shown} | {schema['description']} |"
        if inner is not None:
            yield from rows(inner, value[0] if is_list else value, f"{path}.0." if is_list else f"{path}.", definitions)


def render() -> str:
    schema, default = Config.model_json_schema(), Config().model_dump()
    plain = {"properties": {name: field for name, field in schema["properties"].items() if "$ref" not in field}}
    parts = [HEADER + "\n".join(rows(plain, default, "", schema["$defs"]))]
    for name, field in schema["properties"].items():
        if name not in plain["properties"]:
            lines = list(rows(nested(field, schema["$defs"]) or {}, default[name], f"{name}.", schema["$defs"]))
            summary = f"<summary><code>{name}</code>: {field['description']} ({len(lines)} keys)</summary>"
            parts.append(f"<details>\n{summary}\n\n{HEADER}" + "\n".join(lines) + "\n\n</details>")
    return "\n\n".join(parts)


def test_readme_has_the_schemas_table() -> None:
    marked = MARKED.search(README.read_text(encoding="utf-8"))
    assert marked is not None, f"README.md needs the lines {BEGIN} and {END}"
    written, schema = marked[1].splitlines(), render().splitlines()
    if written != schema:
        changes = difflib.unified_diff(written, schema, "README.md", "asa_dist/config.py", lineterm="", n=0)
        message = f"the README's config table is not the schema's; write it anew with\n  {REWRITE}"
        pytest.fail("\n".join((message, *changes)), pytrace=False)


@pytest.mark.parametrize(("key", "row"), [
    ("seed", "| `seed` | int ≥ 0, < 2_147_483_648 | `0` | of every random choice |"),
    ("nullable", "| `rollout.groups_per_lease` | int ≥ 1 or `null` | `null` | consecutive groups that a worker"),
    ("choices", "| `model.dtype` | `float32`, `bfloat16` | `float32` |"),
    ("list", "| `evaluator.principles` | list of: `relevance`, `non_repetition`, "),
    ("nested", "| `data.tokenizer.train.vocab_size` | int ≥ 260, ≤ 1_000_000 | `2_048` |"),
    ("of a list", "| `data.sources.0.weight` | float > 0 | `1` |"),
])
def test_rows_show_type_bounds_and_default(key: str, row: str) -> None:
    assert any(line.startswith(row) for line in render().splitlines()), f"{key}: no line starts with {row}"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    assert MARKED.search(text), f"README.md needs the lines {BEGIN} and {END}"
    README.write_text(MARKED.sub(lambda _: f"{BEGIN}\n{render()}\n{END}", text), encoding="utf-8")
