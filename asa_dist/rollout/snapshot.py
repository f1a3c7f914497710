"""The ledger's snapshot as bytes: what ``rollouts.safetensors`` of a checkpoint holds. No pickle.

    token arrays     prompt_tokens int32 · response_tokens int32 · logprob float32 · behaviour_logprob float32,
                     each the concatenation over all open steps, in order
    header, JSON     which prompts and groups there are, and how long the pieces of the arrays are: one per phrasing of
                     a prompt, one per response of a group

A group's prompt is the step's prompt at its index: it is kept once. Bytes are checked for being complete and coherent,
not for flipped bits: those are the business of the checkpoint's checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from asa_dist.records import LedgerSnapshot, OpenStep, Prompt, Response, RolloutGroup

FORMAT = "asa-dist rollouts 1"  # the header's only key: safetensors writes several in any order
DTYPES = {"prompt_tokens": np.int32, "response_tokens": np.int32,
          "logprob": np.float32, "behaviour_logprob": np.float32}


def dump_snapshot(snapshot: LedgerSnapshot) -> bytes:
    """A safetensors file: the same bytes for the same snapshot, which :func:`load_snapshot` gives back bit for bit."""
    prompts = [prompt for step in snapshot.steps for prompt in step.prompts]
    responses = [response for step in snapshot.steps for group in step.groups for response in group.responses]
    arrays = {
        "prompt_tokens": _join((tokens for p in prompts for tokens in p.phrasings), np.int32),
        "response_tokens": _join((r.token_ids for r in responses), np.int32),
        "logprob": _join((r.logprob_T for r in responses), np.float32),
        "behaviour_logprob": _join((r.behaviour_logprob_T for r in responses), np.float32),
    }
    structure = {"next_step": snapshot.next_step, "steps": [
        {"step": step.step,
         "prompts": [[p.prompt_id, p.epoch, *map(len, p.phrasings)] for p in step.prompts],
         "groups": [[g.index, [[len(r.token_ids), r.finished, r.spans] for r in g.responses]] for g in step.groups]}
        for step in snapshot.steps]}
    return save(arrays, {FORMAT: json.dumps(structure, separators=(",", ":"))})


def load_snapshot(data: bytes) -> LedgerSnapshot:
    """What :func:`dump_snapshot` wrote.

    Raises:
        ValueError: other bytes than that: cut off, another kind of file, or parts that contradict each other.
    """
    try:
        arrays = load(data)
        header_bytes = int.from_bytes(data[:8], "little")  # safetensors: length, JSON header, arrays
        metadata = json.loads(data[8:8 + header_bytes]).get("__metadata__", {})
        if FORMAT not in metadata:
            raise ValueError(f"the header has {sorted(metadata)} instead of {FORMAT!r}")
        return _parse(json.loads(metadata[FORMAT]), {name: _Reader(name, arrays[name]) for name in DTYPES})
    except (SafetensorError, ValueError, TypeError, LookupError) as error:
        raise ValueError(f"these {len(data)} bytes are no intact snapshot of rollouts: {error}") from error


class _Reader:
    """Cuts a concatenated array into the pieces it was made of."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        if array.dtype != DTYPES[name] or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {array.shape} instead of a row of {np.dtype(DTYPES[name])}")
        self._name, self._array, self._position = name, array, 0

    def next(self, length: int) -> np.ndarray:
        if not 0 <= length <= len(self._array) - self._position:
            raise ValueError(f"{self._name} ends at {len(self._array)}, {length} more are needed at {self._position}")
        self._position += length
        return self._array[self._position - length:self._position]

    def finish(self) -> None:
        if self._position < len(self._array):
            raise ValueError(f"{self._name} has {len(self._array)} elements, {self._position} are accounted for")


def _parse(structure: dict[str, Any], readers: dict[str, _Reader]) -> LedgerSnapshot:
    steps = tuple(_parse_step(step, readers) for step in structure["steps"])
    for reader in readers.values():
        reader.finish()
    return LedgerSnapshot(structure["next_step"], steps)


def _parse_step(step: dict[str, Any], readers: dict[str, _Reader]) -> OpenStep:
    prompts = tuple(_parse_prompt(readers["prompt_tokens"], *prompt) for prompt in step["prompts"])
    groups = tuple(
        RolloutGroup(step["step"], index, prompts[index], tuple(_parse_response(readers, *r) for r in responses))
        for index, responses in step["groups"])
    return OpenStep(step["step"], prompts, groups)


def _parse_prompt(reader: _Reader, prompt_id: int, epoch: int, length: int, *variant_lengths: int) -> Prompt:
    return Prompt(prompt_id, epoch, reader.next(length), tuple(map(reader.next, variant_lengths)))


def _parse_response(readers: dict[str, _Reader], length: int, finished: bool, spans: list[list[int]]) -> Response:
    tokens, logprob_T, behaviour_logprob_T = (
        readers[name].next(length) for name in ("response_tokens", "logprob", "behaviour_logprob"))
    return Response(tokens, logprob_T, behaviour_logprob_T, finished,
                    tuple((first, version) for first, version in spans))


def _join(arrays: Iterable[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    """One flat array, of which there may be no piece; another dtype than this one is an error."""
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="no")
