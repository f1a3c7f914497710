"""One rank's corpus rows as micro-batches, and the bigram model they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asa_dist.asa.packing import MicroBatch, corpus_batch
from asa_dist.config import DataConfig, TrainConfig
from asa_dist.runtime.data.bigram import BigramBaseline
from asa_dist.runtime.data.rows import NO_TARGET, PADDING_SEGMENT, CorpusRows, PackedRows


def _slice(rows: PackedRows, first: int, num_rows: int) -> MicroBatch:
    here = slice(first, first + num_rows)
    return corpus_batch(
        *(
            torch.from_numpy(np.ascontiguousarray(array[here]))
            for array in (rows.input_ids_RT, rows.position_ids_RT, rows.segment_RT, rows.target_RT)
        )
    )


def _padded(rows: PackedRows, num_rows: int) -> PackedRows:
    """Appends rows without targets, so that every rank evaluates equally many batches."""

    def extended(array: np.ndarray, fill: int) -> np.ndarray:
        return np.concatenate([array, np.full((num_rows - len(array), array.shape[1]), fill, array.dtype)])

    return PackedRows(
        extended(rows.input_ids_RT, 0),
        extended(rows.position_ids_RT, 0),
        extended(rows.segment_RT, PADDING_SEGMENT),
        extended(rows.target_RT, NO_TARGET),
    )


class CorpusFeed:
    """This rank's slice of every global batch, and the counts of a bigram model of the same tokens.

    Args:
        sum_over_ranks: a collective; adds an array up over all ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        data: DataConfig,
        train: TrainConfig,
        seed: int,
        vocab_size: int,
        rank: int,
        num_ranks: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ):
        self._corpus = CorpusRows(run_dir, data, seed)
        self._train, self._rank, self._num_ranks = train, rank, num_ranks
        self._heldout = self._corpus.heldout_rows(data.max_heldout_rows)
        self._bigram = BigramBaseline(self._heldout, vocab_size)
        self._sum_over_ranks = sum_over_ranks

    def train_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        share = self._train.corpus_rows_per_step // self._num_ranks
        rows = self._corpus.rows(step * self._train.corpus_rows_per_step + self._rank * share, share)
        self._handed_out = rows
        per_batch = share // self._train.accumulation_steps
        return [_slice(rows, number * per_batch, per_batch) for number in range(self._train.accumulation_steps)]

    def trained(self) -> None:
        """The rows handed out last have been trained on: the bigram model may count them, too."""
        self._bigram.update(self._handed_out)

    def heldout_batches(self) -> list[MicroBatch]:
        """This rank's share of the held-out rows, in batches of a training micro-batch's size."""
        per_batch = max(1, self._train.corpus_rows_per_step // self._num_ranks // self._train.accumulation_steps)
        num_batches = -(-len(self._heldout.input_ids_RT) // (per_batch * self._num_ranks))
        rows = _padded(self._heldout, num_batches * per_batch * self._num_ranks)
        first = self._rank * num_batches * per_batch
        return [_slice(rows, first + number * per_batch, per_batch) for number in range(num_batches)]

    def bigram_perplexity(self) -> float:
        """Of the training rows all ranks have seen so far, on the held-out rows. A collective."""
        return self._bigram.perplexity(lambda counts: self._sum_over_ranks(torch.from_numpy(counts)).numpy())

    def state_dict(self) -> dict[str, Tensor]:
        """What the bigram model has counted on all ranks together; rows need no state. A collective."""
        local = self._bigram.state_dict()
        return {name: self._sum_over_ranks(torch.from_numpy(counts)).long() for name, counts in local.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Rank 0 takes over what all had counted; the others begin at 0."""
        self._bigram.load_state_dict({name: counts.numpy() * (self._rank == 0) for name, counts in state.items()})
