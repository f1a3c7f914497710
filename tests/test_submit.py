"""`asa submit` without SLURM: who is put where, the script that says so, what is refused, what is left behind.

That the script works is for tests/cluster: real SLURM on several hosts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asa_dist import submit
from asa_dist.cli import main
from asa_dist.config import ConfigError, load_config
from asa_dist.job_layout import JobLayout, plan_layout
from asa_dist.submit import JobRequest, limit_minutes, render_script, settings_of
from tests.run_folders import write_run

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs/quickstart.yaml"
LARGE = ROOT / "configs/asa-7b.yaml"  # 4 rollout workers with a GPU each
UDASA = ROOT / "configs/udasa-laptop.yaml"
SHELL_SCRIPTS = [ROOT / "launch/deepspeed.sh", ROOT / "launch/slurm/train.sbatch"]
SHARED = ["rollout.placement=shared", "rollout.max_policy_age=0"]
# what is asked for, and the overrides that a batch of so many ranks needs
JOBS = {
    1: ["--gpus-per-node", "8", "--time", "1-00:00:00"],
    8: ["--gpus-per-node", "8", "rollout.workers=32", "train.accumulation_steps=1"],
    64: ["--gpus-per-node", "8", "--rollout-nodes", "32", "rollout.workers=256", "rollout.prompts_per_step=256",
         "train.corpus_rows_per_step=1024", "train.accumulation_steps=1"],
}  # fmt: skip


def rendered(run_dir: Path, config: Path = LARGE, *arguments: str) -> str:
    """The script in the run folder of a job whose `sbatch` is a program that says 17."""
    assert main(["submit", str(config), *arguments, "--run-dir", str(run_dir)]) == 0
    return (run_dir / "submit.sbatch").read_text(encoding="utf-8")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's: says 17, and notes what it was given."""
    program, given = tmp_path / "bin/sbatch", tmp_path / "given"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {given}\necho "17;cluster"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return given


# --- who is where -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("overrides", "nodes", "rollout_nodes", "gpus", "expected"), [
    # on CPUs train.ranks are those of a node
    (["train.gpus=0", "rollout.gpus_per_worker=0", "train.ranks=2"], 3, 1, 0, JobLayout(3, 1, 0, 2, 4, 4, 0)),
    (["train.gpus=0", "rollout.gpus_per_worker=0", "rollout.threads_per_worker=3"], 3, 0, 0,
     JobLayout(3, 0, 0, 1, 2, 6, 0)),
    # on GPUs a rank has each that no worker has
    ([], 1, 0, 8, JobLayout(1, 0, 8, 4, 4, 4, 4)),
    ([], 2, 0, 8, JobLayout(2, 0, 8, 6, 2, 2, 2)),
    ([], 3, 1, 8, JobLayout(3, 1, 8, 8, 4, 4, 4)),
    (["rollout.workers=5"], 4, 2, 8, JobLayout(4, 2, 8, 8, 3, 3, 3)),
    (["rollout.gpus_per_worker=0"], 2, 0, 8, JobLayout(2, 0, 8, 8, 2, 2, 0)),
    # a worker's GPUs are on one node
    (["rollout.engine=vllm", "rollout.gpus_per_worker=2"], 2, 0, 8, JobLayout(2, 0, 8, 4, 2, 2, 4)),
    (["rollout.engine=vllm", "rollout.gpus_per_worker=2"], 3, 1, 8, JobLayout(3, 1, 8, 8, 4, 4, 8)),
    # in turns every GPU has a rank
    (SHARED, 1, 0, 4, JobLayout(1, 0, 4, 4, 4, 4, 4)),
    (SHARED, 2, 0, 8, JobLayout(2, 0, 8, 8, 2, 2, 2)),
    ([*SHARED, "rollout.engine=vllm", "rollout.workers=2", "rollout.gpus_per_worker=2"], 2, 0, 2,
     JobLayout(2, 0, 2, 2, 1, 1, 2)),
])  # fmt: skip
def test_layout(overrides: list[str], nodes: int, rollout_nodes: int, gpus: int, expected: JobLayout) -> None:
    config = load_config(LARGE, [*overrides, "rollout.groups_per_lease=1"])
    assert plan_layout(config, "x.yaml", nodes, rollout_nodes, gpus) == expected


@pytest.mark.parametrize(("arguments", "message"), [
    (["--nodes", "2"], "train.gpus = 4: say how many GPUs a node has, with --gpus-per-node"),
    (["--nodes", "2", "--rollout-nodes", "2", "--gpus-per-node", "8"], "of --nodes 2 only generate: none trains"),
    (["--nodes", "9", "--rollout-nodes", "5", "--gpus-per-node", "8"], "--rollout-nodes 5 are too many"),
    (["--nodes", "3", "--gpus-per-node", "8"], "must be a multiple of 3, or have nodes of their own"),
    (["--nodes", "1", "--gpus-per-node", "4"], "need 4 GPUs of a node, beside one trainer rank at least; "
                                               "--gpus-per-node is 4"),
    (["--nodes", "2", "--rollout-nodes", "1", "--gpus-per-node", "2"], "need 4 GPUs of a node that only generates"),
    (["--nodes", "2", "--rollout-nodes", "1", "--gpus-per-node", "8", *SHARED],
     "rollout.placement = 'shared': every node trains and generates, in turns: no --rollout-nodes 1, or"),
    (["--nodes", "3", "--gpus-per-node", "8", *SHARED], "with the trainer: must be a multiple of 3\n"),
    (["--nodes", "1", "--gpus-per-node", "2", *SHARED],
     "need 4 GPUs of a node, which ranks have, too; --gpus-per-node is 2: fewer workers, or more --nodes"),
    (["--nodes", "8", "--gpus-per-node", "8", "rollout.workers=32"], "must be a multiple of 32 ranks x 8"),
    (["--nodes", "1", "--gpus-per-node", "8", "--time", "soon"], "--time 'soon': write minutes, hours:minutes:seconds"),
    (["--nodes", "1", "--gpus-per-node", "8", "--time", "4"], "--time 4: a start takes a minute or two"),
    (["--nodes", "1", "--gpus-per-node", "8", "--partition", "a\n#SBATCH x"], "--partition 'a\\n#SBATCH x': a name"),
    (["--nodes", "1", "--gpus-per-node", "8", "--account", "a b"], "--account 'a b': a name"),
    (["--nodes", "1", "--gpus-per-node", "8", "--run-dir", 'a"b'], "sbatch takes no name with quotes"),
    (["--nodes", "1", "--gpus-per-node", "8", "train.stepps=3"], "unknown key 'train.stepps'"),
])  # fmt: skip
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sbatch: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["submit", str(LARGE), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not sbatch.exists() and not (tmp_path / "runs").exists()


def test_udasa_runs_on_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(UDASA), f"model.name_or_path={tmp_path}", "--dry-run"]
    assert main(["submit", *given, "--nodes", "2"]) == 2
    assert capsys.readouterr().err.endswith("method = 'udasa' runs on one node for now: --nodes 2 is too many\n")
    assert main(["submit", *given, "--nodes", "1"]) == 0
    assert "RANKS_PER_NODE=2" in capsys.readouterr().out


# --- the script ---------------------------------------------------------------------------------------------------
def test_every_field_of_the_script(tmp_path: Path, sbatch: Path) -> None:
    run_dir = tmp_path / "a run 100%"
    script = rendered(
        run_dir, LARGE, "--nodes", "3", "--rollout-nodes", "1", "--gpus-per-node", "8", "--time", "0-03:20",
        "--partition", "long", "--account", "me", "--max-restarts", "5", "train.threads_per_rank=7",
        "train.accumulation_steps=1",
    )  # fmt: skip
    lines = settings_of(script).splitlines()
    assert sorted(lines) == sorted([
        "#SBATCH --job-name=asa-7b", "#SBATCH --nodes=3", "#SBATCH --exclusive", "#SBATCH --mem=0",
        "#SBATCH --signal=B:USR1@600", "#SBATCH --requeue", "#SBATCH --open-mode=append",
        f'#SBATCH --output="{tmp_path}/a run 100%%/job-%j.log"', "#SBATCH --time=0-03:20", "#SBATCH --partition=long",
        "#SBATCH --account=me", "#SBATCH --gpus-per-node=8",
        f"CONFIG='{run_dir}/config.yaml'", f"RUN_DIR='{run_dir}'", f"PYTHON={sys.executable}", "ROLLOUT_NODES=1",
        "RANKS_PER_NODE=8", "THREADS_PER_RANK=7", "GPUS_PER_NODE=8", "RAY_CPUS_PER_NODE=4", "RAY_GPUS_PER_NODE=4",
        "PLACEMENT=separate", "MAX_RESTARTS=5", "START_TIMEOUT_SECONDS=120",
    ])  # fmt: skip


def test_a_job_whose_workers_share_the_gpus_of_ranks(
    tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--nodes", "2", "--gpus-per-node", "4", "train.accumulation_steps=4", *SHARED]
    script = rendered(tmp_path / "run", LARGE, *asked)
    assert {"RANKS_PER_NODE=4", "RAY_GPUS_PER_NODE=2", "PLACEMENT=shared"} <= {*settings_of(script).splitlines()}
    assert main(["submit", str(LARGE), "--run-dir", str(tmp_path / "run"), "--dry-run", *asked]) == 0
    who_is_where = capsys.readouterr().out
    assert "8 trainer ranks, 4 per node on GPUs 0 to 3; ZeRO stage 3\n" in who_is_where
    assert "4 rollout workers, 2 per node on GPUs 0 to 1, in turns with the ranks; engine hf\n" in who_is_where


@pytest.mark.parametrize("nodes", JOBS)
def test_the_script_is_the_template_with_other_settings(tmp_path: Path, sbatch: Path, nodes: int) -> None:
    script = rendered(tmp_path / "run", LARGE, "--nodes", str(nodes), *JOBS[nodes])
    _, _, body = submit.TEMPLATE.read_text(encoding="utf-8").partition("# --- end of settings")
    assert script.endswith(body) and "main\n" in body
    assert f"\n#SBATCH --nodes={nodes}\n" in script
    assert ("\n#SBATCH --no-kill\n" in script) == (nodes == 64), "only one of several nodes that generate may be lost"
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
    assert script.index("#SBATCH --gpus") < script.index("\nCONFIG="), "SLURM stops reading at the first command"


@pytest.mark.parametrize(("time_limit", "seconds"), [
    (None, 600), ("5", 120), ("30", 180), ("90:30", 540), ("2:00:00", 600), ("1-0", 600), ("0-00:20", 120)])
def test_told_in_time_before_the_limit(time_limit: str | None, seconds: int) -> None:
    assert JobRequest(time_limit).warning_seconds == seconds


@pytest.mark.parametrize(("text", "minutes"), [
    ("30", 30), ("30:59", 30), ("02:30:00", 150), ("1-0", 1440), ("1-1:30", 1530), ("2-00:00:30", 2880)])
def test_limits_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert limit_minutes(text) == minutes


def test_a_template_without_a_setting_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, layout = load_config(QUICKSTART), JobLayout(1, 0, 0, 2, 1, 1, 0)
    broken = tmp_path / "train.sbatch"
    broken.write_text("#!/bin/bash\n#SBATCH --nodes=1\nCONFIG=x\n", encoding="utf-8")
    monkeypatch.setattr(submit, "TEMPLATE", broken)
    with pytest.raises(ConfigError, match="0 lines set RUN_DIR, one must"):
        render_script(config, layout, JobRequest(), "name", tmp_path)
    monkeypatch.setattr(submit, "TEMPLATE", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"needs the repository: install it with `pip install -e \.`"):
        render_script(config, layout, JobRequest(), "name", tmp_path)


# --- submitting ---------------------------------------------------------------------------------------------------
def test_what_is_left_in_the_run_folder(tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    rendered(run_dir, QUICKSTART, "--nodes", "2", "seed=3")
    assert sbatch.read_text() == f"--parsable {run_dir}/submit.sbatch\n"
    assert f"submitted job 17; what it says: {run_dir}/job-17.log" in capsys.readouterr().out
    assert load_config(run_dir / "config.yaml") == load_config(QUICKSTART, ["seed=3", "train.ranks=4"])
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (run_dir / "revision.txt").read_text().startswith(head.strip())
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "revision.txt", "submit.sbatch"]


def test_into_the_folder_of_another_run(tmp_path: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_bytes()
    same, run_dir = str(tmp_path / "run/config.yaml"), ["--run-dir", str(tmp_path / "run")]
    assert main(["submit", same, "--nodes", "1", "seed=9", *run_dir]) == 2
    assert "seed = 0, now 9: cannot change in a run" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_bytes() == before and not sbatch.exists()
    assert main(["submit", same, "--nodes", "1", "train.steps=99", *run_dir]) == 0


def test_dry_run_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["submit", str(QUICKSTART), "--nodes", "3", "--rollout-nodes", "1", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "nodes 1 to 2  4 trainer ranks, 2 per node" in printed and "node 3        1 rollout worker," in printed


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    refusing = tmp_path / "sbatch"
    for text, message in (
        (None, "there is no sbatch here: call `sbatch "),
        ("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n", "submit.sbatch: invalid partition"),
    ):
        if text is not None:
            refusing.write_text(text, encoding="utf-8")
            refusing.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert main(["submit", str(QUICKSTART), "--nodes", "1", "--run-dir", str(tmp_path / "run")]) == 1
        assert message in capsys.readouterr().err


# --- the shell scripts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", path], text=True, capture_output=True, timeout=30, check=False)
    assert checked.returncode == 0, checked.stderr
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


@pytest.mark.parametrize(("hosts", "arguments", "message"), [
    ("node0 slots=1\n", [], "needs HOSTFILE and CONFIG"),
    ("# nobody\n\n", ["{config}"], "no host in "),
    ("node0 slots=1\n", ["none.yaml"], "no such file: none.yaml"),
    ("node0 slots=1\nnode0 slots=2\n", ["{config}"], "named twice in the hostfiles: node0"),
    ("node0 slots=1\n", ["{config}", "--rollout-hostfile", "{hosts}"], "named twice in the hostfiles: node0"),
    ("node0 slots=1\n", ["{config}", "--fast"], "unknown option --fast"),
    ("node0 slots=1\n", ["{config}", "--run-dir"], "--run-dir needs a value"),
    ("node0 slots=1\n", ["{config}", "--run-dir", "my run"], "/my run: not all its characters reach every host"),
    ("node0 slot=1\n", ["{config}", "--rollout-hostfile", "{hosts}"], "no slots=N in: node0 slot=1"),
])
def test_deepspeed_refuses(tmp_path: Path, hosts: str, arguments: list[str], message: str) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(hosts, encoding="utf-8")
    filled = [argument.format(config=QUICKSTART, hosts=hostfile) for argument in arguments]
    ended = subprocess.run([ROOT / "launch/deepspeed.sh", hostfile, *filled], cwd=tmp_path, text=True,
                           capture_output=True, timeout=30, check=False)  # fmt: skip
    assert ended.returncode == 2 and message in ended.stderr and "HOSTFILE CONFIG [--rollout-hostfile" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hosts"]


def launched_by_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, str]:
    """(what hosts are told to do, stderr) of deepspeed.sh; they are stand-ins, at which ssh notes its command."""
    program, told = tmp_path / "bin/ssh", tmp_path / "told"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}"
                               f"{os.environ['PATH']}")  # fmt: skip
    for name, hosts in {"hosts": "node0 slots=2\nnode1 slots=2\n", "others": "node2 slots=1 gpus=1\n"}.items():
        (tmp_path / name).write_text(hosts, encoding="utf-8")
    script = [ROOT / "launch/deepspeed.sh", "hosts", QUICKSTART, "--run-dir", "run", *arguments]
    ended = subprocess.run(script, cwd=tmp_path, text=True, capture_output=True, timeout=120, check=False)
    assert ended.returncode, "the hosts do nothing"
    return told.read_text() if told.exists() else "", ended.stderr


@pytest.mark.parametrize(("overrides", "num_gpus"), [
    ([*SHARED, "train.gpus=4", "rollout.workers=2", "rollout.gpus_per_worker=1"], 2), (["train.gpus=4"], 0)])
def test_by_ssh_workers_have_gpus_only_if_they_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], num_gpus: int
) -> None:
    told, _ = launched_by_ssh(tmp_path, monkeypatch, *overrides)
    starts = [line for line in told.splitlines() if "ray_hosts start" in line]
    assert len(starts) == 2
    assert all(f"--num-cpus 2 --num-gpus {num_gpus} --gpus-per-host {num_gpus} " in line for line in starts)


def test_by_ssh_no_host_only_generates_if_gpus_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, said = launched_by_ssh(tmp_path, monkeypatch, *SHARED, "--rollout-hostfile", "others")
    assert "rollout.placement shared: every host trains and generates, in turns: leave out --rollout-hostfile" in said
    assert not told and not (tmp_path / "run").exists()


# --- the README ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nodes", JOBS)
def test_the_readme_shows_what_is_printed(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = ["--run-dir", "/shared/asa-7b", "--dry-run", "--nodes", str(nodes), *JOBS[nodes]]
    assert main(["submit", str(LARGE), *asked]) == 0
    who_is_where, _, settings = capsys.readouterr().out.partition("\n#SBATCH ")
    assert f"{who_is_where}\n" in readme
    assert f"nodes={nodes}" in settings
    words = " ".join(readme.replace("\\\n", " ").split())
    assert f"--nodes {nodes} {' '.join(JOBS[nodes][2:])}".strip() in words, "the command is another one"
