"""A pretrained model beside its tokenizer, and many texts through both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from asa_dist.config import ConfigError
from asa_dist.estimators.estimator import Notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Encoded = dict[str, list[int]]  # of one text: input_ids, and token_type_ids if the tokenizer makes them
CANNOT_LOAD = (OSError, ValueError, KeyError, ImportError)  # what transformers raises for a folder or name


class TextModel:
    """Runs texts in batches of similar length. A causal model is padded and cut at the left: it reads a text's end.

    Args:
        name: for messages.
        batch: texts at once.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, batch: int, notify: Notify,
        *, causal: bool,
    ) -> None:  # fmt: skip
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"{name}: its tokenizer needs a padding or an end-of-text token to run texts in batches")
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = tokenizer.pad_token_id  # where classifiers made of causal models look for it
        self.model, self.tokenizer, self.name, self.notify = model, tokenizer, name, notify
        self._batch, self._causal = batch, causal
        self._side = tokenizer.truncation_side = "left" if causal else "right"
        self._max_tokens = _max_tokens(model, tokenizer)
        self._said_too_long = False

    def encode(
        self, texts: Sequence[str], seconds: Sequence[str] | None = None, *, rendered: bool = False
    ) -> list[Encoded]:
        """Tokens of each text, or of each pair with ``seconds``; what is too long for the model is cut, and that said.

        Args:
            seconds: one for each text. The longer one of a pair is cut.
            rendered: texts are a chat template's output: special tokens are spelled out in them, and none is added.
                Otherwise spelled out ones are ordinary text.
        """
        if not texts:
            return []
        columns = self._tokenize(texts, seconds, rendered)
        if too_long := sum(len(token_ids) > self._max_tokens for token_ids in columns["input_ids"]):
            self._say_too_long(too_long, len(texts))
            columns = self._tokenize(texts, seconds, rendered, truncation=True, max_length=self._max_tokens)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _tokenize(
        self, texts: Sequence[str], seconds: Sequence[str] | None, rendered: bool, **cut: Any
    ) -> Mapping[str, list[list[int]]]:
        return self.tokenizer(
            list(texts), None if seconds is None else list(seconds), add_special_tokens=not rendered,
            split_special_tokens=not rendered, return_attention_mask=False, verbose=False, **cut)  # fmt: skip

    def _say_too_long(self, num_too_long: int, num_texts: int) -> None:
        if not self._said_too_long:
            part = "end" if self._causal else "beginning"
            self.notify(
                f"{self.name}: {num_too_long} of {num_texts} texts are longer than the {self._max_tokens} "
                f"tokens that it takes: it reads their {part} only; of later ones this is not said again"
            )
            self._said_too_long = True

    @torch.inference_mode()
    def fill(self, out: Tensor, encoded: Sequence[Encoded], compute: Callable[[Any], Tensor]) -> Tensor:
        """``out`` [S, …], with ``compute(inputs)`` [B, …] in its rows; those of texts without tokens stay as they are.

        Args:
            compute: is given the model's keyword arguments, [B, T] each.
        """
        length_S = [len(columns["input_ids"]) for columns in encoded]
        # The longest first: if memory is short, it is at once.
        order = sorted((s for s, length in enumerate(length_S) if length), key=lambda s: -length_S[s])
        for first in range(0, len(order), self._batch):
            places = order[first : first + self._batch]
            out[places] = compute(self._padded([encoded[place] for place in places])).to(out)
        return out

    def _padded(self, batch: Sequence[Encoded]) -> Any:
        columns = {name: [row[name] for row in batch] for name in batch[0]}
        inputs = self.tokenizer.pad(columns, padding_side=self._side, return_tensors="pt", verbose=False)
        if self._causal:
            inputs.pop("token_type_ids", None)
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return inputs.to(self.model.device)


def load_text_model(
    kind: Any, name: str, key: str, *, device: str, batch: int, notify: Notify, causal: bool = False
) -> TextModel:
    """Any pretrained model by folder or hub name: in float32 on the CPU, in its own dtype on a GPU.

    Args:
        kind: transformers' AutoModel…
        key: where the name comes from, for messages.

    Raises:
        ConfigError: it cannot be loaded, or lacks weights of this kind of model.
    """
    from transformers import AutoTokenizer

    where = str(Path(name).expanduser())
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model, loading = kind.from_pretrained(
            where, dtype=torch.float32 if device == "cpu" else "auto", output_loading_info=True,
            trust_remote_code=False)  # fmt: skip
    except CANNOT_LOAD as error:
        raise ConfigError(f"{key} = {name!r}: cannot be loaded: {error}") from None
    # transformers draws what is missing at random; a pooler's output is not used here.
    if missing := sorted(weight for weight in loading["missing_keys"] if "pooler" not in weight):
        raise ConfigError(
            f"{key} = {name!r}: {len(missing)} weights of {type(model).__name__} are not in it "
            f"({', '.join(missing[:3])}): it was trained as another kind of model"
        )
    return TextModel(model.to(device).eval().requires_grad_(False), tokenizer, name, batch, notify, causal=causal)


def _max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest text; a huge number where neither model nor tokenizer has a limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions:
        return int(tokenizer.model_max_length)
    for name, module in model.named_modules():  # RoBERTa and its kin count positions from padding_idx + 1
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    return int(min(tokenizer.model_max_length, positions))
