"""Waiting for a Ray call: with a deadline, and with errors that a reader can use."""

from __future__ import annotations

import socket
from typing import Any

from asa_dist.rollout.coordinator import RolloutFailure


class RolloutTimeout(TimeoutError):
    """A deadline passed; the message names host, duration and what was waited for."""


def wait_for(reference: Any, timeout_seconds: float | None, what: str) -> Any:
    """``ray.get`` of one reference or a list of them; ``timeout_seconds`` None waits as long as it takes.

    Raises:
        RolloutTimeout: nothing came within ``timeout_seconds``.
        RolloutFailure: the actor or object is lost.
        Exception: whatever the called method raised, as it raised it.
    """
    import ray

    try:
        return ray.get(reference, timeout=timeout_seconds)
    except ray.exceptions.GetTimeoutError:
        raise RolloutTimeout(f"host {socket.gethostname()}: waited {timeout_seconds:g} s for {what}") from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
        raise RolloutFailure(f"host {socket.gethostname()}: lost, while waiting for {what}: {error}") from None
