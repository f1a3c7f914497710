"""What has to work together: GPUs with torch, ranks with each other, Ray. Tried for real, briefly."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from asa_dist.doctor.findings import Finding
from asa_dist.doctor.processes import Outcome, attempt, finish, has_gpu_driver, start

BEST_FIRST = ("ok", "not known", "broken")


def _hostname(deadline: float) -> list[Finding]:
    name, outcome = socket.gethostname(), attempt(["hostname"], deadline)
    if outcome.state == "broken":
        advice = "only runs on several machines need it: give this host an address in /etc/hosts or DNS"
        return [Finding("hostname", "limited", f"{name}: {outcome.text}", advice)]
    return [outcome.as_finding("hostname", f"{name} is {outcome.text}", "", context=f"{name}: ")]


def _gpus(deadline: float) -> list[Finding]:
    """The driver's GPUs, whether torch can use them, what its own kernels would be built with, and NCCL on them."""
    if not has_gpu_driver():
        return [Finding("GPUs", "limited", "none: no driver is loaded"), _not_tried("NCCL", {"GPUs"})]
    outcome = attempt(["gpus"], deadline)
    if outcome.state != "ok":
        gpus = outcome.as_finding("GPUs", "", "mend torch first", context=f"{_nvidia_smi()}; torch: ")
        return [gpus, Finding("NCCL", "not known", "not tried, because of GPUs")]
    seen = json.loads(outcome.text.splitlines()[-1])
    findings = [_judge_gpus(seen)]
    if seen["cuda"] is not None:
        findings.append(_cuda_toolkit(seen["cuda"]))
    return [*findings, _nccl(seen, deadline)]


def _judge_gpus(seen: dict[str, Any]) -> Finding:
    """``seen``: what probes.find_gpus prints."""
    build = f"CUDA {seen['cuda']}" if seen["cuda"] else f"ROCm {seen['rocm']}" if seen["rocm"] else None
    versions = f"torch {seen['torch']} built for {build or 'the CPU alone'}, driver runs CUDA {seen['driver']}"
    if seen["names"]:
        return Finding("GPUs", "ok", f"{len(seen['names'])}: {', '.join(sorted(set(seen['names'])))}; {versions}")
    if build is None:
        advice = "install torch's CUDA build (pytorch.org, Get started), or train on the CPU"
    else:
        advice = f"update the driver or install a torch built for its {build[:4]}; is CUDA_VISIBLE_DEVICES empty?"
    return Finding("GPUs", "broken", f"{_nvidia_smi()}; torch finds none; {versions}", advice)


def _nccl(seen: dict[str, Any], deadline: float) -> Finding:
    """RCCL, on AMD's GPUs."""
    if not seen["names"]:
        return _not_tried("NCCL", {"GPUs"})
    if seen["nccl"] is None:
        return Finding("NCCL", "broken", "torch was built without it", "install torch from pytorch.org")
    num_ranks = min(2, len(seen["names"]))
    success, advice = f"{seen['nccl']}: {num_ranks} rank(s) added up", "see why: NCCL_DEBUG=INFO"
    return _all_reduce("nccl", num_ranks, deadline).as_finding("NCCL", success, advice, context=f"{seen['nccl']}: ")


def _nvidia_smi() -> str:
    if (path := shutil.which("nvidia-smi")) is None:
        return "a driver, but no nvidia-smi"
    query = [path, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return "; ".join(_output(query).splitlines())


def _cuda_toolkit(torch_cuda: str) -> Finding:
    """nvcc, in the places where torch looks for it. ``torch_cuda``: what torch was built for."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))
    folders = [*(f"{home}/bin" for home in homes if home), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    advice = f"install that of CUDA {torch_cuda}; only flash-attn and DeepSpeed's own ops are built with it"
    if (path := shutil.which("nvcc", path=os.pathsep.join(folders))) is None:
        return Finding("CUDA toolkit", "limited", "no nvcc", advice)
    said = _output([path, "--version"])
    if (version := re.search(r"release ([\d.]+)", said)) is None:
        return Finding("CUDA toolkit", "broken", f"{path} --version: {said[-200:]}", advice)
    found = f"{version[1]} ({path})"
    if version[1].split(".")[0] != torch_cuda.split(".")[0]:
        return Finding("CUDA toolkit", "limited", f"{found}, but torch was built with {torch_cuda}", advice)
    return Finding("CUDA toolkit", "ok", found)


def _output(command: Sequence[str]) -> str:
    """What a tool prints, or why it does not."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (ran.stdout or ran.stderr).strip() or f"{command[0]}: exit code {ran.returncode}"


def _gloo(deadline: float) -> list[Finding]:
    advice = "trainer ranks cannot talk over the loopback: is a firewall in the way?"
    return [_all_reduce("gloo", 2, deadline).as_finding("gloo", "two ranks added up", advice, is_needed=True)]


def _ray(deadline: float) -> list[Finding]:
    advice = "is there memory, /dev/shm and room in the temporary folder?"
    return [attempt(["ray"], deadline).as_finding("Ray start", "started and ended", advice, is_needed=True)]


def _all_reduce(backend: str, num_ranks: int, deadline: float) -> Outcome:
    """That of the rank that fared worst: one that waits for another knows less than the other."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        store = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    ranks = [start(["all-reduce", backend, store, str(rank), str(num_ranks)]) for rank in range(num_ranks)]
    return max((finish(rank, deadline) for rank in ranks), key=lambda outcome: BEST_FIRST.index(outcome.state))


@dataclass(frozen=True)
class Trial:
    """``stands_on``: findings; it is not tried if one of them is broken."""

    name: str
    run: Callable[[float], list[Finding]]
    stands_on: frozenset[str] = frozenset()


TRIALS = (
    Trial("hostname", _hostname),
    Trial("GPUs", _gpus),
    Trial("gloo", _gloo, frozenset({"torch", "loopback"})),
    Trial("Ray start", _ray, frozenset({"ray", "psutil", "loopback"})),
)


def run_trials(findings: Sequence[Finding], progress: Callable[[str], None], seconds: float) -> list[Finding]:
    """One finding or more of each; all have ``seconds``, side by side."""
    deadline = time.monotonic() + seconds
    broken = {finding.name for finding in findings if finding.state == "broken"}

    def run(trial: Trial) -> list[Finding]:
        if blocked := broken & trial.stands_on:
            return [_not_tried(trial.name, blocked)]
        progress(trial.name)
        return trial.run(deadline)

    with ThreadPoolExecutor(len(TRIALS)) as pool:
        return [finding for found in pool.map(run, TRIALS) for finding in found]


def _not_tried(name: str, because_of: set[str]) -> Finding:
    return Finding(name, "limited", f"not tried, because of {', '.join(sorted(because_of))}")
