"""The one exception of this package."""

from __future__ import annotations


class DataError(Exception):
    """A corpus, tokenizer or prompt file that cannot be used: the message says what, where and what to do."""
