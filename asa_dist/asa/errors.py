"""The one exception of the maths and the loop."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on; raised on every rank alike, before an update is made."""
