"""Preference pairs as this rank's micro-batches, with the log-probabilities that the reference gives them.

    before a stage    every rank: the model's log-probabilities of its share │ sum: every rank has all │ rank 0: a file
    every step        the step's pairs, cut into contiguous slices: one for every micro-batch of every rank

The file is for whoever resumes: by then the reference's weights have been trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asa_dist.asa.packing import GroupTensors, MicroBatch, TextTables, pack_groups
from asa_dist.records import MeasuredResponse, PreferencePair, Prompt, Response, RolloutGroup
from asa_dist.runtime.checkpoint_files import sync_folder, write_file
from asa_dist.runtime.data.errors import DataError

PAIR_SIZE = 2
LOGPROBS = "logprob_N"  # in the file: of all tokens of the responses, pair by pair, the chosen one first


class ReferenceEngine(Protocol):
    """The sharded model (runtime/engine.py); every method is a collective."""

    def reference_logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]: ...
    def sum_over_ranks(self, values: Tensor) -> Tensor: ...
    def max_over_ranks(self, values: Sequence[float]) -> list[float]: ...


class PreferenceFeed:
    """This rank's share of any of a round's pairs. Pairs go by their prompt ids.

    Args:
        pairs: all of the round, the same on every rank.
        folder: where the reference's log-probabilities are kept; shared by all ranks.
        pairs_per_step: over all ranks, at most; what is no step goes through the model in batches of the same size.

    Raises:
        DataError: a response that does not fit a row behind its prompt.
    """

    def __init__(
        self,
        pairs: Iterable[PreferencePair],
        engine: ReferenceEngine,
        folder: Path,
        tables: TextTables,
        *,
        row_length: int,
        pairs_per_step: int,
        accumulation_steps: int,
        rank: int,
        num_ranks: int,
    ):
        self._pairs = {pair.prompt_id: pair for pair in pairs}
        self._engine, self._folder, self._tables, self._row_length = engine, folder, tables, row_length
        self._accumulation_steps, self._rank, self._num_ranks = accumulation_steps, rank, num_ranks
        self._pairs_per_batch = -(-pairs_per_step // (num_ranks * accumulation_steps))
        self._reference: dict[int, Tensor] = {}  # float32 [T], tokens of the chosen response, then of the rejected one
        for pair in self._pairs.values():
            _refuse_too_long(pair, row_length)

    # --- batches -------------------------------------------------------------------------------------------------
    def train_batches(self, prompt_ids: Sequence[int]) -> list[MicroBatch]:
        """This rank's micro-batches of a step; without pairs where there are fewer pairs than micro-batches.

        Raises:
            KeyError: a pair whose reference was neither computed nor loaded.
        """
        return self._share(prompt_ids, self._accumulation_steps)

    def heldout_batches(self, prompt_ids: Sequence[int]) -> list[MicroBatch]:
        """This rank's share of them, at most as large as in training; equally many on every rank. Raises KeyError."""
        return self._share(prompt_ids, self._num_rounds(prompt_ids))

    def _share(self, prompt_ids: Sequence[int], num_batches: int) -> list[MicroBatch]:
        slices = _slices(prompt_ids, num_batches * self._num_ranks)
        mine = slices[self._rank * num_batches : (self._rank + 1) * num_batches]
        return [self._pack(ids, self._reference) for ids in mine]

    def _num_rounds(self, prompt_ids: Sequence[int]) -> int:
        """In how many batches on every rank they go through the model."""
        return -(-len(prompt_ids) // (self._pairs_per_batch * self._num_ranks))

    def _pack(self, prompt_ids: Sequence[int], logprobs: Mapping[int, Tensor]) -> MicroBatch:
        groups = [_group(self._pairs[prompt_id], logprobs[prompt_id].numpy()) for prompt_id in prompt_ids]
        return pack_groups(groups, self._row_length, self._tables, version=0, group_size=PAIR_SIZE)

    # --- reference -----------------------------------------------------------------------------------------------
    def compute_reference(self, name: str, prompt_ids: Sequence[int]) -> None:
        """The model as it is now becomes the reference of these pairs, and ``name`` a file. A collective.

        Raises:
            DataError: on every rank: the file could not be written.
        """
        slices = _slices(prompt_ids, self._num_rounds(prompt_ids) * self._num_ranks)
        for first in range(0, len(slices), self._num_ranks):
            self._compute_round(slices[first : first + self._num_ranks])
        path, problem = self._path(name), ""
        if self._rank == 0:
            try:
                self._write(path, prompt_ids)
            except OSError as error:
                problem = f"{path}: the reference's log-probabilities cannot be written: {error}"
        self._agree(problem)

    def _compute_round(self, slices: Sequence[Sequence[int]]) -> None:
        """One batch on every rank: ``slices[rank]``."""
        blank = {prompt_id: torch.zeros(self._num_tokens(prompt_id)) for ids in slices for prompt_id in ids}
        mine = slices[self._rank]
        batch = self._pack(mine, blank)
        [logprob_N] = self._engine.reference_logprobs([batch])
        own = _of_responses(logprob_N, batch.responses).split([len(blank[prompt_id]) for prompt_id in mine])
        values = blank | dict(zip(mine, own, strict=True))
        summed = self._engine.sum_over_ranks(torch.cat(list(values.values()))).float()  # the others' are zeros: exact
        self._reference |= zip(values, summed.split([len(value) for value in values.values()]), strict=True)

    def load_reference(self, name: str, prompt_ids: Sequence[int]) -> None:
        """What :meth:`compute_reference` wrote for the same pairs, on any number of ranks. A collective.

        Raises:
            DataError: on every rank: the file is missing, damaged, or of other pairs.
        """
        path, problem = self._path(name), ""
        try:
            self._reference |= self._read(path, prompt_ids)
        except (OSError, SafetensorError, DataError) as error:
            problem = (
                f"{path}: the reference's log-probabilities cannot be read: {error}. They cannot be computed again, as "
                "its weights have been trained on: remove the checkpoints made since, to go on from before"
            )
        self._agree(problem)

    def _agree(self, problem: str) -> None:
        if any(self._engine.max_over_ranks([bool(problem)])):
            raise DataError(problem or "the reference's log-probabilities: another rank cannot read or write them")

    def _num_tokens(self, prompt_id: int) -> int:
        pair = self._pairs[prompt_id]
        return len(pair.chosen.token_ids) + len(pair.rejected.token_ids)

    # --- its file ------------------------------------------------------------------------------------------------
    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _write(self, path: Path, prompt_ids: Sequence[int]) -> None:
        """Appears whole, durable on return. Raises OSError."""
        logprob_N = torch.cat([torch.empty(0), *(self._reference[prompt_id] for prompt_id in sorted(prompt_ids))])
        metadata = {"pairs": self._digest(prompt_ids), LOGPROBS: _digest_of(logprob_N)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        write_file(temporary, [safetensors.torch.save({LOGPROBS: logprob_N}, metadata)])
        temporary.replace(path)
        sync_folder(path.parent)

    def _read(self, path: Path, prompt_ids: Sequence[int]) -> dict[int, Tensor]:
        ordered = sorted(prompt_ids)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("pairs") != self._digest(ordered):
                raise DataError("it is of other pairs")
            logprob_N = file.get_tensor(LOGPROBS)
        if metadata.get(LOGPROBS) != _digest_of(logprob_N):
            raise DataError("its checksum does not match: bytes were changed")
        return dict(zip(ordered, logprob_N.split([self._num_tokens(prompt_id) for prompt_id in ordered]), strict=True))

    def _digest(self, prompt_ids: Sequence[int]) -> str:
        """xxh3_128 of the pairs' token ids, hexadecimal."""
        digest = xxhash.xxh3_128()
        for prompt_id in sorted(prompt_ids):
            pair = self._pairs[prompt_id]
            digest.update(np.int64(prompt_id).tobytes())
            for token_ids in (pair.prompt_token_ids, pair.chosen.token_ids, pair.rejected.token_ids):
                digest.update(np.int64(len(token_ids)).tobytes() + token_ids.astype("<i4").tobytes())
        return digest.hexdigest()


def _refuse_too_long(pair: PreferencePair, row_length: int) -> None:
    longest = max(len(pair.chosen.token_ids), len(pair.rejected.token_ids))
    if (num_tokens := len(pair.prompt_token_ids) + longest) > row_length:
        raise DataError(
            f"prompt {pair.prompt_id}: with its longer response it has {num_tokens} tokens, a row only {row_length}: "
            "raise data.sequence_length"
        )


def _slices(prompt_ids: Sequence[int], num_slices: int) -> list[Sequence[int]]:
    """Contiguous, of equal size within one."""
    num_pairs = len(prompt_ids)
    return [prompt_ids[i * num_pairs // num_slices : (i + 1) * num_pairs // num_slices] for i in range(num_slices)]


def _group(pair: PreferencePair, logprob_T: np.ndarray) -> RolloutGroup:
    """
    Args:
        logprob_T: the reference's, float32, of the chosen response's tokens, then of the rejected one's.
    """
    logprobs = np.split(logprob_T, [len(pair.chosen.token_ids)])
    responses = tuple(map(_response, (pair.chosen, pair.rejected), logprobs))
    return RolloutGroup(0, 0, Prompt(pair.prompt_id, 0, pair.prompt_token_ids), responses)


def _response(measured: MeasuredResponse, logprob_T: np.ndarray) -> Response:
    return Response(measured.token_ids, logprob_T, logprob_T, measured.finished, ((0, 0),))


def _of_responses(values_N: Tensor, groups: GroupTensors) -> Tensor:
    """The values of the positions that predict responses' tokens, response by response, token by token."""
    order_N = groups.predicts_N.argsort(stable=True)  # what predicts nothing comes first
    return values_N[order_N][int((groups.predicts_N < 0).sum()) :]


def _digest_of(values_N: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(values_N.numpy().tobytes())
