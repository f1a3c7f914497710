"""The tokenizer of a run: loaded or trained, always the same folder afterwards; documents to token ids; token tables.

Array suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asa_dist.runtime.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asa_dist.asa.packing import TextTables

END_OF_TEXT = "<|endoftext|>"
TEXTS_PER_CALL = 256  # enough for the tokenizer's own threads


def load_tokenizer(run_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``prepare`` put into the run folder. Raises :class:`DataError` if there is none."""
    folder = run_dir / "tokenizer"
    if not folder.is_dir():
        raise DataError(f"{folder}: no tokenizer: this run folder was not prepared")
    return load_pretrained_tokenizer(str(folder))


def load_pretrained_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Any ``transformers`` tokenizer by folder or hub name.

    Raises:
        DataError: it cannot be loaded, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name_or_path).expanduser()), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"tokenizer {name_or_path!r} cannot be loaded: {error}") from None
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {name_or_path!r} has no end-of-text token: set eos_token in its "
                        "tokenizer_config.json to the token that ends a document")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE with at most ``vocab_size`` tokens: end-of-text (id 0), the 256 bytes, then merges by frequency.

    Deterministic. Ends with fewer tokens when no pair occurs twice any more: ``len(tokenizer)`` is the real size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids int32 [N] of each text: beginning-of-text if the tokenizer adds one by itself, text, end-of-text.

    Special tokens spelled out inside a text are encoded as ordinary text: nobody's prose ends a document.
    """
    for tokens in encode_prompts(tokenizer, texts):
        yield np.append(tokens, np.int32(tokenizer.eos_token_id))


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """As :func:`encode_documents`, without the end-of-text; may be empty."""
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and bos in tokenizer("").input_ids[:1] else []
    remaining = iter(texts)
    while batch := list(islice(remaining, TEXTS_PER_CALL)):
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
                            return_token_type_ids=False, verbose=False)
        for ids in encoded.input_ids:
            yield np.array(prefix + ids, np.int32)


def token_tables(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TextTables:
    """Decodes every token alone, [V] with V = ``vocab_size`` of the model; ids without a token are blank.

    A piece of a multi-byte character decodes to U+FFFD: visible, and ends nothing. Special tokens count as blank.
    """
    from asa_dist.asa.packing import TextTables  # brings torch

    pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], skip_special_tokens=True,
                                    clean_up_tokenization_spaces=False)
    pieces += [""] * (vocab_size - len(pieces))
    return TextTables(
        claim_end_V=np.array([piece.rstrip(" ").endswith((".", "!", "?", ";")) or "\n" in piece for piece in pieces]),
        sentence_end_V=np.array([piece.rstrip().endswith((".", "!", "?")) for piece in pieces]),
        blank_V=np.array([not piece.strip() for piece in pieces]))
