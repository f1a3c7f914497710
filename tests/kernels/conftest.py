"""What every kernel is tested with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def scratch_is_nan() -> Iterator[None]:
    """What ``torch.empty`` returns holds NaN: whoever reads it before writing it is seen."""
    torch.use_deterministic_algorithms(True)  # fills as well, as torch.utils.deterministic has it by default
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def addresses_are_free(scratch_is_nan: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of gigabytes takes the memory of only those pages that are written: so nothing fills it."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
