"""Keeping rollout workers alive: who died, who is overdue, who starts when.

    every 0.5 s, in a thread of rank 0's process:
    a start is due ─────────► coordinator.register ──► a new actor, under a new id
    coordinator.newly_ready() ──► an event: which engine it has
    coordinator.overdue() ──► dismissed: its lease waits again already; it is killed, unless it ends by itself
    its run has ended ──────► coordinator.release; the next start of its slot is planned, or the slot is given up
    replace_all() ──────────► all are killed, their leases wait again; every slot starts anew, with other actors

What a death costs the run is its detection, about a second, and the engine call that it interrupted.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asa_dist.config import RolloutConfig
from asa_dist.rollout.calls import RolloutTimeout, loss, timed_out, wait_for
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.worker import stacks_file

POLL_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 60.0
LAST_WORDS_SECONDS = 3.0  # a worker that passes its own deadline has so long to write its stacks before it is killed
JOIN_SECONDS = 10.0


class Slot:
    """A place for one worker, and the rule for starting the next one. Pure: time comes as an argument, in seconds.

    The worker after the k-th death in a row without a delivered lease starts 0, 1, 2, 4, … ≤ 60 seconds later; after
    ``max_deaths_in_a_row`` of them none does.
    """

    def __init__(self, name: str, max_deaths_in_a_row: int) -> None:
        self.name = name
        self.last_reason = ""
        self._max_deaths_in_a_row = max_deaths_in_a_row
        self._deaths_in_a_row = 0
        self._num_started = 0
        self._start_seconds = -math.inf  # of the next worker; infinite while there is one

    @property
    def given_up(self) -> bool:
        return self._deaths_in_a_row >= self._max_deaths_in_a_row

    def start_is_due(self, now_seconds: float) -> bool:
        return not self.given_up and now_seconds >= self._start_seconds

    def start(self) -> str:
        """The id of the worker that starts now: "worker-0", later "worker-0.1", "worker-0.2", …"""
        worker_id = f"{self.name}.{self._num_started}" if self._num_started else self.name
        self._num_started += 1
        self._start_seconds = math.inf
        return worker_id

    def died(self, now_seconds: float, num_delivered: int, reason: str) -> None:
        """The slot's worker is gone, after ``num_delivered`` leases."""
        self.last_reason = reason
        self._deaths_in_a_row = 0 if num_delivered else self._deaths_in_a_row + 1
        backoff_seconds = 2.0 ** (self._deaths_in_a_row - 2) if self._deaths_in_a_row > 1 else 0.0
        self._start_seconds = now_seconds + min(backoff_seconds, MAX_BACKOFF_SECONDS)

    def start_anew(self) -> None:
        """There is no worker, through no fault of the next one: it starts at once, and no death counts any more."""
        self._deaths_in_a_row, self._start_seconds = 0, -math.inf


@dataclass
class _Worker:
    slot: Slot
    worker_id: str
    actor: Any
    dismissed_because: str = ""
    kill_seconds: float = math.inf  # when a dismissed worker is killed


class Supervisor:
    """Starts the workers, replaces those that die or hang, until :meth:`stop`.

    Args:
        coordinator: its Ray handle.
        create_worker: makes the actor of a worker id, not yet running.
        stacks_folder: where workers write their stacks.
        on_event: called from the supervisor's thread with worker_started, worker_ready, worker_died and
            worker_given_up, each with the worker's id, and the engine that it has built, or the reason.

    If all slots are given up, the coordinator fails, and so does every rank's take. If the coordinator is lost, the
    supervisor ends: the ranks find that out by themselves.
    """

    def __init__(self, coordinator: Any, create_worker: Callable[[str], Any], rollout: RolloutConfig,
                 stacks_folder: str, on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._coordinator = coordinator
        self._create_worker = create_worker
        self._rollout = rollout
        self._stacks_folder = stacks_folder
        self._on_event = on_event
        self._slots = [Slot(f"worker-{index}", rollout.max_deaths_in_a_row) for index in range(rollout.workers)]
        self._workers: dict[Any, _Worker] = {}  # by the reference of their run
        self._replacement: Callable[[], None] | None = None  # what the thread is asked to do between two polls
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on nothing is started or replaced."""
        self._stopping.set()
        self._thread.join(JOIN_SECONDS)  # a coordinator that does not answer holds it up: killed later, it ends both

    def replace_all(self, create_worker: Callable[[str], Any], reason: str) -> None:
        """From now on actors are made by ``create_worker``; returns when those before can deliver nothing any more.

        Raises:
            RolloutFailure: all workers are given up, or the coordinator is lost.
            RolloutTimeout: not so within ``rollout.timeout_seconds``.
        """
        replaced = threading.Event()

        def replace() -> None:
            self._create_worker = create_worker
            self._end_all(reason)
            replaced.set()

        self._replacement = replace
        deadline = time.monotonic() + self._rollout.timeout_seconds
        while not replaced.wait(POLL_SECONDS):
            if not self._thread.is_alive():
                raise RolloutFailure("the supervisor of workers has ended: they cannot be replaced")
            if time.monotonic() > deadline:
                raise RolloutTimeout(timed_out(
                    self._rollout.timeout_seconds, "rank 0", "the supervisor of workers to replace all of them"))

    def end_workers(self, grace_seconds: float) -> None:
        """After :meth:`stop`: gives the workers time to end by themselves, then ends those that are left."""
        import ray

        if runs := list(self._workers):
            ray.wait(runs, num_returns=len(runs), timeout=grace_seconds)
        for worker in self._workers.values():
            ray.kill(worker.actor)
            self._stacks(worker.worker_id)  # what was killed could not remove its own

    # --- the thread ---------------------------------------------------------------------------------------------
    def _supervise(self) -> None:
        try:
            while not self._stopping.is_set():
                self._poll()
                if all(slot.given_up for slot in self._slots):
                    reasons = "; ".join(f"{slot.name}: {slot.last_reason}" for slot in self._slots)
                    message = (f"every worker died {self._rollout.max_deaths_in_a_row} times in a row without "
                               f"delivering anything. The last reasons: {reasons}")
                    self._wait_for(self._coordinator.fail.remote("rollout", message), "note that all workers are lost")
                    return
        except (RolloutFailure, RolloutTimeout):  # of the coordinator: see the class
            return
        except Exception as error:
            self._coordinator.fail.remote("the supervisor of the rollout workers", f"{type(error).__name__}: {error}")
            raise

    def _poll(self) -> None:
        import ray

        if (replace := self._replacement) is not None:
            self._replacement = None
            replace()
        for slot in self._slots:
            if slot.start_is_due(time.monotonic()) and not self._stopping.is_set():
                self._start(slot)
        ready: dict[str, str] = self._wait_for(self._coordinator.newly_ready.remote(), "name those that are ready")
        for worker_id, engine in ready.items():
            self._on_event("worker_ready", {"worker": worker_id, "engine": engine})
        overdue: dict[str, str] = self._wait_for(self._coordinator.overdue.remote(), "name overdue workers")
        self._dismiss(overdue)
        if not self._workers:
            self._stopping.wait(POLL_SECONDS)
            return
        ended, _ = ray.wait(list(self._workers), num_returns=1, timeout=POLL_SECONDS)
        for run in ended:
            if not self._stopping.is_set():
                self._bury(run, self._workers.pop(run))

    def _start(self, slot: Slot) -> None:
        worker_id = slot.start()
        self._wait_for(self._coordinator.register.remote(worker_id), f"register {worker_id}")
        actor = self._create_worker(worker_id)
        self._workers[actor.run.remote()] = _Worker(slot, worker_id, actor)
        self._on_event("worker_started", {"worker": worker_id})

    def _dismiss(self, overdue: dict[str, str]) -> None:
        import ray

        now_seconds = time.monotonic()
        for worker in self._workers.values():
            if worker.worker_id in overdue:
                worker.dismissed_because = overdue[worker.worker_id]
                worker.kill_seconds = now_seconds + LAST_WORDS_SECONDS
            if now_seconds >= worker.kill_seconds:
                ray.kill(worker.actor)

    def _bury(self, run: Any, worker: _Worker) -> None:
        import ray

        reason = worker.dismissed_because or _last_words(run)
        if not reason:  # it was told to stop
            return
        ray.kill(worker.actor)  # its process may outlive its run
        worker_id = worker.worker_id
        self._wait_for(self._coordinator.release.remote(worker_id, reason), f"release {worker_id}")
        num_delivered = self._wait_for(self._coordinator.delivered_by.remote(worker_id), f"count {worker_id}'s leases")
        worker.slot.died(time.monotonic(), num_delivered, reason + self._stacks(worker_id))
        event = {"worker": worker_id, "reason": worker.slot.last_reason}
        self._on_event("worker_died", event)
        if worker.slot.given_up:
            self._on_event("worker_given_up", event)

    def _end_all(self, reason: str) -> None:
        """All, before the first new one starts, which may need their GPUs."""
        import ray

        for worker in self._workers.values():
            ray.kill(worker.actor)
            self._wait_for(self._coordinator.release.remote(worker.worker_id, reason), f"release {worker.worker_id}")
            self._stacks(worker.worker_id)
            self._on_event("worker_died", {"worker": worker.worker_id, "reason": reason})
        self._workers.clear()
        for slot in self._slots:
            slot.start_anew()

    def _stacks(self, worker_id: str) -> str:
        """Which deadline a dead worker passed, if it did; a file of stacks in which nothing was dumped is removed."""
        path = stacks_file(self._stacks_folder, worker_id)
        with contextlib.suppress(FileNotFoundError):
            headline, *stacks = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if stacks:
                return f"; {headline.removesuffix(':')}; its stacks: {path}"
            path.unlink()
        return ""

    def _wait_for(self, reference: Any, what: str) -> Any:
        return wait_for(reference, self._rollout.timeout_seconds, "supervisor of workers", f"the coordinator to {what}")


def _last_words(run: Any) -> str:
    """Why a run ended; "" if the coordinator had told it to."""
    import ray

    try:
        ray.get(run)  # it has ended: no wait
    except ray.exceptions.RayTaskError as error:
        return str(error.cause)
    except ray.exceptions.RayError as error:
        return f"its process ended: {loss(error)}"
    return ""
