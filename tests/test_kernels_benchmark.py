"""benchmarks/kernels.py without its hours: what it records, reads, counts, compares, and when it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernels_cases
import kernels_cpu
import kernels_gpu
import pytest
import torch
from kernels_cases import OPS
from kernels_problem import Call, Op, Outputs, Problem, Sizes, largest_difference
from torch import Tensor

import kernels
from asa_kernels.group_consistency import _BACKWARD_BLOCKS, _FORWARD_BLOCKS

triton = pytest.importorskip("triton")

import kernels_compile  # noqa: E402
import kernels_table  # noqa: E402
import triton.language as tl  # noqa: E402
from kernels_compile import TARGETS, Launch, Resources, compile_launch, launches_of, recorded  # noqa: E402
from kernels_traffic import PYTORCH, Traffic  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


@JITFunction  # compiled even where TRITON_INTERPRET=1
def gram_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x · xᵀ of [BLOCK, BLOCK]: its tile goes through shared memory."""
    index = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + index[:, None] * stride + index[None, :])
    tl.store(out_ptr + index[:, None] * BLOCK + index[None, :], tl.dot(tile, tl.trans(tile), input_precision="ieee"))


def gram(x: Tensor, block: int, backend: str) -> Outputs:
    out = torch.empty(block, block)
    assert x.is_cuda, "the launchers must take their branch for GPUs"
    gram_kernel[(1,)](x, out, x.stride(0), BLOCK=block, num_warps=4)
    return (out,)


def gram_op(block: int) -> Op:
    def make(sizes: Sizes, dtype: torch.dtype, device: str) -> Problem:
        return Problem((torch.ones(200, 200, dtype=dtype), sizes["B"]), (), ())

    return dataclasses.replace(
        OPS["token_f1"], name="gram", calls=(Call(make, gram, gram),), compile_sizes=({"B": block},))


def with_function(op: Op, function: Any) -> Op:
    return dataclasses.replace(op, calls=(dataclasses.replace(op.calls[0], function=function),))


def launches_for(block: int, target: str) -> list[Launch]:
    return [launch for launch, *_ in launches_of(gram_op(block)).values() if launch.target == target]


# --- compile ------------------------------------------------------------------------------------------------------
def test_what_would_be_launched_is_recorded_for_every_target() -> None:
    found = launches_of(gram_op(16))
    assert {launch.target for launch, *_ in found.values()} == set(TARGETS)
    launch, dtype, sizes = next(iter(found.values()))
    assert (launch.kernel, dtype, sizes) == ("gram_kernel", "float32", "B = 16")
    assert launch.signature == {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i32", "BLOCK": "constexpr"}
    assert launch.constexprs == {(3,): 16} and launch.options["num_warps"] == 4
    assert "BLOCK=16 num_warps=4" in launch.blocks
    divisible = [["tt.divisibility", 16]]
    assert (launch.attributes[0,], launch.attributes[2,]) == (divisible, [])  # 200 is not
    of_amd = launches_for(16, "gfx942")
    assert [["tt.pointer_range", 32] in one.attributes[0,] for one in of_amd] == [True, False], "large tensors, too"


def test_the_same_launch_is_recorded_once() -> None:
    with recorded() as launches:
        for _ in range(2):
            gram(torch.ones(200, 200), 16, "triton")
        once = len(launches)
        gram(torch.ones(208, 208), 16, "triton")  # a stride that 16 divides is another kernel
    assert (once, len(launches)) == (len(TARGETS) + 1, 2 * (len(TARGETS) + 1))


def test_an_operation_that_launches_nothing_is_not_passed_over() -> None:
    silent = with_function(gram_op(16), lambda x, block, backend: (x,))
    with pytest.raises(RuntimeError, match="gram: backend='triton' launched no kernel for B = 16"):
        launches_of(silent)


RECORD = """
import json
from kernels_cases import OPS
from kernels_compile import launches_of
print(json.dumps([
    [launch.kernel, dtype, dict(zip([list(launch.signature)[path[0]] for path in launch.constexprs],
                                    launch.constexprs.values()))]
    for launch, dtype, _ in launches_of(OPS["group_consistency"]).values()]))
"""


def test_every_entry_of_the_block_tables_is_compiled() -> None:
    """In a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    said = subprocess.run([sys.executable, "-c", RECORD], env=environment, stdout=subprocess.PIPE, text=True,
                          check=True, timeout=200).stdout
    found = json.loads(said)

    def groups(kernel: str, dtype: str, *given: str) -> set[int]:
        """Where none of these pointers is None: a None is a constant."""
        return {constants["GROUP"] for name, of_dtype, constants in found
                if (name, of_dtype) == (kernel, dtype) and not constants.keys() & set(given)}

    for dtype in ("bfloat16", "float16", "float32"):
        element_bytes = getattr(torch, dtype).itemsize
        assert {(group, element_bytes) for group in groups("_forward_kernel", dtype)} == {
            key for key in _FORWARD_BLOCKS if key[1] == element_bytes}
        for kernel in ("_pair_gradient_kernel", "_embedding_gradient_kernel"):
            assert groups(kernel, dtype) == set(_BACKWARD_BLOCKS)
    for dtype in ("bfloat16", "float32"):
        trainers = groups("_embedding_gradient_kernel", dtype, "valid_ptr_PG", "d_embedding_ptr_PGD", "d_w_ptr_C2D")
        assert trainers == set(_BACKWARD_BLOCKS)


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_resources_are_the_compilers(target: str) -> None:
    """In processes of their own: once kernels have been interpreted, this one compiles none."""
    launches = [launches_for(block, target)[0] for block in (16, 64)]
    small, large = kernels.in_processes(compile_launch, launches, num_processes=1)
    assert isinstance(small, Resources) and isinstance(large, Resources)
    assert small.registers > 0 and not small.over_limits(target)
    assert large.shared_bytes >= 64 * 64 * 4 > small.shared_bytes


def test_every_kind_of_excess_is_named() -> None:
    assert Resources(255, 0, 163 * 1024).over_limits("sm_80") == []
    assert "spills: 8 bytes" in Resources(255, 8, 0).over_limits("sm_80")[0]
    assert "3 registers" in Resources(255, 0, 0, spilled_registers=3).over_limits("gfx942")[0]
    assert "shared memory" in Resources(255, 0, 64 * 1024 + 1).over_limits("gfx942")[0]
    assert "tensor memory" in Resources(255, 0, 0, tensor_memory_columns=513).over_limits("sm_100")[0]


def test_a_kernel_over_a_limit_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("untouched", encoding="utf-8")
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(kernels, "README", readme)
    monkeypatch.setattr(kernels_cases, "OPS", {"gram": gram_op(64)})
    limits = {name: dataclasses.replace(target, shared_limit_bytes=4096) for name, target in TARGETS.items()}
    monkeypatch.setattr(kernels_compile, "TARGETS", limits)
    assert kernels.main(["compile"]) == 1
    said = capsys.readouterr()
    assert "gram: gram_kernel (float32, B = 64; BLOCK=64" in said.err and "sm_80 has 4096" in said.err
    assert json.loads(said.out)["ok"] is False
    assert readme.read_text(encoding="utf-8") == "untouched"


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        kernels.main(["compile"])


# --- tables -------------------------------------------------------------------------------------------------------
def test_tables_are_written_between_markers_or_compared(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    around = f"before\n{kernels_table.BEGIN}\n%s{kernels_table.END}\nafter\n"
    readme.write_text(around % "old\n", encoding="utf-8")
    assert not kernels_table.write(readme, "new\n", only_check=True)
    assert readme.read_text(encoding="utf-8") == around % "old\n"
    assert not kernels_table.write(readme, "new\n", only_check=False)
    assert readme.read_text(encoding="utf-8") == around % "new\n"
    assert kernels_table.write(readme, "new\n", only_check=True)
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="kernels:begin"):
        kernels_table.write(readme, "new\n", only_check=True)


def test_the_readme_has_a_row_for_every_op() -> None:
    table = kernels_table.MARKED.search(kernels.README.read_text(encoding="utf-8"))
    assert table is not None
    for name in OPS:
        assert f"| {name} |" in table[0], f"{name} is missing: run `python benchmarks/kernels.py compile`"


def test_bounds_follow_from_bytes_and_operations() -> None:
    peak = kernels_table.Peak("", bytes_per_second=1e9, bf16_per_second=1e30, fp32_per_second=1e30)
    sizes = {"N": 4, "H": 8, "V": 16}
    op = dataclasses.replace(OPS["token_logprob"], gpu_sizes=sizes)
    read = 2 * (4 * 8 + 16 * 8) + 8 * 4  # hidden and weight in bfloat16, targets
    written = 4 * (4 + 4)
    assert kernels_table.bound_seconds(op, peak) == pytest.approx(
        ((read + written) / 1e9, (read + written + 2 * (4 * 8 + 16 * 8)) / 1e9))
    slow = dataclasses.replace(peak, bf16_per_second=1.0)
    assert kernels_table.bound_seconds(op, slow) == (2 * 4 * 8 * 16, 3 * 2 * 4 * 8 * 16)


# --- bytes --------------------------------------------------------------------------------------------------------
@triton.jit  # interpreted here
def scale_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every program reads x[0], too."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(x_ptr + index * 0)
    tl.store(out_ptr + index, first * tl.load(x_ptr + index, mask=index < size), mask=index < size)


def test_bytes_are_those_that_kernels_and_pytorch_touch() -> None:
    x, out = torch.ones(50), torch.empty(50)
    with Traffic() as counter, counter.of_kernels():
        scale_kernel[(4,)](x, out, 50, BLOCK=16)
        view = out.view(5, 10).T
    assert counter.bytes == {"scale_kernel": 4 * (50 + 50) + 4 * 4}
    with Traffic() as counter:
        (view + view[:1].expand(10, 5)).copy_(view)
    assert counter.bytes == {PYTORCH: 4 * (50 + 50 + 50) + 4 * (50 + 50)}


def test_bytes_of_a_gather_in_chunks_are_those_of_the_rows_taken() -> None:
    x, index = torch.ones(100, 8), torch.arange(0, 100, 2)
    with Traffic() as counter:
        out = torch.zeros_like(x)  # written
        for chunk in index.split(25):
            out[chunk] = x[chunk]  # index, rows read and written; index, rows read and written
    row_bytes, index_bytes = 4 * 8, 8
    assert counter.bytes == {PYTORCH: 100 * row_bytes + 50 * 2 * (index_bytes + 2 * row_bytes)}


def test_a_product_that_overwrites_does_not_read_what_was_there() -> None:
    out, left, right = torch.ones(30, 40), torch.ones(30, 5), torch.ones(5, 40)
    for beta, passes in ((0, 1), (1, 2)):
        with Traffic() as counter:
            out.addmm_(left, right, beta=beta)
        assert counter.bytes == {PYTORCH: 4 * (30 * 5 + 5 * 40 + passes * 30 * 40)}


# --- cpu ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPS)
def test_all_variants_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)  # torch.compile takes a minute
    functions = kernels_cpu.variants(OPS[name])
    assert set(functions) == {kernels_cpu.OURS, kernels_cpu.NAIVE}
    problem = OPS[name].problem(OPS[name].short_sizes, torch.float32, "cpu")
    assert kernels_cpu.disagreement(problem, functions) is None


def test_a_variant_that_computes_something_else_gets_no_time() -> None:
    op = with_function(OPS["segment_mean"], lambda hidden, segmentations, backend: tuple(
        1.01 * pooled for pooled in OPS["segment_mean"].naive(hidden, segmentations)))
    problem = op.problem(op.short_sizes, torch.float32, "cpu")
    result = kernels_cpu.times(op, problem, repeats=1)
    assert list(result) == ["wrong"] and "'torch path' differs" in result["wrong"]


def test_without_a_compiler_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert "torch.compile needs a C++ compiler" in str(kernels_cpu.why_not_compiled())


def test_peak_memory_is_what_the_call_needs_beside_its_inputs() -> None:
    megabytes = 64
    inputs = torch.ones(megabytes, 2**18)
    problem = Problem((inputs,), (), ())
    peak = kernels_cpu.peak_bytes(problem, lambda x: ((x + 1).sum().unsqueeze(0),))
    assert peak / 2**20 == pytest.approx(megabytes, rel=0.2)


@pytest.mark.parametrize(("seconds", "peak_bytes", "kept"), [
    (0.19, 24 * 2**20, True), (0.21, 24 * 2**20, False), (0.19, 26 * 2**20, False)])
def test_a_promise_is_for_time_and_memory(
    seconds: float, peak_bytes: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, naive = kernels_cpu.OURS, kernels_cpu.NAIVE

    def child(what: str, op: str, sizes: Any, options: Any, variant: str = "") -> Any:
        return {ours: seconds, naive: 1.0} if what == "time" else {ours: peak_bytes, naive: 100 * 2**20}[variant]

    monkeypatch.setattr(kernels_cpu, "_child", child)
    result = kernels_cpu.compare_op(OPS["group_consistency"], SimpleNamespace(short=False))
    assert result["ok"] is kept
    assert result["time_ratio"] == {"to naive": seconds}
    assert kernels_cpu.compare_op(OPS["group_consistency"], SimpleNamespace(short=True))["ok"] is True


# --- gpu ----------------------------------------------------------------------------------------------------------
def test_without_a_gpu_it_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(["gpu"]) == 0
    said = capsys.readouterr()
    assert "no GPU here: nothing checked, nothing measured" in said.err
    assert json.loads(said.out)["skipped"] == "no GPU"


def test_wrong_results_get_no_speeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(kernels_gpu, "errors", lambda device, progress: ["token_f1: result 0 is off"])
    monkeypatch.setattr(kernels_gpu, "speeds", lambda progress: pytest.fail("measured"))
    assert kernels.main(["gpu"]) == 1
    said = capsys.readouterr()
    assert "token_f1: result 0 is off" in said.err
    assert "speeds" not in json.loads(said.out)


def test_what_differs_when_it_is_measured_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"sizes": "N = 1", "kernels": {"forward_ms": 1.0}, "eager": {"wrong": ["result 0 is off"]}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(kernels_gpu, "errors", lambda device, progress: [])
    monkeypatch.setattr(kernels_gpu, "speeds", lambda progress: {"token_f1": figures})
    assert kernels.main(["gpu"]) == 1
    said = capsys.readouterr()
    assert "token_f1: eager: result 0 is off" in said.err
    assert json.loads(said.out)["speeds"]["token_f1"] == figures


def test_what_differs_is_not_measured() -> None:
    """Would it be, it would fail: there is no GPU."""
    op = OPS["segment_mean"]
    problem = op.problem(op.short_sizes, torch.float32, "cpu")
    doubled = kernels_cpu.forward_backward(problem, lambda *inputs: tuple(2 * mean for mean in op.naive(*inputs)))
    result = kernels_gpu.measured(problem, op.naive, doubled, 0.1, ("forward",))
    assert list(result) == ["wrong"] and len(result["wrong"]) == 3, "two outputs, one gradient"


CALLS = [(op, call) for op in OPS.values() for call in (*op.calls, *op.hard_calls)]


@pytest.mark.parametrize(("op", "call"), CALLS, ids=[f"{op.name}-{call.make.__name__}" for op, call in CALLS])
def test_kernels_pass_its_check(op: Op, call: Call) -> None:
    dtype = op.dtypes[0]
    problem = call.make(op.check_sizes[0], dtype, "cpu")
    assert kernels_gpu.errors_of(call, problem, kernels_gpu.LARGEST_ERROR[dtype]) == []


@pytest.mark.parametrize("name", OPS)
def test_wrong_kernels_do_not(name: str) -> None:
    op = OPS[name]
    problem = op.problem(op.check_sizes[0], torch.float32, "cpu")
    wrong = with_function(op, lambda *arguments, backend: tuple(
        1.001 * output for output in op.calls[0].function(*arguments, backend=backend)))
    num_results = len(problem.output_gradients) + len(problem.differentiable)
    assert len(kernels_gpu.errors_of(wrong.calls[0], problem, 1e-4)) == num_results, "every output, every gradient"


def test_kernels_that_give_other_bits_do_not() -> None:
    op, turns = OPS["token_f1"], iter((1.0, 1.0 + 1e-6))
    problem = op.problem(op.check_sizes[0], torch.float32, "cpu")
    restless = with_function(op, lambda *arguments, backend: tuple(
        next(turns) * output for output in op.calls[0].function(*arguments, backend=backend)))
    assert kernels_gpu.errors_of(restless.calls[0], problem, 1e-4) == ["result 0 has other bits the second time"]


def test_not_a_number_is_a_difference() -> None:
    assert not largest_difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) <= 1.0
