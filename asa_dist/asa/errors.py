"""What ends training on every rank: an error of its own, or no more rollouts."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot go on; raised on every rank alike."""


class RolloutsUnavailable(Exception):
    """There will be no rollouts for a step; what was trained so far is sound. The message is for the user."""
