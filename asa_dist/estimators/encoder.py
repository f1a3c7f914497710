"""Sentence embeddings: the mean of a model's last states, of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asa_dist.estimators.estimator import checked
from asa_dist.estimators.text_model import TextModel


class TextEncoder:
    """e = h̄ / ‖h̄‖ with h̄ the mean of h_t over the text's tokens, those included that the tokenizer adds itself.

    The pooling of almost every sentence encoder; a folder that wants another one (``1_Pooling``) gets this one, too. Of
    a causal language model, the states before its output projection.
    """

    def __init__(self, text_model: TextModel) -> None:
        self._text_model = text_model

    def embed(self, texts: Sequence[str]) -> Tensor:
        size = self._text_model.model.config.hidden_size
        encoded = self._text_model.encode(texts)
        embedding_SD = self._text_model.fill(torch.zeros(len(texts), size), encoded, self._mean_states)
        return checked(embedding_SD, self._text_model.name, self._text_model.notify)

    def _mean_states(self, inputs: Any) -> Tensor:
        state_BTD = self._text_model.model.base_model(**inputs).last_hidden_state.float()
        mask_BT1 = inputs["attention_mask"].unsqueeze(-1)
        return F.normalize(state_BTD.masked_fill(mask_BT1 == 0, 0).sum(1) / mask_BT1.sum(1), dim=-1)
