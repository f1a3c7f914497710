"""The parts of a step: what counts as which, with a clock that stands still unless it is told."""

from __future__ import annotations

from asa_dist.asa.step_time import StepTime


class Rank:
    """Time passes only here."""

    def __init__(self) -> None:
        self.now, self.blocked = 100.0, 7.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, seconds: float) -> None:
        """In a collective."""
        self.now, self.blocked = self.now + seconds, self.blocked + seconds


def test_parts_add_up_and_a_collective_within_one_is_counted_once() -> None:
    rank = Rank()
    spent = StepTime(lambda: rank.blocked, clock=lambda: rank.now)
    with spent.part("data"):
        rank.work(1.0)
    with spent.part("wait_rollout"):
        rank.work(2.0)
        rank.wait(4.0)
    with spent.part("data"):
        rank.work(0.5)
    rank.work(8.0)
    rank.wait(16.0)
    with spent.part("publish"):
        rank.work(0.25)
    assert spent.metrics() == {
        "time/step_seconds": 31.75, "time/data_seconds": 1.5, "time/wait_rollout_seconds": 6.0,
        "time/publish_seconds": 0.25, "time/collective_seconds": 16.0, "time/compute_seconds": 8.0,
    }  # fmt: skip


def test_a_method_without_rollouts_has_no_such_parts() -> None:
    rank = Rank()
    spent = StepTime(lambda: rank.blocked, ("data",), clock=lambda: rank.now)
    rank.work(1.0)
    assert set(spent.metrics()) == {f"time/{part}_seconds" for part in ("step", "data", "collective", "compute")}
