"""The estimators that the config asks for: checked before anything heavy starts, and built."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from asa_dist.config import ConfigError
from asa_dist.config_udasa import FactualConfig, SemanticConfig, UdasaConfig, ValueConfig
from asa_dist.estimators.classifiers import ClassifierJudge, NliJudge
from asa_dist.estimators.encoder import TextEncoder
from asa_dist.estimators.endpoint import EndpointJudge, check_endpoint
from asa_dist.estimators.estimator import Encoder, Judge, Notify
from asa_dist.estimators.self_judge import SelfJudge, answer_tokens
from asa_dist.estimators.text_model import CANNOT_LOAD, TextModel, load_text_model
from asa_dist.udasa.uncertainty import nli_labels, unsafe_label


@dataclass(frozen=True)
class Estimators:
    """One for each of ``udasa.uncertainties``, None for the others."""

    semantic: Encoder | None
    factual: Judge | None
    value: Judge | None


# --- building ----------------------------------------------------------------------------------------------------
def _log_warning(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def build_estimators(config: UdasaConfig, model_folder: Path, device: str, notify: Notify = _log_warning) -> Estimators:
    """Loads every model once, the measured one only if it judges or encodes itself.

    Args:
        model_folder: the measured causal language model with its tokenizer.
        device: "cpu" or "cuda".
        notify: is told what could not be measured and why, as long as the estimators live.

    Raises:
        ConfigError: :func:`check_estimators`; a model cannot be loaded.
    """
    check_estimators(config)
    load = _Loader(config, model_folder, device, notify)
    wanted = config.uncertainties
    return Estimators(
        semantic=_encoder(config.semantic, load) if "semantic" in wanted else None,
        factual=_factual_judge(config.factual, load) if "factual" in wanted else None,
        value=_value_judge(config, load) if "value" in wanted else None,
    )


class _Loader:
    def __init__(self, config: UdasaConfig, model_folder: Path, device: str, notify: Notify) -> None:
        self._model_folder = model_folder
        self.notify = notify
        self._options: dict[str, Any] = {"device": device, "batch": config.scorer_batch, "notify": notify}

    @cached_property
    def measured_model(self) -> TextModel:
        from transformers import AutoModelForCausalLM

        return load_text_model(
            AutoModelForCausalLM, str(self._model_folder), "the measured model", causal=True, **self._options
        )

    def classifier(self, name: str, key: str) -> TextModel:
        from transformers import AutoModelForSequenceClassification

        return load_text_model(AutoModelForSequenceClassification, name, key, **self._options)

    def encoder(self, name: str, key: str) -> TextModel:
        from transformers import AutoModel

        return load_text_model(AutoModel, name, key, **self._options)


def _encoder(semantic: SemanticConfig, load: _Loader) -> Encoder:
    if semantic.encoder is None:
        return TextEncoder(load.measured_model)
    return TextEncoder(load.encoder(semantic.encoder, "udasa.semantic.encoder"))


def _factual_judge(factual: FactualConfig, load: _Loader) -> Judge:
    match factual.judge:
        case "self_judge":
            return SelfJudge(load.measured_model, factual.question)
        case "nli":
            return NliJudge(load.classifier(_nli_model(factual), "udasa.factual.model"))


def _value_judge(config: UdasaConfig, load: _Loader) -> Judge:
    value = config.value
    match value.judge:
        case "self_judge":
            return SelfJudge(load.measured_model, value.question)
        case "classifier":
            name, unsafe = _classifier_model(value)
            return ClassifierJudge(load.classifier(name, "udasa.value.model"), unsafe)
        case "endpoint":
            rate = value.requests_per_second / config.scorers  # which share it
            return EndpointJudge(value, config.scorer_batch, load.notify, requests_per_second=rate)


# --- checking ----------------------------------------------------------------------------------------------------
def check_estimators(config: UdasaConfig, model_folder: Path | None = None) -> None:
    """Everything that can be said before anything heavy starts: no weights are read, no endpoint is asked.

    Args:
        model_folder: the measured model's, for its tokenizer; None = it is not there yet.

    Raises:
        ConfigError: one line per problem: a missing setting, a folder or name that is not a model of the right kind,
            labels that say too little, no such label, a key that is not set, yes and no that begin with the same token.
    """
    problems: list[str] = []

    @contextmanager
    def collected() -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.append(str(error))

    wanted, judges = config.uncertainties, {"factual": config.factual.judge, "value": config.value.judge}
    with collected():
        if "semantic" in wanted and config.semantic.encoder is not None:
            _pretrained_config(config.semantic.encoder, "udasa.semantic.encoder")
    with collected():
        if "factual" in wanted:
            _check_factual(config.factual)
    with collected():
        if "value" in wanted:
            _check_value(config.value)
    with collected():
        if model_folder is not None and any(judges.get(name) == "self_judge" for name in wanted):
            answer_tokens(_tokenizer(model_folder))
    if problems:
        raise ConfigError("\n".join(problems))


def _check_factual(factual: FactualConfig) -> None:
    if factual.judge == "nli":
        nli_labels(_classifier_config(_nli_model(factual), "udasa.factual.model").id2label)


def _check_value(value: ValueConfig) -> None:
    match value.judge:
        case "classifier":
            name, unsafe = _classifier_model(value)
            unsafe_label(_classifier_config(name, "udasa.value.model").id2label, unsafe)
        case "endpoint":
            check_endpoint(value)


def _nli_model(factual: FactualConfig) -> str:
    if factual.model is None:
        raise ConfigError("udasa.factual.model: udasa.factual.judge = nli needs the folder or hub name of an NLI model")
    return factual.model


def _classifier_model(value: ValueConfig) -> tuple[str, str]:
    """Its name, and that of its unsafe label."""
    if value.model is None:
        raise ConfigError(
            "udasa.value.model: udasa.value.judge = classifier needs the folder or hub name of a safety classifier"
        )
    if value.unsafe_label is None:
        raise ConfigError(
            "udasa.value.unsafe_label: udasa.value.judge = classifier needs the name of the label that "
            "stands for unsafe"
        )
    return value.model, value.unsafe_label


def _classifier_config(name: str, key: str) -> Any:
    config = _pretrained_config(name, key)
    kinds = config.architectures or []
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(f"{key} = {name!r}: is a {', '.join(kinds)}, not a model for sequence classification")
    return config


def _pretrained_config(name: str, key: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except CANNOT_LOAD as error:
        raise ConfigError(f"{key} = {name!r}: neither a model's folder nor a known name: {error}") from None


def _tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model_folder), trust_remote_code=False)
    except CANNOT_LOAD as error:
        raise ConfigError(f"{model_folder}: the measured model's tokenizer cannot be loaded: {error}") from None
