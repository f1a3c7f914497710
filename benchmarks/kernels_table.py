"""The tables of ``kernels.py compile`` in the README: what kernels need, what they move, how fast they could be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kernels_cases import OPS
from kernels_compile import TARGETS, Launch, Resources
from kernels_problem import Op, sizes_text
from readme_tables import write_between
from torch._subclasses.fake_tensor import FakeTensorMode

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
MARKED = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)


@dataclass(frozen=True)
class Peak:
    """Of one GPU, dense, from its vendor's data sheet."""

    source: str
    bytes_per_second: float
    bf16_per_second: float  # matrix products
    fp32_per_second: float  # everything else


PEAKS = {
    "A100": Peak("NVIDIA A100 Tensor Core GPU data sheet (80GB SXM)", 2039e9, 312e12, 19.5e12),
    "H100": Peak("NVIDIA H100 Tensor Core GPU data sheet (SXM)", 3350e9, 989.4e12, 67e12),
    "B200": Peak("NVIDIA Blackwell Architecture Technical Brief (HGX B200)", 8000e9, 2250e12, 80e12),
    "MI300X": Peak("AMD Instinct MI300X data sheet", 5300e9, 1307.4e12, 163.4e12),
}
MATRIX_PRODUCTS = ("group_consistency", "token_logprob")  # the other two have none


@dataclass(frozen=True)
class Row:
    """One launch, compiled."""

    op: str
    dtype: str
    sizes: str
    launch: Launch
    resources: Resources


def bound_seconds(op: Op, peak: Peak) -> tuple[float, float]:
    """No forward, no backward pass of ``gpu_sizes`` in bfloat16 can be faster on this GPU."""
    with FakeTensorMode():  # shapes without memory
        moved_bytes = op.problem(op.gpu_sizes, torch.bfloat16, "cpu").minimum_bytes
    per_second = peak.bf16_per_second if op.name in MATRIX_PRODUCTS else peak.fp32_per_second
    forward, backward = (max(count / peak.bytes_per_second, operations / per_second)
                         for count, operations in zip(moved_bytes, op.operations(op.gpu_sizes), strict=True))
    return forward, backward


def resource_table(rows: Sequence[Row]) -> str:
    """One line for each kernel and dtype: the largest of its launches."""
    header = ["op", "kernel", "inputs", "versions", *TARGETS, "spills", "most registers at"]
    lines = [header, ["---"] * len(header)]
    for op, kernel, dtype in dict.fromkeys((row.op, row.launch.kernel, row.dtype) for row in rows):
        of_kernel = [row for row in rows if (row.op, row.launch.kernel, row.dtype) == (op, kernel, dtype)]
        cells = []
        for target in TARGETS:
            needs = [row.resources for row in of_kernel if row.launch.target == target]
            shared_kb = max(one.shared_bytes for one in needs) / 1024
            cells.append(f"{max(one.registers for one in needs)} · {shared_kb:.3g}")
        spills = max(row.resources.private_bytes + row.resources.spilled_registers for row in of_kernel)
        versions = sum(row.launch.target == next(iter(TARGETS)) for row in of_kernel)
        largest = max(of_kernel, key=lambda row: row.resources.registers)
        lines.append([op, f"`{kernel}`", dtype, str(versions), *cells, str(spills), largest.sizes])
    return _markdown(lines)


def traffic_table(traffic: dict[str, Any]) -> str:
    """Counted bytes against the minimum."""
    lines = [["op", "at", "direction", "minimum", "moved", "moved / minimum", "of that, by"], ["---"] * 7]
    for name, of_op in traffic.items():
        for direction, minimum_bytes in of_op["minimum_bytes"].items():
            if minimum_bytes == 0:
                continue
            moved = of_op["moved_bytes"][direction]
            total = sum(moved.values())
            parts = ", ".join(f"{who} {count / total:.0%}" for who, count in Counter(moved).most_common())
            lines.append([name, of_op["sizes"], direction, _bytes(minimum_bytes), _bytes(total),
                          f"{total / minimum_bytes:.2f}", parts])
    return _markdown(lines)


def bound_table() -> str:
    """Forward / backward, microseconds."""
    lines = [["op", "at", *(f"{name} (µs)" for name in PEAKS)], ["---"] * (2 + len(PEAKS))]
    for op in OPS.values():
        cells = []
        for peak in PEAKS.values():
            forward, backward = (f"{1e6 * seconds:,.3g}" if seconds < 1e-3 else f"{1e6 * seconds:,.0f}"
                                 for seconds in bound_seconds(op, peak))
            cells.append(f"{forward} / {backward}" if backward != "0" else forward)
        lines.append([op.name, sizes_text(op.gpu_sizes), *cells])
    return _markdown(lines)


def document(rows: Sequence[Row], traffic: dict[str, Any]) -> str:
    """What stands between the markers."""
    sources = "\n".join(f"- {name}: {peak.source}" for name, peak in PEAKS.items())
    return f"""
Compiled, not run: vector registers of a thread · KB of shared memory of a program, the largest of all versions (block
sizes, sizes that 16 divides and that nothing divides; in bfloat16 and float32 with and without what is optional).
Limits: {", ".join(f"{name} {target.shared_limit_bytes // 1024} KB" for name, target in TARGETS.items())}; no spills.

{resource_table(rows)}

Bytes that kernels and the PyTorch between them ask for, counted in Triton's interpreter in float32, against the minimum
(each input read once, each output written once). Several programs that read the same count several times, though most
of that comes from the L2 cache.

{traffic_table(traffic)}

A bound, not a measurement: forward / backward in bfloat16 cannot be faster than the minimum of bytes at the published
bandwidth, nor than the arithmetic at the published dense peak (bfloat16 for matrix products, else float32; none for
`token_f1`, as each way to count has its own). The logits that `token_logprob` moves beyond its minimum are no part of
it: at these sizes arithmetic takes longer.

{sources}

{bound_table()}

"""


def write(readme: Path, text: str, *, only_check: bool) -> bool:
    """Puts ``text`` between the markers; whether it stood there already."""
    return write_between(readme, "kernels", text, only_check=only_check)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
