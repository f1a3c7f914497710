"""What a round of UDASA has measured, as files: a line per prompt in each of two, which a kill cannot tear."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from asa_dist.records import MeasuredPrompt, MeasuredResponse, unmeasured
from asa_dist.runtime.checkpoint_files import write_atomically
from asa_dist.runtime.run_log import RunLog, read_rows

RESPONSES, UNCERTAINTY = "responses.jsonl", "uncertainty.jsonl"
Value = TypeVar("Value")
MEASURED = "measured.json"  # is there once every prompt has been measured; what was counted


class MeasurementFiles:
    """A round's two files: one line per prompt in each, and what they hold.

    Raises:
        ValueError: a damaged line with sound ones after it, or one that measuring did not write; names file and line.

    Attributes:
        responses: by prompt id, nothing measured.
        uncertainties: by prompt id: by name and ``total``, one per response; None = could not be measured.
    """

    def __init__(self, round_folder: Path) -> None:
        self.folder = round_folder
        self.responses = _read(round_folder / RESPONSES, _prompt_of)
        found = _read(round_folder / UNCERTAINTY, _values_of)
        # whatever responses they were of: those that will come instead are measured anew
        self.uncertainties: dict[int, dict[str, list[float | None]]] = {
            prompt_id: values for prompt_id, values in found.items() if prompt_id in self.responses}

    def counts(self) -> dict[str, int]:
        """Prompts, responses, how many of these are empty, and how many have an uncertainty that is unknown."""
        responses = [response for prompt in self.measured() for response in prompt.responses]
        return {
            "prompts": len(self.uncertainties),
            "responses": len(responses),
            "empty": sum(not response.text.strip() for response in responses),
            "unmeasured": sum(response.u_total is None for response in responses),
        }

    def add_responses(self, prompts: Iterable[MeasuredPrompt]) -> None:
        """Those that are not there yet; they are on the disk when it returns. Raises OSError if they cannot be."""
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self.responses}
        self._append(RESPONSES, [_row_of(prompt) for prompt in new.values()])
        self.responses |= new

    def add_uncertainties(self, prompts: Iterable[MeasuredPrompt], u_PN: Mapping[str, np.ndarray]) -> None:
        """The same for uncertainties by name, float64 [P, N] each; NaN = could not be measured."""
        new = {
            prompt.prompt_id: {name: [None if np.isnan(value) else value for value in value_PN[place].tolist()]
                               for name, value_PN in u_PN.items()}
            for place, prompt in enumerate(prompts) if prompt.prompt_id not in self.uncertainties}
        self._append(UNCERTAINTY, [{"prompt_id": prompt_id, **values} for prompt_id, values in new.items()])
        self.uncertainties |= new

    def complete(self, left_out: Mapping[int, str]) -> None:
        """Writes down that nothing is missing any more. Raises OSError.

        Args:
            left_out: prompts that were not to be measured: why, by id.
        """
        found = {**self.counts(), "left_out": {str(prompt_id): reason for prompt_id, reason in left_out.items()}}
        write_atomically(self.folder / MEASURED, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def check_complete(self) -> None:
        """Raises ValueError: the files hold fewer prompts than were counted when all had been measured."""
        path = self.folder / MEASURED
        counted = json.loads(path.read_bytes()).get("prompts", 0) if path.exists() else 0
        if (left := len(self.responses.keys() & self.uncertainties.keys())) < counted:
            raise ValueError(f"{RESPONSES} and {UNCERTAINTY} hold {left} of {counted} prompts: lines are damaged")

    def measured(self) -> list[MeasuredPrompt]:
        """Every prompt with all that is known of its responses, by ascending id; without those not yet scored."""
        return [_with_uncertainties(self.responses[prompt_id], self.uncertainties[prompt_id])
                for prompt_id in sorted(self.responses.keys() & self.uncertainties.keys())]

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self.folder / name
        log = RunLog(path)
        try:
            problems = [log.append(row) for row in rows] + [log.sync()]
        finally:
            log.close()
        if problem := problems[-1]:  # rows that wait for room are written, or refused again, by sync
            raise OSError(problem.errno, problem.strerror, str(path))


def _row_of(prompt: MeasuredPrompt) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id, "prompt": prompt.prompt, "prompt_token_ids": prompt.token_ids.tolist(),
        "policy_version": prompt.policy_version, "seed": prompt.seed,
        "responses": [{"text": response.text, "token_ids": response.token_ids.tolist(), "finished": response.finished}
                      for response in prompt.responses],
    }


def _read(path: Path, parse: Callable[[dict[str, Any]], Value]) -> dict[int, Value]:
    """What the lines of a file hold, by prompt id."""
    found = {}
    for number, row in enumerate(read_rows(path), start=1):
        try:
            found[row["prompt_id"]] = parse(row)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: not what measuring writes there") from None
    return found


def _prompt_of(row: dict[str, Any]) -> MeasuredPrompt:
    responses = tuple(unmeasured(response["text"], np.array(response["token_ids"], np.int32), response["finished"])
                      for response in row["responses"])
    return MeasuredPrompt(row["prompt_id"], row["prompt"], np.array(row["prompt_token_ids"], np.int32),
                          row["policy_version"], row["seed"], responses)


def _values_of(row: dict[str, Any]) -> dict[str, list[float | None]]:
    values = {name: list(value_N) for name, value_N in row.items() if name != "prompt_id"}
    values["total"]  # is always there
    return values


def _with_uncertainties(prompt: MeasuredPrompt, values: Mapping[str, list[float | None]]) -> MeasuredPrompt:
    columns = [values.get(name, [None] * len(prompt.responses)) for name in ("semantic", "factual", "value", "total")]
    responses = zip(prompt.responses, *columns, strict=True)
    return replace(prompt, responses=tuple(
        MeasuredResponse(known.text, known.token_ids, known.finished, *u) for known, *u in responses))
