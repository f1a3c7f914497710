"""What a rank does around its part in rollouts; a whole run is in tests/test_train_end_to_end.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asa_dist.collaborators import RolloutFeed
from asa_dist.config import RolloutConfig
from asa_dist.runtime.watchdog import Watchdog


class NotingClient:
    """In the place of the RolloutClient: notes when it is asked."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def take(self, step: int) -> list[Any]:
        self._calls.append("take")
        return []


@pytest.mark.parametrize(("placement", "expected"), [("shared", ["empty_cache", "take"]), ("separate", ["take"])])
def test_cached_memory_is_given_back_before_workers_wake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str, expected: list[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    with Watchdog(tmp_path, rank=1) as watchdog:
        rollout = RolloutConfig.model_validate({"placement": placement})
        client: Any = NotingClient(calls)
        engine: Any = None  # not looked at
        assert RolloutFeed(client, None, rollout, engine, watchdog).take(0) == []
    assert calls == expected
