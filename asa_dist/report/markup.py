"""Small pieces of the page as HTML. What the run has written goes through ``escape``, always."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def table(heads: Sequence[str], lines: Iterable[str], size: str = "") -> str:
    """
    Args:
        heads: text.
        lines: HTML, a ``<tr>`` each.
        size: CSS classes that bound its height.
    """
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in heads)
    body = "".join(lines)
    return f'<div class="scroll {size}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def number(value: float, digits: int = 2) -> str:
    """For people; a dash for what is not finite."""
    return f"{round(value, digits) + 0.0:,.{digits}f}" if math.isfinite(value) else "–"  # "+ 0.0": no -0.00


def cut(text: str, max_characters: int) -> str:
    """As text; says so where it is cut."""
    if len(text) <= max_characters:
        return text
    return f"{text[:max_characters]} … (cut here: {len(text):,} characters)"
