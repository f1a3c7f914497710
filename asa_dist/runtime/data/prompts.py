"""Rollout prompts: a stream of their own, a function of (config, seed, prompt id) only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from asa_dist.config import DataConfig, RolloutConfig
from asa_dist.records import Prompt
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.order import PROMPT_LENGTH, PROMPT_ORDER, Mixture, generator
from asa_dist.runtime.data.sources import read_json_field, read_lines
from asa_dist.runtime.data.store import DocumentStore
from asa_dist.runtime.data.streaming import ForwardCursor, all_epochs
from asa_dist.runtime.data.tokenizer import load_tokenizer


def read_prompt_file(path: Path) -> list[tuple[str, str]]:
    """``(place, text)`` of every prompt: one per line (.txt), or ``{"prompt": …}`` per line (.jsonl).

    Raises:
        DataError: another suffix, no prompt, a line that cannot be read.
    """
    match path.suffix:
        case ".txt":
            prompts = [(place, line) for place, line in read_lines(path) if line.strip()]
        case ".jsonl":
            prompts = list(read_json_field(path, "prompt"))
        case suffix:
            raise DataError(f"{path}: prompt files end in .txt (one prompt per line) or .jsonl, not {suffix!r}")
    if not prompts:
        raise DataError(f"{path}: no prompt in this file")
    return prompts


def can_start_prompt(length: int | np.ndarray, rollout: RolloutConfig) -> bool | np.ndarray:
    """Whether documents of ``length`` tokens, end-of-text included, have text left after the longest prefix."""
    return length - 1 > rollout.max_prompt_tokens


class PromptStream:
    """Prompts by id: prefixes of training documents, or whole prompts of ``rollout.prompt_file``."""

    def __init__(self, run_dir: Path, data: DataConfig, rollout: RolloutConfig, seed: int) -> None:
        """Opens what ``prepare`` wrote. Raises :class:`DataError` if it is missing or damaged."""
        self._rollout, self._seed = rollout, seed
        self._sources: list[_DocumentSource]
        if rollout.prompt_file is not None:
            store = DocumentStore(run_dir / "data" / "prompts")
            self._mixture = Mixture([1.0])
            self._sources = [_StoredDocuments(store, np.arange(len(store.length_D)), seed, 0)]
            return
        self._mixture = Mixture([source.weight for source in data.sources])
        self._sources = []
        for index, source in enumerate(data.sources):
            if source.streaming:
                self._sources.append(_StreamedDocuments(run_dir, data, rollout, seed, index))
            else:
                store = DocumentStore(run_dir / "data" / f"source_{index}")
                usable = np.flatnonzero(~store.heldout_D & can_start_prompt(store.length_D, rollout))
                self._sources.append(_StoredDocuments(store, usable, seed, index))

    def prompt(self, prompt_id: int) -> Prompt:
        """Prompt number ``prompt_id``; its epoch is how often its source (or the file) had been gone through before.

        A prefix has a length drawn uniformly from ``min_prompt_tokens`` … ``max_prompt_tokens``, of a document longer
        than ``max_prompt_tokens``: there is always something to continue, and the length tells nothing about it.
        """
        source, place = self._mixture.locate(prompt_id)
        epoch, tokens = self._sources[source].document(place)
        if self._rollout.prompt_file is None:
            lengths = self._rollout.min_prompt_tokens, self._rollout.max_prompt_tokens
            tokens = tokens[:generator(self._seed, PROMPT_LENGTH, prompt_id).integers(*lengths, endpoint=True)]
        return Prompt(prompt_id, epoch, np.array(tokens, np.int32))


class _DocumentSource(Protocol):
    def document(self, place: int) -> tuple[int, np.ndarray]:
        """``(epoch, token ids)`` of document number ``place``, counted over all epochs."""


class _StoredDocuments:
    def __init__(self, store: DocumentStore, usable: np.ndarray, seed: int, index: int) -> None:
        self._store, self._usable = store, usable
        self._key = seed, PROMPT_ORDER, index
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def document(self, place: int) -> tuple[int, np.ndarray]:
        epoch, position = divmod(place, len(self._usable))
        return epoch, self._store.document(self._shuffled(epoch)[position])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(*self._key, epoch).permutation(self._usable)


class _StreamedDocuments:
    """A pass of its own over the stream, in an order of its own."""

    def __init__(self, run_dir: Path, data: DataConfig, rollout: RolloutConfig, seed: int, index: int) -> None:
        tokenizer = load_tokenizer(run_dir)

        def usable(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            return (tokens for tokens in documents if can_start_prompt(len(tokens), rollout))

        self._documents = ForwardCursor(lambda: all_epochs(tokenizer, data, index, (seed, PROMPT_ORDER, index), usable))

    def document(self, place: int) -> tuple[int, np.ndarray]:
        return self._documents.at(place)
