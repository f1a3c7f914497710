"""Compiles, without a GPU, exactly what the launchers would launch on one, and reads what the compilers say it needs.

The public functions are called on CPU tensors that say they are on a GPU, while ``JITFunction.run`` is replaced:
instead of running, a kernel's arguments go through Triton's own specialisation (types, divisibility by 16, constants,
options) once for each target.
"""

from __future__ import annotations

import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from kernels_problem import Op, dtype_name, sizes_text
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_MEMORY_LIMIT_COLUMNS = 512  # of sm_100
ADDRESSES_OF_32_BITS = ["tt.pointer_range", 32]


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_limit_bytes: int  # for one program: shared memory of NVIDIA's, LDS of AMD's


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as specialised for one target; may go to another process."""

    module: str
    kernel: str
    target: str
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Two launches with the same key run the same machine code."""
        return repr((self.module, self.kernel, self.target, sorted(self.signature.items()), sorted(
            self.constexprs.items()), sorted(self.attributes.items()), sorted(self.options.items())))

    @property
    def blocks(self) -> str:
        """Its constants and warps, as in ``BLOCK_D=64 num_warps=4``."""
        names = list(self.signature)
        constants = [f"{names[path[0]]}={value}" for path, value in self.constexprs.items()]
        return " ".join([*constants, *(f"{name}={self.options[name]}" for name in ("num_warps", "num_stages"))])


@dataclass(frozen=True)
class Resources:
    """What one program needs, by the compilers' own account."""

    registers: int  # of each thread
    private_bytes: int  # of each thread's own memory, where registers are spilled to
    shared_bytes: int
    spilled_registers: int = 0  # of AMD's, scalar ones too; NVIDIA's tools count only bytes
    tensor_memory_columns: int = 0

    def over_limits(self, target: str) -> list[str]:
        limit_bytes = TARGETS[target].shared_limit_bytes
        wrong = []
        if self.private_bytes or self.spilled_registers:
            wrong.append(f"spills: {self.private_bytes} bytes of private memory, {self.spilled_registers} registers")
        if self.shared_bytes > limit_bytes:
            wrong.append(f"needs {self.shared_bytes} bytes of shared memory, {target} has {limit_bytes}")
        if self.tensor_memory_columns > TENSOR_MEMORY_LIMIT_COLUMNS:
            wrong.append(f"needs {self.tensor_memory_columns} columns of tensor memory, "
                         f"there are {TENSOR_MEMORY_LIMIT_COLUMNS}")
        return wrong


class NoProducts(TorchDispatchMode):
    """Matrix products into given memory leave it as it is: a GPU's, of low precision with float32 sums, no CPU has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "out" in kwargs and func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            return kwargs["out"]
        return func(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[dict[str, Launch]]:
    """Kernels are recorded, not run: by ``Launch.key``. Their outputs are whatever memory held."""
    launches: dict[str, Launch] = {}

    def record(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for target in TARGETS:
            for launch in specialise(kernel, target, arguments, options):
                launches[launch.key] = launch

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(torch.Tensor, "is_cuda", True), NoProducts():
        yield launches


def specialise(kernel: JITFunction, target: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Launch]:
    """As ``JITFunction.run`` does; where AMD's compiler counts on tensors of less than 2 GB, larger ones too."""
    options = {"debug": kernel.debug, "instrumentation_mode": ""} | options
    backend = make_backend(TARGETS[target].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, others = bind(*arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialisation, others)
    large = {path: [one for one in kinds if one != ADDRESSES_OF_32_BITS] for path, kinds in attributes.items()}
    kinds_of_attributes = [attributes] if large == attributes else [attributes, large]
    return [Launch(kernel.module, kernel.fn.__name__, target, signature, constexprs, kinds, dict(vars(parsed)))
            for kinds in kinds_of_attributes]


def launches_of(op: Op) -> dict[str, tuple[Launch, str, str]]:
    """Every kernel of its forward and backward at every size: the first call's in every dtype, the others' in two.

    Those are the first and the last dtype: in float16 nothing but pointers differs from bfloat16.

    Returns:
        by ``Launch.key``: the launch, and the first dtype and sizes that led to it.

    Raises:
        RuntimeError: ``backend="triton"`` launches nothing.
    """
    found: dict[str, tuple[Launch, str, str]] = {}
    for dtype in op.dtypes:
        calls = op.calls if dtype in (op.dtypes[0], op.dtypes[-1]) else op.calls[:1]
        for sizes, call in itertools.product(op.compile_sizes, calls):
            problem = call.make(sizes, dtype, "cpu")
            with recorded() as launches:
                problem.backward(call.function(*problem.arguments, backend="triton"))
            if not launches:
                raise RuntimeError(f"{op.name}: backend='triton' launched no kernel for {sizes_text(sizes)}")
            for key, launch in launches.items():
                found.setdefault(key, (launch, dtype_name(dtype), sizes_text(sizes)))
    return found


def compile_launch(launch: Launch) -> Resources | str:
    """What it needs, or why it does not compile."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constexprs, launch.attributes)
    try:
        compiled = triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options)
    except (triton.TritonError, RuntimeError) as error:
        return f"does not compile: {error}"
    read = _read_hsaco if "hsaco" in compiled.asm else _read_cubin
    return read(compiled.asm, compiled.metadata)


def _read_cubin(assembly: Any, metadata: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True,
                              check=True, timeout=60).stdout
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(figures["REG"], figures["STACK"] + figures["LOCAL"], metadata.shared,
                     tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0)


def _read_hsaco(assembly: Any, metadata: Any) -> Resources:
    """From the metadata that the assembler puts into the hsaco; there, accumulation registers are vector registers."""
    said = assembly["amdgcn"].split(".amdgpu_metadata")[1]
    figures = {name: int(value) for name, value in re.findall(r"^[\s-]*\.(\w+): +(\d+)$", said, re.MULTILINE)}
    return Resources(figures["vgpr_count"], figures["private_segment_fixed_size"],
                     metadata.shared, figures["vgpr_spill_count"] + figures["sgpr_spill_count"])
