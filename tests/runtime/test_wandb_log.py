"""Real offline runs of wandb, read back from its own files; and what happens to training when wandb fails."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from asa_dist.config import ConfigError, MetricsConfig
from asa_dist.records import Prompt, RolloutGroup
from asa_dist.runtime.metrics import ProgressLine, RunRecorder
from asa_dist.runtime.ownership import take_over
from asa_dist.runtime.run_log import truncate_logs
from asa_dist.runtime.wandb_log import Follower, Mirror, check_wandb, sample_table
from tests.runtime.test_metrics import decode, read, response, row

KEY = "0123456789abcdef" * 3  # of the form of an API key


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 7\ntrain: {steps: 40}\n", encoding="utf-8")
    return folder


def recorder(run_dir: Path, stream: io.StringIO) -> RunRecorder:
    progress = ProgressLine(1000, 0, stream, plain_every_seconds=1e9)
    return RunRecorder(run_dir, MetricsConfig(wandb="offline", wandb_project="testing"), decode, progress)


# --- wandb's own files --------------------------------------------------------------------------------------------
def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file: 7 bytes, then LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), 7, b""
    while place < len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Logged:
    """One offline part of a run."""

    def __init__(self, folder: Path):
        (file,) = folder.glob("run-*.wandb")
        self.folder, self.rows, self.summary = folder / "files", [], {}
        self.metrics: dict[str, Any] = {}
        for record in records(file):
            match record.WhichOneof("record_type"):
                case "run":
                    self.id, self.project, self.config = (
                        record.run.run_id, record.run.project, values(record.run.config.update)
                    )  # fmt: skip
                case "history":
                    row = values(record.history.item)
                    self.rows.append({key: value for key, value in row.items() if not key.startswith("_")})
                case "summary":
                    self.summary |= values(record.summary.update)
                case "metric":
                    self.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric

    @property
    def plain_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if not any(key.startswith("samples") for key in row)]

    def tables(self) -> dict[int, dict[str, Any]]:
        """By step."""
        paths = [(row["step"], row["samples/path"]) for row in self.rows if "samples/path" in row]
        return {step: json.loads((self.folder / path).read_text(encoding="utf-8")) for step, path in paths}


def parts(run_dir: Path) -> list[Logged]:
    folders = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime_ns)
    return [Logged(folder) for folder in folders]


def test_an_offline_run_and_its_resumption(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same keys, same steps; the newest part holds the whole run, and of steps trained twice only the second time."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    stream = io.StringIO()
    prompt = Prompt(70, 0, torch.tensor([1, 9]).int().numpy(), (torch.tensor([2, 9]).int().numpy(),))
    group = RolloutGroup(1, 0, prompt, (response(5), response(6)))
    first = recorder(run_dir, stream)
    first.event("started", step=0)
    for step in range(1, 5):
        first.samples(step, [group], [{"self": torch.tensor([[0.5, step]])}], tau=0.25)
        first.metrics(row(step, rollout__mismatch_kl=float("nan")))
    first.close()
    truncate_logs(run_dir, 2, take_over(run_dir).folder)
    second = recorder(run_dir, stream)
    second.event("resumed", step=2)
    second.metrics(row(3, loss__total=9.0))
    second.close()
    assert "asa:" not in stream.getvalue(), "a warning"

    before, after = parts(run_dir)
    assert before.id == after.id == (run_dir / "wandb/run_id").read_text(encoding="utf-8")
    assert before.project == "testing"
    assert {"seed": 7, "train": {"steps": 40}}.items() <= before.config.items()
    assert before.metrics == {"step": "", "*": "step"}
    assert before.plain_rows == [row(step) for step in range(1, 5)], "what is no number is left out"
    kept = [{key: value for key, value in row.items() if value is not None} for row in read(run_dir, "metrics")]
    assert after.plain_rows == kept
    assert [row["loss/total"] for row in after.plain_rows] == [1.25, 1.25, 9.0]
    assert list(before.tables()) == [1, 2, 3, 4] and list(after.tables()) == [1, 2]
    table = before.tables()[4]
    assert table["columns"] == ["step", "prompt_id", "tau", "prompt", "text", "finished", "version", "self"]
    assert table["data"] == [[4, 70, 0.25, "1 9", "5 0", True, 4, 0.5], [4, 70, 0.25, "2 9", "6 0", True, 4, 4.0]]
    assert (before.summary["events/started"], after.summary["events/started"], after.summary["events/resumed"]) == (
        1, 1, 1)  # fmt: skip
    assert json.loads(after.summary["events/last"])["event"] == "resumed"
    texts = [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert len(texts) > 10 and not any(KEY.encode() in text for text in texts), "a secret in the run folder"


# --- failing ------------------------------------------------------------------------------------------------------
def wandbs_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "wandb" in " ".join(child.cmdline())]


@pytest.mark.parametrize("which", ["asa_dist.runtime.wandb_log", "wandb-core"])
def test_killed_processes_are_told_of_once(run_dir: Path, which: str) -> None:
    stream = io.StringIO()
    recording = recorder(run_dir, stream)
    step, victims = 0, []
    while not victims or "wandb has ended" not in stream.getvalue():  # pytest's time-out is the deadline
        step += 1
        recording.metrics(row(step))
        if not victims and (run_dir / "wandb/latest-run").exists():
            victims = [process for process in wandbs_processes() if which in " ".join(process.cmdline())][:1]
            for process in victims:
                process.kill()
    recording.metrics(row(step + 1))
    recording.close()
    told = [line for line in stream.getvalue().splitlines() if line.startswith("asa: ")]
    assert len(told) == 1 and told[0].endswith("the run and its own logs go on without it")
    assert [row["step"] for row in read(run_dir, "metrics")] == list(range(1, step + 2))
    psutil.wait_procs(wandbs_processes(), timeout=30)
    assert wandbs_processes() == []


def test_a_folder_that_cannot_be_made(run_dir: Path) -> None:
    (run_dir / "wandb").write_text("in the way")
    stream = io.StringIO()
    recording = recorder(run_dir, stream)
    recording.metrics(row(1))
    recording.close()
    assert [line for line in stream.getvalue().splitlines() if line.startswith("asa: ")] == [
        f"asa: warning: wandb could not be started: [Errno 17] File exists: '{run_dir / 'wandb'}'; "
        "the run and its own logs go on without it"
    ]
    assert len(read(run_dir, "metrics")) == 1


# --- before a run -------------------------------------------------------------------------------------------------
def refusal(metrics: MetricsConfig) -> str:
    with pytest.raises(ConfigError) as error:
        check_wandb(metrics)
    return str(error.value)


def test_online_needs_an_account_and_offline_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wandb(MetricsConfig(wandb="offline"))
    assert refusal(MetricsConfig(wandb="online")) == (
        "metrics.wandb = 'online': not logged in to wandb; run `wandb login` or set WANDB_API_KEY (in the environment, "
        "never in a config), or choose metrics.wandb=offline"
    )
    monkeypatch.setenv("WANDB_API_KEY", "short")
    refused = refusal(MetricsConfig(wandb="online"))
    assert "WANDB_API_KEY invalid" in refused and "\n" not in refused
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_wandb(MetricsConfig(wandb="online"))
    assert not list(tmp_path.rglob(".netrc")), "a key written to disk"


def test_wandb_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asa_dist.runtime.wandb_log.CHECK_SECONDS", 0.001)
    assert refusal(MetricsConfig(wandb="online")).startswith(
        "metrics.wandb = 'online': wandb did not answer within 0.001 s whether it is logged in; run `wandb login`"
    )


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb(MetricsConfig(wandb="disabled"))
    for mode in ("offline", "online"):
        assert "wandb is not installed: pip install 'asa-dist[wandb]'" in refusal(MetricsConfig(wandb=mode))


# --- following the logs -------------------------------------------------------------------------------------------
def test_a_line_counts_when_its_newline_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    follower = Follower(path)
    assert list(follower.new_rows()) == []
    path.write_text('{"step": 1}\n{"st')
    assert list(follower.new_rows()) == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\nbroken\n{"step": 3}\n')
    assert list(follower.new_rows()) == [{"step": 2}, {"step": 3}]
    assert list(follower.new_rows()) == []


class Calls:
    """Takes the place of a wandb run that has been at its server before."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.log: Callable[[dict[str, Any]], None] = self.logged.append


def test_what_the_server_has_is_not_logged_twice(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(7)))
    groups = [{"step": step, "responses": [{"text": "a", "self": 1.0}]} for step in (4, 5, 5)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    run = Calls()
    mirror = Mirror(tmp_path, run, dict, logged_step=4)
    mirror.log_what_is_new()
    mirror.log_what_is_new()
    assert run.logged == [{"step": 5}, {"step": 6}, {"step": 5, "samples": sample_table(groups[1:])}]
    assert sample_table(groups[1:]) == {"columns": ["step", "text", "self"], "data": [[5, "a", 1.0]] * 2}
