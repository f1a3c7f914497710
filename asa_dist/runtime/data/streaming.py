"""Sources that can only be read forward: one pass over the stream per epoch, and a cursor that hides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from asa_dist.config import DataConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.order import derived_seed
from asa_dist.runtime.data.sources import describe, is_heldout, shuffled_documents
from asa_dist.runtime.data.tokenizer import encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


class ForwardCursor(Generic[Item]):
    """Items by number from an iterator that can only be restarted: skips forward, starts again for an earlier item."""

    def __init__(self, start: Callable[[], Iterator[Item]]) -> None:
        self._start = start
        self._items, self._next = start(), 0

    def at(self, number: int) -> Item:
        if number < self._next:
            self._items, self._next = self._start(), 0
        item = next(islice(self._items, number - self._next, None))
        self._next = number + 1
        return item


def all_epochs(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, index: int, key: tuple[int, ...],
    select: Callable[[Iterator[np.ndarray]], Iterator[Item]],
) -> Iterator[tuple[int, Item]]:
    """``(epoch, item)`` without end: what ``select`` makes of each epoch's tokenised training documents.

    Each epoch is shuffled by its own seed, derived from ``key`` and the epoch.

    Raises:
        DataError: an epoch gives nothing: the stream has changed since ``prepare`` looked at it.
    """
    for epoch in count():
        texts = shuffled_documents(data, index, derived_seed(*key, epoch))
        training = (text for text in texts if not is_heldout(text, data.heldout_fraction))
        nothing = True
        for item in select(encode_documents(tokenizer, training)):
            nothing = False
            yield epoch, item
        if nothing:
            raise DataError(f"{describe(data.sources[index], index)}: the stream no longer holds what this run needs: "
                            f"a row of {data.sequence_length} tokens, and documents longer than the longest prompt")
