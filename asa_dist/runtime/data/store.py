"""Tokenised documents on disk: written once, then memory-mapped by every rank and worker.

A folder holds ``tokens.bin`` (all documents one after the other, little-endian int32), ``offsets.npy`` (int64 [D + 1],
first token of each document, and the end) and ``heldout.npy`` (bool [D]). D: documents.

In a folder of prompts each phrasing of a prompt is a document, and ``prompts.npy`` (int64 [Q + 1], first document of
each prompt, and the end) says whose. Q: prompts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from asa_dist.runtime.data.errors import DataError

TOKEN_DTYPE = np.dtype("<i4")


def write_store(folder: Path, documents: Iterable[tuple[np.ndarray, bool]]) -> None:
    """Writes ``(token ids int32 [N], held out?)`` pairs into a new folder, as they come; the caller renames it."""
    folder.mkdir(parents=True)
    offsets, heldout = array("q", [0]), bytearray()
    with (folder / "tokens.bin").open("wb") as file:
        for tokens, is_heldout in documents:
            file.write(tokens.astype(TOKEN_DTYPE).tobytes())
            offsets.append(offsets[-1] + len(tokens))
            heldout.append(is_heldout)
    np.save(folder / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(folder / "heldout.npy", np.frombuffer(heldout, np.bool_))


def write_prompt_store(folder: Path, prompts: Sequence[Sequence[np.ndarray]]) -> None:
    """As :func:`write_store`: the phrasings, int32 [N] each, of every prompt."""
    write_store(folder, ((tokens, False) for phrasings in prompts for tokens in phrasings))
    np.save(folder / "prompts.npy", np.cumsum([0, *map(len, prompts)], dtype=np.int64))


class DocumentStore:
    """Read access to one folder; ``offset_D1`` int64 [D + 1], ``length_D`` int64 [D] tokens, ``heldout_D`` bool [D]."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`DataError` for a folder that is missing, or not as long as its offsets say."""
        with _explained(folder):
            self.offset_D1 = np.load(folder / "offsets.npy")
            self.heldout_D = np.load(folder / "heldout.npy")
            num_bytes = (folder / "tokens.bin").stat().st_size
        num_written = int(self.offset_D1[-1]) * TOKEN_DTYPE.itemsize
        if num_bytes != num_written:
            raise DataError(f"{folder}/tokens.bin has {num_bytes} bytes, {num_written} were written; "
                            f"delete {folder.parent} to prepare it again")
        self.length_D = np.diff(self.offset_D1)
        # An empty file cannot be mapped (a streaming source may have no held-out document).
        self._tokens = np.memmap(folder / "tokens.bin", TOKEN_DTYPE, "r") if num_bytes else np.empty(0, TOKEN_DTYPE)

    def document(self, index: int) -> np.ndarray:
        """int32 [N], a view of the mapped file."""
        return self._tokens[self.offset_D1[index]:self.offset_D1[index + 1]]


class PromptStore:
    """Read access to one folder of prompts."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`DataError` as :class:`DocumentStore` does."""
        self._documents = DocumentStore(folder)
        with _explained(folder):
            self._first_Q1 = np.load(folder / "prompts.npy")

    def __len__(self) -> int:
        return len(self._first_Q1) - 1

    def phrasings(self, index: int) -> list[np.ndarray]:
        """Of one prompt, in the order of the file, int32 [N] each: views of the mapped file."""
        return [self._documents.document(place) for place in range(*self._first_Q1[index:index + 2])]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{folder}: prepared data cannot be read ({error}); "
                        f"delete {folder.parent} to prepare it again") from None
