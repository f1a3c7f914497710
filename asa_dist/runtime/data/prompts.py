"""Rollout prompts: a stream of their own, a function of (config, seed, prompt id) only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asa_dist.config import DataConfig, RolloutConfig
from asa_dist.records import Prompt
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.order import PROMPT_LENGTH, PROMPT_ORDER, PROMPT_PHRASINGS, Mixture, generator
from asa_dist.runtime.data.sources import checked_text, read_json_lines, read_lines, text_of
from asa_dist.runtime.data.store import DocumentStore, PromptStore
from asa_dist.runtime.data.streaming import ForwardCursor, all_epochs
from asa_dist.runtime.data.tokenizer import load_tokenizer


def read_prompt_file(path: Path) -> list[tuple[str, list[str]]]:
    """``(place, phrasings)`` of every prompt.

    One prompt per line (.txt), or ``{"prompt": "…", "variants": ["…", …]}`` per line (.jsonl). The variants, other
    phrasings of the prompt, may be left out; fields of other names are not looked at.

    Raises:
        DataError: another suffix, no prompt, a line that cannot be read, two equal phrasings of a prompt.
    """
    match path.suffix:
        case ".txt":
            prompts = [(place, [line]) for place, line in read_lines(path) if line.strip()]
        case ".jsonl":
            prompts = [(place, _phrasings_of(record, place)) for place, record in read_json_lines(path)]
        case suffix:
            raise DataError(f"{path}: prompt files end in .txt (one prompt per line) or .jsonl, not {suffix!r}")
    if not prompts:
        raise DataError(f"{path}: no prompt in this file")
    return prompts


def _phrasings_of(record: dict[str, Any], place: str) -> list[str]:
    variants = record.get("variants", [])
    if not isinstance(variants, list):
        raise DataError(f"{place}: field 'variants' must be a list of texts, not {type(variants).__name__}")
    phrasings = [text_of(record, "prompt", place)]
    for number, variant in enumerate(variants, start=1):
        if checked_text(variant, f"{place}: variant {number}") in phrasings:
            raise DataError(f"{place}: variant {number} says the same as a phrasing before it; remove it")
        phrasings.append(variant)
    return phrasings


def can_start_prompt(length: int | np.ndarray, rollout: RolloutConfig) -> bool | np.ndarray:
    """Whether documents of ``length`` tokens, end-of-text included, have text left after the longest prefix."""
    return length - 1 > rollout.max_prompt_tokens


class PromptStream:
    """Prompts by id: prefixes of training documents, or whole prompts of ``rollout.prompt_file``."""

    def __init__(self, run_dir: Path, data: DataConfig, rollout: RolloutConfig, seed: int) -> None:
        """Opens what ``prepare`` wrote. Raises :class:`DataError` if it is missing or damaged."""
        self._rollout, self._seed = rollout, seed
        self._file = _StoredPrompts(run_dir, seed) if rollout.prompt_file is not None else None
        self._mixture = Mixture([source.weight for source in data.sources])
        self._sources: list[_DocumentSource] = []
        if self._file is not None:
            return
        for index, source in enumerate(data.sources):
            if source.streaming:
                self._sources.append(_StreamedDocuments(run_dir, data, rollout, seed, index))
            else:
                self._sources.append(_StoredDocuments(run_dir, rollout, seed, index))

    def prompt(self, prompt_id: int) -> Prompt:
        """Prompt number ``prompt_id``; its epoch is how often its source (or the file) had been gone through before.

        A prefix has a length drawn uniformly from ``min_prompt_tokens`` … ``max_prompt_tokens``, of a document longer
        than ``max_prompt_tokens``: there is always something to continue, and the length tells nothing about it.

        Of a file's prompt ``prompt_variants`` phrasings are drawn, in random order, anew in every epoch: in the course
        of a run every phrasing serves, in every place.
        """
        if self._file is not None:
            epoch, phrasings = self._file.phrasings(prompt_id)
            drawn = generator(self._seed, PROMPT_PHRASINGS, prompt_id).permutation(len(phrasings))
            token_ids, *variants = (
                np.array(phrasings[place], np.int32) for place in drawn[:self._rollout.prompt_variants])
            return Prompt(prompt_id, epoch, token_ids, tuple(variants))
        source, place = self._mixture.locate(prompt_id)
        epoch, tokens = self._sources[source].document(place)
        lengths = self._rollout.min_prompt_tokens, self._rollout.max_prompt_tokens
        length = generator(self._seed, PROMPT_LENGTH, prompt_id).integers(*lengths, endpoint=True)
        return Prompt(prompt_id, epoch, np.array(tokens[:length], np.int32))


class _ShuffledEpochs:
    """All of ``items`` once per epoch, each time in another order."""

    def __init__(self, items: np.ndarray, *key: int) -> None:
        self._items, self._key = items, key
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def locate(self, place: int) -> tuple[int, int]:
        """``(epoch, item)`` at ``place``, counted over all epochs."""
        epoch, position = divmod(place, len(self._items))
        return epoch, int(self._shuffled(epoch)[position])

    def _shuffle(self, epoch: int) -> np.ndarray:
        return generator(*self._key, epoch).permutation(self._items)


class _StoredPrompts:
    """The tokenised prompt file."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self._store = PromptStore(run_dir / "data" / "prompts")
        self._order = _ShuffledEpochs(np.arange(len(self._store)), seed, PROMPT_ORDER, 0)

    def phrasings(self, place: int) -> tuple[int, list[np.ndarray]]:
        """``(epoch, token ids of each phrasing)`` of prompt number ``place``, counted over all epochs."""
        epoch, index = self._order.locate(place)
        return epoch, self._store.phrasings(index)


class _DocumentSource(Protocol):
    def document(self, place: int) -> tuple[int, np.ndarray]:
        """``(epoch, token ids)`` of document number ``place``, counted over all epochs."""


class _StoredDocuments:
    def __init__(self, run_dir: Path, rollout: RolloutConfig, seed: int, index: int) -> None:
        self._store = DocumentStore(run_dir / "data" / f"source_{index}")
        usable = np.flatnonzero(~self._store.heldout_D & can_start_prompt(self._store.length_D, rollout))
        self._order = _ShuffledEpochs(usable, seed, PROMPT_ORDER, index)

    def document(self, place: int) -> tuple[int, np.ndarray]:
        epoch, index = self._order.locate(place)
        return epoch, self._store.document(index)


class _StreamedDocuments:
    """A pass of its own over the stream, in an order of its own."""

    def __init__(self, run_dir: Path, data: DataConfig, rollout: RolloutConfig, seed: int, index: int) -> None:
        tokenizer = load_tokenizer(run_dir)

        def usable(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            return (tokens for tokens in documents if can_start_prompt(len(tokens), rollout))

        self._documents = ForwardCursor(lambda: all_epochs(tokenizer, data, index, (seed, PROMPT_ORDER, index), usable))

    def document(self, place: int) -> tuple[int, np.ndarray]:
        return self._documents.at(place)
