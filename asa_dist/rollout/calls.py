"""Waiting for a Ray call: with a deadline, and with errors that a reader can use."""

from __future__ import annotations

import socket
from typing import Any

from asa_dist.rollout.coordinator import RolloutFailure


class RolloutTimeout(TimeoutError):
    """A deadline passed; the message names who waited, on which host, how long and what for."""


def wait_for(reference: Any, timeout_seconds: float, who: str, what: str) -> Any:
    """``ray.get`` of one reference or a list of them.

    Args:
        who, what: for messages: "rank 0 of 2", "the rollouts of step 3".

    Raises:
        RolloutTimeout: nothing came within ``timeout_seconds``.
        RolloutFailure: the actor, the object or Ray itself is lost.
        Exception: whatever the called method raised, as it raised it.
    """
    import ray

    try:
        return ray.get(reference, timeout=timeout_seconds)
    except ray.exceptions.GetTimeoutError:
        raise RolloutTimeout(timed_out(timeout_seconds, who, what)) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        message = f"{who}, host {socket.gethostname()}: lost, while waiting for {what}: {loss(error)}"
        raise RolloutFailure(message) from None


def timed_out(timeout_seconds: float, who: str, what: str) -> str:
    return f"{who}, host {socket.gethostname()}: waited {timeout_seconds:g} s for {what}"


def loss(error: Exception) -> str:
    """What Ray says at last, without the description of the actor before it and the guesses at causes behind it."""
    return str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
