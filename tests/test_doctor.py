"""`asa doctor` on this machine, and in installations that are broken in every way that has a finding."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import psutil
import pytest

from asa_dist.doctor import Finding, as_json, as_text, every_run_can_start
from asa_dist.doctor.packages import IMPORT_NAMES, Requirement, check_packages, is_supported, parse_requirement
from asa_dist.doctor.processes import finish, start
from asa_dist.launcher import _is_alive

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 20.0  # for imports of next to nothing; what hangs takes half of it
HEAVY = {"torch", "deepspeed", "ray", "transformers", "numpy", "psutil", "pydantic", "yaml", "pyarrow", "tqdm"}
DIAGNOSE = """
import json, os, sys
if len(sys.argv) > 2:
    os.getloadavg = lambda: (float(sys.argv[2]),) * 3
from asa_dist.doctor import as_json, as_text, diagnose
steps = []
found = diagnose(steps.append, deadline_seconds=float(sys.argv[1]))
print(json.dumps(json.loads(as_json(found)) | {"modules": sorted(sys.modules), "steps": steps, "text": as_text(found)}))
"""


def diagnosis(python: Path, deadline_seconds: float, path: list[Path], load: float | None = None) -> dict[str, Any]:
    """What `asa doctor --json` would say, with findings by name. ``load``: of the machine; None = as it is."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    ran = subprocess.run(
        [python, "-P", "-c", DIAGNOSE, str(deadline_seconds), *([] if load is None else [str(load)])],
        env=environment, capture_output=True, text=True, timeout=deadline_seconds + 60, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer = json.loads(ran.stdout)
    answer["findings"] = {finding["name"]: finding for finding in answer["findings"]}
    return answer


# --- this machine -------------------------------------------------------------------------------------------------
@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.slow
def test_this_installation() -> None:
    """What CI runs on can train; and the command itself imports nothing that could be broken."""
    found = diagnosis(Path(sys.executable), 240.0, [ROOT, ROOT / "kernels"])
    findings = found["findings"]
    assert not HEAVY & set(found["modules"])
    assert found["every_run_can_start"] and "train on the CPU" in found["can"], found["text"]
    for line in importlib.metadata.requires("asa-dist") or []:
        requirement = parse_requirement(line)
        if requirement.extra is None:
            assert findings[requirement.name]["state"] == "ok", findings[requirement.name]
            assert findings[requirement.name]["found"].startswith(importlib.metadata.version(requirement.name))
    for trial in ("gloo", "Ray start"):
        tried = findings[trial]
        assert tried["state"] == "ok" or "on a busy machine" in tried["found"], tried
        assert trial in found["steps"] or "all-reduce" in found["steps"]
    for name in ("CPU", "memory", "/dev/shm", "disk (here)", "open files", "loopback", "hostname", "GPUs", "Slurm"):
        assert findings[name]["found"]


# --- broken installations -----------------------------------------------------------------------------------------
def install(folder: Path, name: str, version: str, code: str | None = "", requires: tuple[str, ...] = ()) -> None:
    """A package with metadata; ``code`` None: metadata alone."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    (info / "METADATA").write_text("".join(lines), encoding="utf-8")
    if code is not None:
        module = folder / IMPORT_NAMES.get(name, name.replace("-", "_"))
        module.mkdir()
        (module / "__init__.py").write_text(code, encoding="utf-8")


def test_an_installation_in_which_almost_everything_is_broken(tmp_path: Path) -> None:
    """A virtual environment that holds nothing but broken packages: the doctor answers in time, with all of them."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    shims = tmp_path / "shims"
    ours = (
        "torch<2.14,>=2.13", "deepspeed<0.20,>=0.19.8", "transformers<5.20,>=5.16.1", "ray<3,>=2.60",
        "datasets<6,>=5.2", "psutil>=7", 'vllm<0.33,>=0.32; extra == "vllm"', 'pytest>=9; extra == "dev"',
    )  # fmt: skip
    install(shims, "asa-dist", "0.1.0", None, ours)
    install(shims, "torch", "2.13.0+cpu", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    install(shims, "deepspeed", "0.19.8", "print(1)\nraise RuntimeError('no compiler\\nop builder: nvcc is missing')")
    install(shims, "transformers", "4.57.1")
    install(shims, "ray", "2.60.0", "import time; time.sleep(600)")
    install(shims, "psutil", "7.2.2", None)
    started = time.monotonic()
    found = diagnosis(tmp_path / "venv/bin/python", DEADLINE_SECONDS, [shims, ROOT], load=0.0)
    findings = found["findings"]
    state_and_text = {name: (finding["state"], finding["found"]) for name, finding in findings.items()}
    versions = "2.13.0+cpu (supported: <2.14,>=2.13)"
    assert state_and_text["torch"] == ("broken", f"{versions}: import torch: ended by signal 11")
    assert state_and_text["deepspeed"] == (
        "broken", "0.19.8 (supported: <0.20,>=0.19.8): import deepspeed: op builder: nvcc is missing")  # fmt: skip
    assert state_and_text["transformers"] == (
        "limited", "4.57.1 (supported: <5.20,>=5.16.1): imports, but was never tested")  # fmt: skip
    state, text = state_and_text["ray"]
    assert state == "broken" and text.startswith("2.60.0 (supported: <3,>=2.60): import ray: no answer within ")
    assert state_and_text["datasets"] == ("broken", "not installed")
    assert findings["datasets"]["advice"] == "pip install 'datasets<6,>=5.2'" and not findings["datasets"]["is_needed"]
    assert "ModuleNotFoundError: No module named 'psutil'" in findings["psutil"]["found"]
    assert state_and_text["vllm"] == ("limited", "not installed (extra vllm)") and "pytest" not in findings
    for trial, reason in (("gloo", "torch"), ("Ray start", "psutil, ray")):
        assert state_and_text[trial] == ("limited", f"not tried, because of {reason}")
    assert not found["every_run_can_start"] and found["can"] == []
    assert found["cannot"]["train on the CPU"] == "torch" and found["cannot"]["sources of kind dataset"] == "datasets"
    assert found["do"][-1] == "pip install 'datasets<6,>=5.2'", "what not every run needs comes last"
    assert {"import torch", "import ray"} <= set(found["steps"])
    assert time.monotonic() - started < 600, "it waited for ray"


def test_a_busy_machine_is_no_proof_of_a_broken_package(tmp_path: Path) -> None:
    install(tmp_path / "shims", "asa-dist", "0.1.0", None, ("ray<3,>=2.60",))
    install(tmp_path / "shims", "ray", "2.60.0", "import time; time.sleep(600)")
    found = diagnosis(Path(sys.executable), 2.0, [tmp_path / "shims", ROOT], load=1000.0)
    ray = found["findings"]["ray"]
    assert ray["state"] == "limited" and ray["found"].endswith("import ray: no answer within 1 s, on a busy machine")
    assert found["findings"]["CPU"]["state"] == "limited" and found["every_run_can_start"]


def test_an_installation_without_its_own_metadata(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    found = diagnosis(tmp_path / "venv/bin/python", DEADLINE_SECONDS, [ROOT])
    ours = found["findings"]["asa-dist"]
    assert (ours["state"], ours["found"]) == ("broken", "not installed")
    assert not found["every_run_can_start"] and "can't: train on the CPU" in found["text"]


def test_a_package_in_order_and_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "sound-package", "1.5")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT))))
    sound = [Requirement("sound-package", ">=1,<2", None)]
    (found,) = check_packages(sound, lambda message: None, time.monotonic() + 200, 100)
    assert found == Finding("sound-package", "ok", "1.5 (supported: >=1,<2)", is_needed=True)
    (found,) = check_packages(sound, lambda message: None, time.monotonic() - 1, 100)
    assert (found.state, found.found) == ("limited", "1.5; import not tried: out of time, on a busy machine")


@pytest.mark.ray
def test_a_ray_that_is_not_there_in_time_is_ended() -> None:
    """Ray's head stands in a session of its own."""
    process = start(["ray"])
    while not (heads := [p for p in psutil.Process(process.pid).children() if "ray_head" in " ".join(p.cmdline())]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert finish(process, time.monotonic()).timed_out
    assert psutil.wait_procs(heads, timeout=0)[1] == [] or all(head.status() == psutil.STATUS_ZOMBIE for head in heads)


def test_what_misses_its_deadline_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the tried process holds its pipes open: it ends with it."""
    fork = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    install(tmp_path, "forks", "1", f"{fork}; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path, ROOT))))
    process = start(["import", "forks"])
    outcome = finish(process, time.monotonic() + 3)
    assert outcome.timed_out and outcome.problem == "no answer within 3 s"
    while _is_alive(process.pid):  # pytest's time-out is the deadline
        time.sleep(0.01)


# --- requirements -------------------------------------------------------------------------------------------------
def test_requirements_as_metadata_writes_them() -> None:
    assert parse_requirement("torch<2.14,>=2.13") == Requirement("torch", "<2.14,>=2.13", None)
    assert parse_requirement('lm-eval>=0.4.9; extra == "eval"') == Requirement("lm-eval", ">=0.4.9", "eval")
    assert parse_requirement("PyYAML[x]") == Requirement("pyyaml", "", None)


@pytest.mark.parametrize(
    ("version", "supported", "expected"),
    [
        ("2.13.0+cpu", "<2.14,>=2.13", True), ("2.14.0", "<2.14,>=2.13", False), ("2.12.9", "<2.14,>=2.13", False),
        ("2.13", ">=2.13.0", True), ("0.19.8", ">=0.19.8", True), ("0.19.10", ">=0.19.8", True), ("3", "<3", False),
        ("2.13.0rc1", "<2.14", True), ("1.0", "!=1.0", False), ("7", "", True),
    ],
)  # fmt: skip
def test_ranges(version: str, supported: str, expected: bool) -> None:
    assert is_supported(version, supported) is expected


# --- what follows -------------------------------------------------------------------------------------------------
def test_what_follows_from_findings() -> None:
    findings = [
        Finding("Python", "ok", "3.11.7", is_needed=True),
        Finding("memory", "limited", "2 GiB", "close something", is_needed=True),
        Finding("GPUs", "limited", "none"),
        Finding("NCCL", "limited", "not tried, because of GPUs"),
        Finding("datasets", "broken", "not installed", "pip install datasets"),
        Finding("wandb", "ok", "0.31"),
    ]
    assert every_run_can_start(findings)
    answer = json.loads(as_json(findings))
    assert answer["can"] == ["train on the CPU", "W&B"] and answer["do"] == ["pip install datasets"]
    text = as_text(findings)
    assert "limited  memory    2 GiB\n                   → close something\n" in text
    assert "\ncan: train on the CPU, W&B\ncan't: train on GPUs, flash attention, because of GPUs: none\n" in text
    ray = Finding("ray", "broken", "hangs", "pip install ray", is_needed=True)
    assert not every_run_can_start([*findings, ray])
    answer = json.loads(as_json([*findings, ray]))
    assert answer["can"] == [] and answer["cannot"]["train on the CPU"] == "ray"
    assert answer["cannot"]["train on GPUs"] == "GPUs" and answer["do"] == ["pip install ray", "pip install datasets"]
