"""Something happens before the n-th thing that code does to the disk: another process comes in between, or a kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

STEPS = [(os, "rename"), (os, "replace"), (os, "mkdir"), (os, "fsync"), (os, "open"), (os, "utime"),
         (shutil, "rmtree"), (shutil, "copyfile")]  # fmt: skip


@contextmanager
def before_disk_step(number: int, action: Callable[[], None]) -> Iterator[None]:
    """``action`` runs once, if there are so many steps; what it does itself is not counted."""
    done = 0
    is_outside = True

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal done, is_outside
            if is_outside:
                is_outside = False
                try:
                    done += 1
                    if done == number:
                        action()
                finally:
                    is_outside = True
            return function(*arguments, **options)

        return act

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, watched(getattr(module, name)))
        yield
