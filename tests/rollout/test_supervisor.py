"""When a worker's successor starts, and when none does."""

from __future__ import annotations

import pytest

from asa_dist.rollout.supervisor import Slot


def seconds_until_start(slot: Slot, now_seconds: float) -> float:
    """In half seconds."""
    return next(k / 2 for k in range(1000) if slot.start_is_due(now_seconds + k / 2))


def test_every_worker_has_an_id_of_its_own_and_a_slot_has_one_at_a_time() -> None:
    slot = Slot("worker-3", max_deaths_in_a_row=9)
    for now_seconds, worker_id in enumerate(("worker-3", "worker-3.1", "worker-3.2")):
        assert slot.start_is_due(now_seconds)
        assert slot.start() == worker_id
        assert not slot.start_is_due(now_seconds + 1e9)
        slot.died(now_seconds, num_delivered=1, reason="because")
        assert slot.last_reason == "because"


def test_back_off_grows_with_deaths_in_a_row() -> None:
    slot = Slot("worker-0", max_deaths_in_a_row=99)
    for expected_seconds in (0, 1, 2, 4, 8, 16, 32, 60, 60):
        slot.start()
        slot.died(100.0, num_delivered=0, reason="")
        assert seconds_until_start(slot, 100.0) == expected_seconds
    slot.start()
    slot.died(200.0, num_delivered=1, reason="")  # a lease delivered: the row ends
    assert seconds_until_start(slot, 200.0) == 0
    slot.start()
    slot.died(300.0, num_delivered=0, reason="")
    assert seconds_until_start(slot, 300.0) == 0


@pytest.mark.parametrize("max_deaths_in_a_row", [1, 3])
def test_given_up(max_deaths_in_a_row: int) -> None:
    slot = Slot("worker-0", max_deaths_in_a_row)
    for deliveries in (1, *[0] * max_deaths_in_a_row):  # a death after a delivery does not count
        assert not slot.given_up
        slot.start()
        slot.died(0.0, deliveries, reason="")
    assert slot.given_up
    assert not slot.start_is_due(1e9)


def test_after_a_replacement_nothing_of_before_counts() -> None:
    slot = Slot("worker-0", max_deaths_in_a_row=2)
    for _ in range(2):
        slot.start()
        slot.died(100.0, num_delivered=0, reason="")
    assert slot.given_up
    slot.start_anew()
    assert slot.start_is_due(100.0) and slot.start() == "worker-0.2"
    assert not slot.start_is_due(1e9)
    slot.died(100.0, num_delivered=0, reason="")
    assert not slot.given_up and seconds_until_start(slot, 100.0) == 0
