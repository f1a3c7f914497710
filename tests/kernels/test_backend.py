"""Which implementation runs, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from asa_kernels import segment_mean
from asa_kernels.backend import uses_triton

ON_CPU = torch.zeros(2, 3)
IMPORT = "import torch, asa_kernels; "
CALL = IMPORT + "asa_kernels.segment_mean(torch.zeros(2, 3), torch.zeros(2, dtype=int), 1, backend='triton')"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; "


def test_cpu_tensors_run_in_torch_unless_asked_for() -> None:
    """Here kernels are interpreted (tests/conftest.py), which is for tests alone: auto never chooses it."""
    assert not uses_triton("auto", ON_CPU)
    assert not uses_triton("torch", ON_CPU)
    assert uses_triton("triton", ON_CPU)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend = 'cuda' must be one of 'auto', 'triton', 'torch'"):
        segment_mean(ON_CPU, torch.zeros(2, dtype=torch.long), 1, backend="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "the tensor is on cpu: kernels run on GPUs, or, slowly, on CPU tensors in a process"),
        (WITHOUT_TRITON, "triton is not installed: use backend='auto'"),
    ],
)
def test_triton_where_it_cannot_run(before: str, message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", before + CALL], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and f"RuntimeError: backend = 'triton', but {message}" in run.stderr


def test_without_triton_torch_does_all_the_work() -> None:
    code = WITHOUT_TRITON + CALL.replace("'triton'", "'auto'")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
