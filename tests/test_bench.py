"""benchmarks/bench.py with scripts that take no time: what counts as having run; nothing outlives a deadline."""

from __future__ import annotations

import re
from pathlib import Path

import bench
import psutil
import pytest
from bench import BENCHMARKS, Benchmark, Outcome, choose, exit_code, parse_arguments, run, run_all, table
from live_run import Progress
from results import Ratio, make_result

HERE = Path(__file__).parent.parent / "benchmarks"
SCRIPT = f"""
import argparse, subprocess, sys, time
sys.path.insert(0, {str(HERE)!r})
from results import Ratio, add_sizes, make_result, write_result
parser = argparse.ArgumentParser()
add_sizes(parser)
options = parser.parse_args()
def say(value, name="quick", size=None):
    ratio = Ratio("time", value, "the other way", target=1.0)
    return write_result(make_result(name, size or options.size, [ratio], {{}}, {{}}), options.out)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HERE", tmp_path)


def script(folder: Path, text: str) -> Benchmark:
    (folder / "quick.py").write_text(SCRIPT + text, encoding="utf-8")
    return Benchmark("quick.py", "is it quick?", 120.0, 120.0)


@pytest.mark.parametrize(("size", "code"), [("short", 0), ("full", 1), ("smoke", 0)])
def test_a_promise_that_is_not_kept_is_an_error_at_full_size_only(tmp_path: Path, size: str, code: int) -> None:
    outcome = run("quick", script(tmp_path, "sys.exit(say(1.5))"), size, tmp_path / "out/quick.json")
    assert outcome.result is not None and outcome.result["size"] == size, outcome.problem
    assert exit_code({"quick": outcome}, size) == code
    assert ("NOT KEPT" in table({"quick": outcome})) is (size != "smoke")


@pytest.mark.parametrize(("text", "problem"), [
    ("sys.exit('no GPU')", "exit code 1; .*No such file"),
    ("sys.exit(3 + say(0.5))", "exit code 3, with ok = True"),
    ("say(1.5)", "exit code 0, with ok = False"),
    ("sys.exit(say(0.5, name='slow'))", "its result is of slow, size short"),
    ("sys.exit(say(0.5, size='full'))", "its result is of quick, size full"),
    ("options.out.write_text('{}')", "exit code 0; .*no "),
])  # fmt: skip
def test_what_has_not_run(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "quick.json").write_text("a result of another time", encoding="utf-8")
    outcome = run("quick", script(tmp_path, text), "short", tmp_path / "quick.json")
    assert outcome.result is None
    assert re.search(problem, outcome.problem), outcome.problem
    assert exit_code({"quick": outcome}, "short") == 1 and "did not run" in table({"quick": outcome})


@pytest.mark.parametrize("ignores", ["", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"])
def test_nothing_outlives_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: str) -> None:
    monkeypatch.setattr(bench, "GRACE_SECONDS", 1.0)
    started = tmp_path / "started"
    (tmp_path / "quick.py").write_text(f"""
import subprocess, time
{ignores}
for is_daemon in (False, True):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=is_daemon)
    open({str(started)!r}, "a").write(f"{{child.pid}}\\n")
time.sleep(1000)
""", encoding="utf-8")
    outcome = run("quick", Benchmark("quick.py", "does it end?", 15.0, 15.0), "short", tmp_path / "quick.json")
    assert outcome.problem == "not done after 15 s: ended"
    children = [int(line) for line in started.read_text(encoding="utf-8").split()]
    assert len(children) == 2, "not started within the deadline"
    alive = [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert alive == []


def test_the_others_run_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = script(tmp_path, "sys.exit(say(0.5))")
    chosen = {"gone": Benchmark("gone.py", "is it there?", 60.0, 60.0), "quick": good}
    outcomes = run_all(chosen, "short", tmp_path / "out", Progress())
    assert outcomes["gone"].problem.startswith("exit code 2") and outcomes["quick"].result is not None
    assert exit_code(outcomes, "short") == 1
    said = capsys.readouterr().err
    assert "1 of 2, gone" in said and "then quick" in said and "2 of 2, quick" in said


def test_sizes() -> None:
    asked = [parse_arguments(words).size for words in ([], ["--smoke"], ["--full"])]
    assert asked == ["short", "smoke", "full"]


def test_the_table() -> None:
    ratios = [Ratio("stall", 0.4, "a copy", target=0.5), Ratio("speed", 1.2, "theirs", "higher", target=1.5),
              Ratio("bytes", 1.0, "theirs")]
    outcomes = {"publish": Outcome(12.4, make_result("publish", "short", ratios, {}, {})),
                "planner": Outcome(3.0, make_result("planner", "short", [], {}, {})),
                "step": Outcome(600.0, problem="not done after 600 s: ended")}
    lines = [line.split() for line in table(outcomes).splitlines()[1:]]
    assert lines == [["publish", "stall", "0.4", "≤", "0.5", "kept", "12"],
                     ["publish", "speed", "1.2", "≥", "1.5", "NOT", "KEPT", "12"],
                     ["planner", "no", "promise", "at", "this", "size", "3"],
                     ["step", "not", "done", "after", "600", "s:", "ended", "did", "not", "run", "600"]]


def test_what_lacks_something_runs_only_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = Benchmark("peers.py", "?", 1.0, 1.0, lambda: "no TRL")
    monkeypatch.setattr(bench, "BENCHMARKS", {"peers": lacking, "step": BENCHMARKS["step"]})
    assert choose(None) == ({"step": BENCHMARKS["step"]}, {"peers": "no TRL"})
    assert choose(["peers"]) == ({"peers": lacking}, {})


def test_the_scripts_exist() -> None:
    missing = [benchmark.script for benchmark in BENCHMARKS.values() if not (HERE / benchmark.script).exists()]
    assert missing == []
