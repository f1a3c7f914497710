"""A round's two files: what was added, once, whatever was torn; a full disk is said."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from asa_dist.runtime.measurements import RESPONSES, MeasurementFiles
from asa_dist.runtime.run_log import read_rows
from tests.udasa.measured import prompt_of


def test_files_give_back_what_was_added(tmp_path: Path) -> None:
    files = MeasurementFiles(tmp_path)
    prompts = [prompt_of("ä w1", "", prompt_id=prompt_id) for prompt_id in (9, 2, 5)]
    files.add_responses(prompts[:2])
    files.add_responses(prompts)  # the first two are there
    scores = {"value": np.array([[0.25, math.nan]] * 2), "total": np.array([[0.25, math.nan]] * 2)}
    files.add_uncertainties(prompts[:2], scores)
    with (tmp_path / RESPONSES).open("a") as file:
        file.write('{"prompt_id": 4, "prom')  # torn
    files = MeasurementFiles(tmp_path)
    assert list(files.responses) == [9, 2, 5]
    assert files.counts() == {"prompts": 2, "responses": 4, "empty": 2, "unmeasured": 2}
    found = files.measured()
    assert [prompt.prompt_id for prompt in found] == [2, 9]
    first, second = found[0].responses
    assert (first.text, first.token_ids.tolist(), first.token_ids.dtype) == ("ä w1", [4], np.int32)
    assert first.uncertainties == {"value": 0.25, "total": 0.25} and second.uncertainties == {}
    files.add_responses([prompt_of("w1", prompt_id=4)])
    assert [row["prompt_id"] for row in read_rows(tmp_path / RESPONSES)] == [9, 2, 5, 4]


def test_responses_that_are_lost_take_their_uncertainties_with_them(tmp_path: Path) -> None:
    """Those that come instead may be others: they are measured anew."""
    files = MeasurementFiles(tmp_path)
    files.add_responses([prompt_of("w1", "w2", prompt_id=3)])
    files.add_uncertainties([prompt_of("w1", "w2", prompt_id=3)], {"total": np.array([[0.25, 0.5]])})
    (tmp_path / RESPONSES).unlink()
    files = MeasurementFiles(tmp_path)
    files.add_responses([prompt_of("w4", "w5", prompt_id=3)])
    assert files.measured() == []
    files.add_uncertainties([prompt_of("w4", "w5", prompt_id=3)], {"total": np.array([[0.75, 1.0]])})
    [found] = MeasurementFiles(tmp_path).measured()
    assert [(response.text, response.u_total) for response in found.responses] == [("w4", 0.75), ("w5", 1.0)]


def test_a_full_disk_is_said_and_what_is_written_stays(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from asa_dist.runtime.measurements import MeasurementFiles
from tests.udasa.measured import prompt_of
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))  # the system refuses what goes beyond
files = MeasurementFiles(Path({str(tmp_path)!r}))
try:
    files.add_responses([prompt_of("w4", "w5", prompt_id=prompt_id) for prompt_id in range(3)])
except OSError as error:
    print(error, len(files.responses))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # for a process that imports from tests
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path / RESPONSES}' 0\n", done.stderr
    assert list(MeasurementFiles(tmp_path).responses) == [0]
