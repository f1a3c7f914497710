"""Packed corpus rows: one global order, of which every rank takes its slice.

Row n of a run is a function of (config, seed, n) only, so another number of ranks sees the same data and a resumed run
continues with the exact next row. Array suffixes: R rows, T positions of a row (``data.sequence_length``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from asa_dist.config import DataConfig
from asa_dist.runtime.data.order import HELDOUT_ORDER, ROW_ORDER, Mixture, generator
from asa_dist.runtime.data.store import DocumentStore
from asa_dist.runtime.data.streaming import ForwardCursor, all_epochs
from asa_dist.runtime.data.tokenizer import load_tokenizer

NO_TARGET = -100
PADDING_SEGMENT = -1


@dataclass(frozen=True)
class PackedRows:
    """Rows ready for a forward pass; all int64 [R, T]. Padding: input 0, position 0, segment −1, target −100."""

    input_ids_RT: np.ndarray
    position_ids_RT: np.ndarray  # restart at 0 at each row's and each document's start
    segment_RT: np.ndarray  # 0, 1, 2 … document number within the row; attention only within equal numbers
    target_RT: np.ndarray  # the document's next token, even beyond the row's end; −100 after the document's last


class Piece(NamedTuple):
    """Tokens ``begin`` … ``end`` − 1 of one document, standing next to each other in a row."""

    document: np.ndarray
    begin: int
    end: int


def cut_into_rows(documents: Iterable[np.ndarray], num_positions: int, skip_tokens: int = 0) -> Iterator[list[Piece]]:
    """Cuts concatenated documents into rows, from ``skip_tokens`` of the first one on; the last row may be shorter."""
    row: list[Piece] = []
    room, begin = num_positions, skip_tokens
    for document in documents:
        while begin < len(document):
            end = min(len(document), begin + room)
            row.append(Piece(document, begin, end))
            room, begin = room - (end - begin), end
            if room == 0:
                yield row
                row, room = [], num_positions
        begin = 0
    if row:
        yield row


def pack(rows: list[list[Piece]], num_positions: int) -> PackedRows:
    """Lays rows of pieces out as arrays; rows shorter than ``num_positions`` are padded at the end."""
    shape = (len(rows), num_positions)
    packed = PackedRows(
        input_ids_RT=np.zeros(shape, np.int64), position_ids_RT=np.zeros(shape, np.int64),
        segment_RT=np.full(shape, PADDING_SEGMENT, np.int64), target_RT=np.full(shape, NO_TARGET, np.int64))
    for r, row in enumerate(rows):
        start = 0
        for segment, (document, begin, end) in enumerate(row):
            stop = start + end - begin
            targets = document[begin + 1:end + 1]  # one fewer than inputs where the document ends
            packed.input_ids_RT[r, start:stop] = document[begin:end]
            packed.position_ids_RT[r, start:stop] = np.arange(stop - start)
            packed.segment_RT[r, start:stop] = segment
            packed.target_RT[r, start:start + len(targets)] = targets
            start = stop
    return packed


class CorpusRows:
    """The training rows of all sources, mixed by weight, and the held-out rows.

    Per source and epoch all documents are shuffled, concatenated and cut into rows; what is left at the end of an
    epoch, less than one row, is dropped in that epoch.
    """

    def __init__(self, run_dir: Path, data: DataConfig, seed: int) -> None:
        """Opens what ``prepare`` wrote. Raises :class:`DataError` if it is missing or damaged."""
        self._data = data
        self._stores = [DocumentStore(run_dir / "data" / f"source_{index}") for index in range(len(data.sources))]
        self._mixture = Mixture([source.weight for source in data.sources])
        self._sources: list[_RowSource] = [
            _StreamedRows(run_dir, data, seed, index) if source.streaming
            else _StoredRows(self._stores[index], data.sequence_length, seed, index)
            for index, source in enumerate(data.sources)]

    def rows(self, first_row: int, num_rows: int) -> PackedRows:
        """Training rows ``first_row`` … ``first_row + num_rows`` − 1 of the global order.

        Any place is reached at once, except in streaming sources: those read forward to it, and from the start again
        for a row before the last one read.
        """
        places = [self._mixture.locate(n) for n in range(first_row, first_row + num_rows)]
        return pack([self._sources[source].row(row) for source, row in places], self._data.sequence_length)

    def heldout_rows(self, max_rows: int) -> PackedRows:
        """At most ``max_rows`` rows of documents that are never trained on, the same ones for every seed.

        Sources share the rows by weight; a source whose held-out documents run out ends with one padded row.
        """
        sources = [index for index, store in enumerate(self._stores) if store.heldout_D.any()]
        shares = Mixture([self._data.sources[index].weight for index in sources]).counts(max_rows)
        rows: list[list[Piece]] = []
        for index, num_rows in zip(sources, shares, strict=True):
            heldout = np.flatnonzero(self._stores[index].heldout_D)
            shuffled = generator(0, HELDOUT_ORDER, index).permutation(heldout)
            documents = map(self._stores[index].document, shuffled)
            rows += islice(cut_into_rows(documents, self._data.sequence_length), num_rows)
        return pack(rows, self._data.sequence_length)


class _RowSource(Protocol):
    def row(self, row: int) -> list[Piece]:
        """Row number ``row`` of this source, counted over all epochs."""


class _StoredRows:
    """Random access: the row's place in the epoch's shuffled token stream is found by bisection."""

    def __init__(self, store: DocumentStore, num_positions: int, seed: int, index: int) -> None:
        self._store, self._num_positions = store, num_positions
        self._documents = np.flatnonzero(~store.heldout_D)
        self._rows_per_epoch = int(store.length_D[self._documents].sum()) // num_positions
        self._key = seed, ROW_ORDER, index
        self._laid_out = lru_cache(maxsize=2)(self._lay_out)

    def row(self, row: int) -> list[Piece]:
        epoch, place = divmod(row, self._rows_per_epoch)
        documents, end = self._laid_out(epoch)
        token = place * self._num_positions
        first = int(np.searchsorted(end, token, side="right"))
        begin = token - int(end[first]) + int(self._store.length_D[documents[first]])
        return next(cut_into_rows(map(self._store.document, documents[first:]), self._num_positions, begin))

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's documents in order, and where each ends in their concatenation; int64 both."""
        documents = generator(*self._key, epoch).permutation(self._documents)
        return documents, np.cumsum(self._store.length_D[documents])


class _StreamedRows:
    """Sequential access: every rank reads the whole stream and tokenises it up to the row asked for."""

    def __init__(self, run_dir: Path, data: DataConfig, seed: int, index: int) -> None:
        tokenizer = load_tokenizer(run_dir)

        def full_rows(documents: Iterator[np.ndarray]) -> Iterator[list[Piece]]:
            rows = cut_into_rows(documents, data.sequence_length)
            return (row for row in rows if sum(piece.end - piece.begin for piece in row) == data.sequence_length)

        self._rows = ForwardCursor(lambda: all_epochs(tokenizer, data, index, (seed, ROW_ORDER, index), full_rows))

    def row(self, row: int) -> list[Piece]:
        _, pieces = self._rows.at(row)
        return pieces
