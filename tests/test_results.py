"""benchmarks/results.py: when a promise is kept, what a result must say; benchmarks/readme_tables.py writes it down."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import results
from readme_tables import document, draw_pictures, read_results, write_between
from results import (
    Ratio,
    ResultError,
    add_sizes,
    check_result,
    commit,
    make_result,
    ratios_of,
    read_result,
    write_result,
)
from results_picture import MOST_ROWS

KEPT = Ratio("stall", 0.4, "a copy", target=0.5)
MISSED = Ratio("stall", 0.6, "a copy", target=0.5, why="the copy was warm")
FREE = Ratio("served", 3.0, "a copy")


def result_of(*ratios: Ratio, size: str = "full") -> dict[str, Any]:
    return make_result("publish", size, ratios, {"ranks": 2}, {"stall_seconds": [0.1, 0.2]})


@pytest.mark.parametrize(("value", "better", "is_met"), [
    (0.5, "lower", True), (0.51, "lower", False), (0.5, "higher", True), (0.49, "higher", False)])
def test_a_promise_is_kept_at_its_target(value: float, better: Any, is_met: bool) -> None:
    assert Ratio("stall", value, "a copy", better, target=0.5).is_met is is_met
    assert Ratio("stall", value, "a copy", better).is_met is None


@pytest.mark.parametrize(("ratios", "size", "ok"), [
    ((KEPT, FREE), "full", True), ((MISSED, FREE), "full", False), ((MISSED,), "short", False),
    ((MISSED,), "smoke", True), ((), "full", True)])
def test_ok_is_what_the_ratios_say(ratios: tuple[Ratio, ...], size: str, ok: bool) -> None:
    result = result_of(*ratios, size=size)
    assert result["ok"] is ok
    with pytest.raises(ResultError, match=f"publish: ok = {not ok}"):
        check_result({**result, "ok": not ok})


def test_a_result_comes_back_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new/publish.json"
    result = result_of(MISSED, FREE)
    assert write_result(result, out) == 1 and write_result(result_of(KEPT), None) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first) == read_result(out) == result and json.loads(second)["ok"]
    assert ratios_of(read_result(out)) == [MISSED, FREE]
    assert [path.name for path in out.parent.iterdir()] == ["publish.json"], "a temporary file stayed"
    assert result["machine"]["cores"] and result["date"][:2] == "20" and result["measurements"]["stall_seconds"]


@pytest.mark.parametrize(("change", "message"), [
    ({"speed": 1}, "unknown: speed"),
    ({"size": "huge"}, "size = 'huge' is none of full, short, smoke"),
    ({"schema": 2}, "schema 2; this is for 1"),
    ({"ok": "yes"}, "ok = 'yes' is no bool"),
    ({"ratios": {}}, "ratios = {} is no list"),
    ({"measurements": {"seconds": [math.nan]}}, "not JSON compliant"),
])
def test_wrong_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        check_result(result_of(KEPT) | change)


@pytest.mark.parametrize("field", sorted(result_of(KEPT)))
def test_missing_fields(field: str) -> None:
    with pytest.raises(ResultError, match=f"no {field}"):
        check_result({key: value for key, value in result_of(KEPT).items() if key != field})


@pytest.mark.parametrize(("change", "message"), [
    ({"value": math.inf}, "stall: value = inf is no finite number"),
    ({"value": "fast"}, "value = 'fast'"),
    ({"value": 0.7}, "is_met = True, with 0.7 of 0.5"),
    ({"is_met": None}, "is_met = None"),
    ({"baseline": ""}, "of what"),
    ({"better": "faster"}, "which way is better"),
    ({"unit": "s"}, "a ratio: .*unit"),
])
def test_wrong_ratios(change: dict[str, Any], message: str) -> None:
    result = result_of(KEPT)
    with pytest.raises(ResultError, match=message):
        check_result({**result, "ratios": [result["ratios"][0] | change]})
    with pytest.raises(ResultError, match="a ratio"):
        check_result({**result, "ratios": [{"name": "stall"}]})


def test_two_ratios_of_one_name() -> None:
    with pytest.raises(ResultError, match="two ratios of one name"):
        result_of(KEPT, MISSED)


@pytest.mark.parametrize(("text", "message"), [
    (None, "No such file"), ("{", "Expecting"), ("[]", "no JSON object"), ("{}", r"\?: no ")])
def test_files_that_are_no_results(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "publish.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultError, match=message):
        read_result(path)


def test_the_commit_says_if_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() == "", "outside of git"
    (tmp_path / "file.py").write_text("one", encoding="utf-8")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "file.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    clean = commit()
    assert len(clean) == 12
    (tmp_path / "README.md").write_text("a table", encoding="utf-8")
    assert commit() == clean
    (tmp_path / "file.py").write_text("two", encoding="utf-8")
    assert commit() == f"{clean}+"


def test_a_result_has_the_commit_that_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "BEGUN", results.BEGUN | {"commit": "0123456789ab"})
    monkeypatch.setattr(results, "commit", lambda: "0123456789ab")
    assert result_of(KEPT)["commit"] == "0123456789ab"
    monkeypatch.setattr(results, "commit", lambda: "ba9876543210")
    assert result_of(KEPT)["commit"] == "0123456789ab+", "code has changed meanwhile"


@pytest.mark.parametrize(("arguments", "size"), [([], "full"), (["--short"], "short"), (["--smoke"], "smoke")])
def test_sizes(arguments: list[str], size: str) -> None:
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    assert parser.parse_args(arguments).size == size
    with pytest.raises(SystemExit):
        parser.parse_args(["--short", "--smoke"])


def test_a_result_that_could_not_be_written_is_an_error_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_sizes(parser)
    (tmp_path / "file").touch()
    assert parser.parse_args(["--out", str(tmp_path / "new/it.json")]).out == tmp_path / "new/it.json"
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file/it.json", "nothing can be written in")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--out", str(path)])
        assert message in capsys.readouterr().err


# --- in the README ----------------------------------------------------------------------------------------------------
def test_a_row_says_of_what_and_whether_the_promise_was_kept() -> None:
    ratios = [
        Ratio("stall", 0.61234, "a copy", "lower", 0.6, 0.71, 0.5, 0.4, "a|b"),
        Ratio("speed", 1.0, "theirs", "higher", target=1.0),
        FREE,
    ]
    header, _, *rows = [line for line in document([result_of(*ratios)]).splitlines() if line.startswith("|")]
    assert header == "| figure | of | median (lowest–highest) | promise | limit |  | why |"
    assert rows == [
        "| stall | a copy | 0.612 (0.6–0.71) | ≤ 0.5 | 0.4 | ✗ | a\\|b |",
        "| speed | theirs | 1 | ≥ 1 |  | ✓ |  |",
        "| served | a copy | 3 |  |  |  |  |",
    ]


def test_tables_say_when_and_where() -> None:
    result = result_of(KEPT) | {"commit": "0123456789ab", "date": "2026-01-02T03:04:05+00:00"}
    assert "**publish**: 2026-01-02, " in document([result]) and "commit 0123456789ab, size full." in document([result])


def test_tables_are_written_once(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n", encoding="utf-8")
    text = document([result_of(KEPT)])
    assert not write_between(readme, "results", text, only_check=True) and "old" in readme.read_text(encoding="utf-8")
    assert not write_between(readme, "results", text, only_check=False)
    assert write_between(readme, "results", text, only_check=True)
    assert readme.read_text(encoding="utf-8") == f"before\n<!-- results:begin -->\n{text}<!-- results:end -->\nafter\n"
    with pytest.raises(ResultError, match="needs <!-- kernels:begin -->"):
        write_between(readme, "kernels", text, only_check=False)


def test_results_are_named_after_their_benchmark(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no results"):
        read_results(tmp_path)
    write_result(result_of(KEPT), tmp_path / "publish.json")
    assert [result["benchmark"] for result in read_results(tmp_path)] == ["publish"]
    write_result(result_of(KEPT), tmp_path / "step.json")
    with pytest.raises(ResultError, match=r"step\.json: holds a result of publish"):
        read_results(tmp_path)


def test_what_is_committed_is_whole() -> None:
    found = read_results(results.RESULTS)
    assert all(result["size"] == "full" for result in found)
    without = [name for result in found if not (results.RESULTS / f"{(name := result['benchmark'])}.svg").exists()]
    assert without == [], "python benchmarks/readme_tables.py draws them"


@pytest.mark.parametrize("num_free", [1, MOST_ROWS])
def test_a_picture_has_every_figure_or_those_promised(num_free: int, tmp_path: Path) -> None:
    free = [replace(FREE, name=f"free {number}") for number in range(num_free)]
    wide = Ratio("stall", 0.0, "a copy", "lower", 0.0, 0.71, 0.5, 0.4)
    draw_pictures([result_of(wide, *free)], tmp_path)
    text = (tmp_path / "publish.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "<!-- stall -->" in text, "also a figure of 0, on a logarithmic axis"
    assert ("<!-- free 0 -->" in text) is (num_free == 1)
