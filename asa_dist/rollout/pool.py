"""Ray actors of one kind that work through tasks; one that dies, raises or passes its deadline is replaced.

    submit ──► waiting ──► an actor's work(task) ──► collect: (task, result)
                 ▲                  │
                 └── first again ───┘ its actor is gone; the slot's next one starts as `supervisor.Slot` says

All of it happens in the thread that calls, within `collect`: whoever uses pools calls it until they are no longer busy,
and waits with `wait_for_any` in between. Which actor gets which task is chance; what comes out must not depend on it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from asa_dist.rollout.calls import loss
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.supervisor import POLL_SECONDS, Slot

Task = TypeVar("Task")
Result = TypeVar("Result")
OnEvent = Callable[[str, dict[str, Any]], None]


class PoolActor(Protocol):
    """What an actor's class has; its ``__init__`` only remembers."""

    def start(self) -> None:
        """Called once, before any work: loads what it takes."""

    def work(self, task: Any) -> Any:
        """One task; the same task gives the same result, whoever works on it, however often."""


@dataclass
class _Member:
    """A living actor, and what it was asked last."""

    slot: Slot
    actor_id: str
    actor: Any
    call: Any  # reference of what start or work gives; None: idle
    phase: str
    timeout_seconds: float  # of the call
    called_seconds: float
    task: Any = None  # None: it starts, or is idle
    num_done: int = 0

    @property
    def is_overdue(self) -> bool:
        return self.call is not None and time.monotonic() > self.called_seconds + self.timeout_seconds


class ActorPool(Generic[Task, Result]):
    """
    Args:
        name: of the kind; its actors are called NAME-0, NAME-1, …, and those after them NAME-0.1, NAME-0.2, …
        size: actors at the same time, at most. None starts before there is work for it.
        create_actor: makes the Ray handle of a new :class:`PoolActor`.
        describe: what is done with a task, for messages: "scoring prompts 4 to 7".
        final_errors: what an actor may raise so that trying again would not help: it ends the work.
        start_timeout_seconds, task_timeout_seconds: deadlines of start (Ray's own time to place the actor included)
            and of each task.
        max_deaths_in_a_row: so many without finishing any task, and a slot is given up; the last one ends the work.
        on_event: called with worker_started, worker_died and worker_given_up, each with the actor's id, and the reason.
    """

    def __init__(
        self, name: str, size: int, create_actor: Callable[[], Any], describe: Callable[[Task], str], *,
        final_errors: tuple[type[Exception], ...], start_timeout_seconds: float, task_timeout_seconds: float,
        max_deaths_in_a_row: int, on_event: OnEvent,
    ) -> None:
        self._name = name
        self._create_actor = create_actor
        self._describe = describe
        self._final_errors = final_errors
        self._start_timeout_seconds = start_timeout_seconds
        self._task_timeout_seconds = task_timeout_seconds
        self._max_deaths_in_a_row = max_deaths_in_a_row
        self._on_event = on_event
        self._slots = [Slot(f"{name}-{index}", max_deaths_in_a_row) for index in range(size)]
        self._members: list[_Member] = []
        self._waiting: deque[Task] = deque()
        self._failure: Exception | None = None

    def submit(self, task: Task) -> None:
        self._waiting.append(task)

    @property
    def is_busy(self) -> bool:
        """Whether a task is still to be finished."""
        return bool(self._waiting) or any(member.task is not None for member in self._members)

    @property
    def calls(self) -> list[Any]:
        """References of what its actors are doing."""
        return [member.call for member in self._members if member.call is not None]

    def collect(self) -> list[tuple[Task, Result]]:
        """Every task finished since the last time; hands out others and replaces actors. Does not wait.

        Raises:
            RolloutFailure: every slot is given up; with their last reasons.
            Exception: one of ``final_errors``, as an actor raised it.
        """
        import ray

        if self._failure is not None:  # it came beside results, and these first
            raise self._failure
        ended = set(ray.wait(self.calls, num_returns=len(self.calls), timeout=0)[0]) if self.calls else set()
        finished: list[tuple[Task, Result]] = []
        for member in list(self._members):
            if member.call in ended:
                self._take(member, finished)
            elif member.is_overdue:
                self._bury(member, f"not done within {member.timeout_seconds:g} s")
        self._hand_out()
        return finished

    def close(self) -> None:
        """Ends every actor, whatever it does."""
        import ray

        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()

    def _take(self, member: _Member, finished: list[tuple[Task, Result]]) -> None:
        import ray

        try:
            result = ray.get(member.call)  # it has ended: no wait
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self._final_errors):
                self._failure = error.cause
            self._bury(member, f"{type(error.cause).__name__}: {error.cause}")
        except ray.exceptions.RayError as error:
            self._bury(member, f"its process ended: {loss(error)}")
        else:
            if member.task is not None:
                finished.append((member.task, result))
                member.num_done += 1
            member.task = member.call = None

    def _hand_out(self) -> None:
        for member in self._members:
            if member.call is None and self._waiting:
                member.task = self._waiting.popleft()
                member.phase, member.timeout_seconds = self._describe(member.task), self._task_timeout_seconds
                member.call, member.called_seconds = member.actor.work.remote(member.task), time.monotonic()
        num_starting = sum(member.call is not None and member.task is None for member in self._members)
        for slot in self._slots:
            if num_starting < len(self._waiting) and slot.start_is_due(time.monotonic()):
                self._start(slot)
                num_starting += 1

    def _start(self, slot: Slot) -> None:
        actor_id, actor = slot.start(), self._create_actor()
        self._members.append(_Member(
            slot, actor_id, actor, actor.start.remote(), "starting", self._start_timeout_seconds, time.monotonic()))
        self._on_event("worker_started", {"worker": actor_id})

    def _bury(self, member: _Member, what_happened: str) -> None:
        import ray

        ray.kill(member.actor)
        self._members.remove(member)
        if member.task is not None:
            self._waiting.appendleft(member.task)
        reason = f"while {member.phase}: {what_happened}"
        member.slot.died(time.monotonic(), member.num_done, reason)
        event = {"worker": member.actor_id, "reason": reason}
        self._on_event("worker_died", event)
        if member.slot.given_up:
            self._on_event("worker_given_up", event)
        if self._failure is None and all(slot.given_up for slot in self._slots):
            reasons = "; ".join(f"{slot.name}, {slot.last_reason}" for slot in self._slots)
            self._failure = RolloutFailure(
                f"every {self._name} died {self._max_deaths_in_a_row} times in a row without finishing anything. "
                f"The last reasons: {reasons}")


def wait_for_any(pools: Sequence[ActorPool[Any, Any]]) -> None:
    """Until an actor is done with what it does, at most ``POLL_SECONDS``: meanwhile deadlines pass, starts are due."""
    import ray

    if calls := [call for pool in pools for call in pool.calls]:
        ray.wait(calls, num_returns=1, timeout=POLL_SECONDS)
    elif any(pool.is_busy for pool in pools):
        time.sleep(POLL_SECONDS)
