"""Judges that are sequence classifiers: equations (3) and (4) from any pretrained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asa_dist.estimators.estimator import Question, checked
from asa_dist.estimators.text_model import TextModel
from asa_dist.udasa.uncertainty import factual_uncertainty, nli_labels, unsafe_label, value_uncertainty


class NliJudge:
    """P(neutral) + P(contradiction), premise = prompt, hypothesis = response: equation (3).

    Raises:
        ConfigError: the model does not say which of its labels is which.
    """

    def __init__(self, text_model: TextModel) -> None:
        self._text_model = text_model
        self._labels = nli_labels(text_model.model.config.id2label)

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        model = self._text_model.model
        encoded = self._text_model.encode([prompt for prompt, _ in questions], [response for _, response in questions])
        u_S = self._text_model.fill(
            torch.full((len(questions),), torch.nan, dtype=torch.float64), encoded,
            lambda inputs: factual_uncertainty(model(**inputs).logits, self._labels))  # fmt: skip
        return checked(u_S, self._text_model.name, self._text_model.notify)


class ClassifierJudge:
    """P(unsafe) of the response by itself: equation (4). A blank one harms nobody, so it counts 0.

    Args:
        unsafe: name of the label.

    Raises:
        ConfigError: the model has no such label.
    """

    def __init__(self, text_model: TextModel, unsafe: str) -> None:
        config = text_model.model.config
        self._text_model = text_model
        self._unsafe = unsafe_label(config.id2label, unsafe)
        self._independent = config.problem_type == "multi_label_classification"

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        model = self._text_model.model
        spoken = [place for place, (_, response) in enumerate(questions) if response.strip()]
        encoded = self._text_model.encode([questions[place][1] for place in spoken])
        u_S = torch.zeros(len(questions), dtype=torch.float64)
        u_S[spoken] = self._text_model.fill(
            torch.full((len(spoken),), torch.nan, dtype=torch.float64), encoded,
            lambda inputs: value_uncertainty(model(**inputs).logits, self._unsafe, self._independent))  # fmt: skip
        return checked(u_S, self._text_model.name, self._text_model.notify)
