"""One pass over the documents: tokenizer, token files, prompt file, and the checks on what they contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from asa_dist.config import DataConfig, RolloutConfig
from asa_dist.runtime.data.errors import DataError
from asa_dist.runtime.data.prompts import can_start_prompt, read_prompt_file
from asa_dist.runtime.data.sources import describe, is_heldout, read_documents
from asa_dist.runtime.data.store import write_prompt_store, write_store
from asa_dist.runtime.data.tokenizer import encode_documents, encode_prompts, load_pretrained_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More text does not change the merges of a byte-level BPE noticeably; the share of each source is equal.
TOKENIZER_SAMPLE_CHARACTERS = 200_000_000
# A stream is searched this far for held-out documents, a row and a prompt.
STREAM_SEARCH_DOCUMENTS = 100_000


@dataclass
class SourceSummary:
    """Counts of one source. A streaming source's are those of its beginning, as far as ``prepare`` looked."""

    source: str
    train_documents: int = 0
    train_tokens: int = 0
    heldout_documents: int = 0
    heldout_tokens: int = 0
    prompt_documents: int = 0  # training documents with more text than the longest prompt


# --- tokenizer ---------------------------------------------------------------------------------------------------
def make_tokenizer(data: DataConfig, progress: Callable[[str], None]) -> PreTrainedTokenizerBase:
    """Loads ``data.tokenizer.path``, or trains on the training documents of all sources."""
    if data.tokenizer.train is None:
        return load_pretrained_tokenizer(str(data.tokenizer.path))
    vocab_size = data.tokenizer.train.vocab_size
    progress(f"training a byte-level BPE of {vocab_size:,} tokens")
    tokenizer = train_tokenizer(_tokenizer_sample(data), vocab_size)
    if len(tokenizer) < vocab_size:
        progress(f"the vocabulary has {len(tokenizer):,} tokens rather than {vocab_size:,}: in this corpus no further "
                 "pair of tokens occurs twice")
    return tokenizer


def _tokenizer_sample(data: DataConfig) -> Iterator[str]:
    """Training documents only: held-out text is not even seen by the tokenizer."""
    for index, source in enumerate(data.sources):
        room = TOKENIZER_SAMPLE_CHARACTERS // len(data.sources)
        limit = STREAM_SEARCH_DOCUMENTS if source.streaming else None
        for text in islice(read_documents(data, index), limit):
            if not is_heldout(text, data.heldout_fraction):
                yield text[:room]
                room -= len(text)
            if room <= 0:
                break


# --- documents and prompts ---------------------------------------------------------------------------------------
class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def write_source(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, rollout: RolloutConfig, index: int, folder: Path,
    corpus_hash: Hash,
) -> SourceSummary:
    """Writes the store of source ``index`` to ``folder``; every document read goes into ``corpus_hash``.

    Of a stream only held-out documents are stored, and it is read no further than needed.
    """
    streaming = data.sources[index].streaming
    summary = SourceSummary(describe(data.sources[index], index))

    def documents() -> Iterator[tuple[np.ndarray, bool]]:
        texts, same_texts = tee(islice(read_documents(data, index), STREAM_SEARCH_DOCUMENTS if streaming else None))
        for tokens, text in zip(encode_documents(tokenizer, texts), same_texts, strict=False):
            corpus_hash.update(len(text.encode()).to_bytes(8, "big") + text.encode())
            heldout = is_heldout(text, data.heldout_fraction)
            _count(summary, len(tokens), heldout, rollout)
            if heldout or not streaming:
                yield tokens, heldout
            if streaming and _is_enough(summary, data, rollout):
                return

    write_store(folder, documents())
    return summary


def _count(summary: SourceSummary, num_tokens: int, heldout: bool, rollout: RolloutConfig) -> None:
    if heldout:
        summary.heldout_documents += 1
        summary.heldout_tokens += num_tokens
    else:
        summary.train_documents += 1
        summary.train_tokens += num_tokens
        summary.prompt_documents += bool(can_start_prompt(num_tokens, rollout))


def _is_enough(summary: SourceSummary, data: DataConfig, rollout: RolloutConfig) -> bool:
    """Whether the beginning of a stream holds all held-out rows, a training row and a prompt."""
    return (summary.heldout_tokens >= data.max_heldout_rows * data.sequence_length
            and summary.train_tokens >= data.sequence_length
            and (summary.prompt_documents > 0 or rollout.prompt_file is not None))


def check_sources(sources: list[SourceSummary], data: DataConfig, rollout: RolloutConfig) -> None:
    """Raises :class:`DataError` unless there are a training row and a prompt per source, and a held-out document."""
    for source in sources:
        if source.train_documents + source.heldout_documents == 0:
            raise DataError(f"{source.source}: no document in it (blank ones do not count)")
        if source.train_tokens < data.sequence_length:
            raise DataError(f"{source.source}: {source.train_tokens} training tokens do not fill one row of "
                            f"data.sequence_length {data.sequence_length}; add text or shorten rows")
        if rollout.prompt_file is None and source.prompt_documents == 0:
            raise DataError(f"{source.source}: none of {source.train_documents} training documents is longer than "
                            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens}, so no prompt can be cut from one; "
                            "lower it, or set rollout.prompt_file")
    if sum(source.heldout_documents for source in sources) == 0:
        num_documents = sum(source.train_documents for source in sources)
        raise DataError(f"the held-out split is empty: none of {num_documents} documents fell into "
                        f"data.heldout_fraction {data.heldout_fraction}; raise it, or give more documents (two or more "
                        "blank lines divide a text file into documents)")


def write_prompts(tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig, folder: Path) -> int:
    """Writes the store of ``rollout.prompt_file`` to ``folder``; returns how many prompts there are.

    Raises:
        DataError: a file that cannot be read; a phrasing that is empty or longer than ``rollout.max_prompt_tokens``;
            fewer than ``rollout.prompt_variants`` phrasings of a prompt.
    """
    lines = read_prompt_file(Path(str(rollout.prompt_file)).expanduser())
    encoded = encode_prompts(tokenizer, (text for _, texts in lines for text in texts))
    prompts = [list(islice(encoded, len(texts))) for _, texts in lines]
    for (place, _), phrasings in zip(lines, prompts, strict=True):
        if len(phrasings) < rollout.prompt_variants:
            raise DataError(f"{place}: {len(phrasings)} of {rollout.prompt_variants} phrasings, the prompt and its "
                            "variants counted: rollout.prompt_variants asks for so many; add 'variants'")
        for number, tokens in enumerate(phrasings):
            if not 1 <= len(tokens) <= rollout.max_prompt_tokens:
                raise DataError(f"{place}: {f'variant {number}' if number else 'the prompt'} has {len(tokens)} tokens; "
                                f"allowed are 1 to rollout.max_prompt_tokens {rollout.max_prompt_tokens}")
    write_prompt_store(folder, prompts)
    return len(prompts)
