"""What trained.jsonl says: which prompts were trained on, beside those that were to be. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any


@dataclass(frozen=True)
class Ledger:
    """Prompts, or with UDASA their pairs, by what became of them."""

    steps: int  # the last one in trained.jsonl
    trained: int  # prompts, each counted once
    lost: list[int]  # ids that were due in a step that is over, and were not trained on in it
    repeated: list[int]  # ids trained on once more than they were due
    skipped_steps: int  # without an update: a loss or gradient was not finite


def tally(rows: Iterable[dict[str, Any]], prompts_per_step: int) -> Ledger:
    """Of ASA-LLM: step s trains the prompts (s − 1) P … s P − 1. One byte per prompt, so that long runs fit.

    Args:
        rows: those of trained.jsonl.
    """
    times_trained = bytearray()  # by prompt id; at most 2
    steps = skipped_steps = 0
    for row in rows:
        steps = max(steps, row["step"])
        skipped_steps += bool(row.get("skipped"))
        size = max(steps * prompts_per_step, *(1 + prompt_id for prompt_id in row["prompt_ids"]))
        times_trained.extend(bytes(max(0, size - len(times_trained))))
        for prompt_id in row["prompt_ids"]:
            times_trained[prompt_id] = min(2, times_trained[prompt_id] + 1)
    return Ledger(
        steps=steps,
        trained=len(times_trained) - times_trained.count(0),
        lost=_positions(times_trained, 0),
        repeated=_positions(times_trained, 2),
        skipped_steps=skipped_steps,
    )


def _positions(values: bytearray, value: int) -> list[int]:
    if not values.count(value):
        return []  # as it should be, without a look at each of millions
    return [position for position, found in enumerate(values) if found == value]


def tally_planned(rows: Iterable[dict[str, Any]], due_by_step: Iterable[list[int]] | None) -> Ledger:
    """Of UDASA, step by step: a pair trained in another step than its own is lost in the one, repeated in the other.

    Args:
        rows: those of trained.jsonl.
        due_by_step: prompt ids of the pairs of each step, from the first to the last one there is to be; None: nobody
            can tell, so that nothing is found to be lost or repeated.
    """
    trained: dict[int, Counter[int]] = {}  # prompt ids, by step
    skipped_steps = 0
    for row in rows:
        trained.setdefault(row["step"], Counter()).update(row["prompt_ids"])
        skipped_steps += bool(row.get("skipped"))
    steps = max(trained, default=0)
    lost: set[int] = set()
    repeated: set[int] = set()
    dues = () if due_by_step is None else _endless(due_by_step, steps)
    for step, due in enumerate(dues, start=1):
        wanted, found = Counter(due), trained.get(step, Counter())
        lost.update(wanted - found)
        repeated.update(found - wanted)
    return Ledger(steps, len(set().union(*trained.values())), sorted(lost), sorted(repeated), skipped_steps)


def _endless(due_by_step: Iterable[list[int]], steps: int) -> Iterator[list[int]]:
    """Of so many steps; behind the last one that there is to be nothing is due."""
    return islice(chain(due_by_step, repeat(list[int]())), steps)
