"""What every estimator is: an encoder of texts, or a judge of responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Question = tuple[str, str]  # prompt, as it was put (without a chat template), and response
Notify = Callable[[str], None]  # is told, in one sentence, what could not be measured or had to be changed, and why


class EstimatorError(Exception):
    """Measuring cannot go on: the message says what has failed and what to do. What was measured before is sound."""


class Encoder(Protocol):
    """Texts to their meaning."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Float32 [S, D] on the CPU, of length 1; zeros for a text without tokens. NaN = could not be measured, and the
        reason was notified."""
        ...


class Judge(Protocol):
    """How doubtful responses are, each by itself."""

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        """Float64 [S] in [0, 1] on the CPU. NaN = could not be measured, and the reason was notified.

        Raises:
            EstimatorError: whatever was asked, the judge would not answer; asking again later may help.
        """
        ...


def checked(value: Tensor, what: str, notify: Notify) -> Tensor:
    """``value``, [S] or [S, D], with NaN in every row that is not finite; says how many there are."""
    broken_S = ~(value.isfinite() if value.dim() == 1 else value.isfinite().all(1))
    if num_broken := int(broken_S.sum()):
        notify(f"{what}: {num_broken} of {len(value)} texts are not measured: the model's output is not finite")
        value[broken_S] = torch.nan
    return value
