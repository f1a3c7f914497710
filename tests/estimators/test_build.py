"""Estimators as the config names them: what is wrong is said before anything is loaded; each model is loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

from asa_dist.config import ConfigError
from asa_dist.config_udasa import UdasaConfig
from asa_dist.estimators import build_estimators, check_estimators
from asa_dist.estimators.classifiers import ClassifierJudge, NliJudge
from asa_dist.estimators.encoder import TextEncoder
from asa_dist.estimators.endpoint import EndpointJudge
from asa_dist.estimators.self_judge import SelfJudge
from tests.estimators import tiny_models

VARIABLE = "TEST_MODERATION_KEY"


def config_of(**sections: dict[str, Any]) -> UdasaConfig:
    return UdasaConfig.model_validate({"uncertainties": list(sections), **sections})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return tiny_models.save_causal(tmp_path / "measured", tiny_models.byte_tokenizer())


def test_by_default_the_measured_model_says_it_all_and_is_loaded_once(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        loaded.append(args)
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    estimators = build_estimators(UdasaConfig(), measured, "cpu", pytest.fail)
    assert isinstance(estimators.semantic, TextEncoder)
    assert isinstance(estimators.factual, SelfJudge) and isinstance(estimators.value, SelfJudge)
    assert len(loaded) == 1
    question = [("what is it?", "a plum")]
    u_factual, u_value = (judge.uncertainty(question) for judge in (estimators.factual, estimators.value))
    assert u_factual != u_value, "each has its own question"


def test_models_of_their_own(tmp_path: Path) -> None:
    config = config_of(
        semantic={"encoder": str(tiny_models.save_encoder(tmp_path / "encoder"))},
        factual={"judge": "nli", "model": str(tiny_models.save_classifier(tmp_path / "nli", tiny_models.NLI_LABELS))},
        value={
            "judge": "classifier",
            "unsafe_label": "toxic",
            "model": str(tiny_models.save_classifier(tmp_path / "safety", ["toxic", "fine"])),
        },
    )
    check_estimators(config)
    estimators = build_estimators(config, tmp_path / "no measured model is needed", "cpu", pytest.fail)
    assert isinstance(estimators.semantic, TextEncoder)
    assert isinstance(estimators.factual, NliJudge) and isinstance(estimators.value, ClassifierJudge)
    assert estimators.semantic.embed(["a plum"]).norm() == pytest.approx(1.0)
    for judge in (estimators.factual, estimators.value):
        assert 0 < judge.uncertainty([("what?", "a plum")]).item() < 1


def test_only_those_that_are_measured(measured: Path) -> None:
    config = UdasaConfig.model_validate({"uncertainties": ["semantic"], "value": {"judge": "endpoint"}})
    estimators = build_estimators(config, measured, "cpu", pytest.fail)
    assert estimators.factual is None and estimators.value is None


def test_scorers_share_the_rate_of_an_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    value = {"judge": "endpoint", "url": "https://host/v1/moderations", "requests_per_second": 6.0}
    rates = []
    build = EndpointJudge.__init__

    def noted(self: EndpointJudge, *args: Any, requests_per_second: float, **options: Any) -> None:
        rates.append(requests_per_second)
        build(self, *args, requests_per_second=requests_per_second, **options)

    monkeypatch.setattr(EndpointJudge, "__init__", noted)
    build_estimators(config_of(value=value).model_copy(update={"scorers": 3}), tmp_path, "cpu", pytest.fail)
    assert rates == [2.0]


# --- what is wrong ----------------------------------------------------------------------------------------------------
def test_every_problem_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    config = config_of(
        semantic={"encoder": str(tmp_path / "nowhere")},
        factual={"judge": "nli", "model": str(tiny_models.save_classifier(tmp_path / "unlabeled", labels=None))},
        value={"judge": "endpoint", "url": "https://host/v1/moderations", "api_key_variable": VARIABLE},
    )
    with pytest.raises(ConfigError) as raised:
        check_estimators(config)
    for problem in ("udasa.semantic.encoder = ", "LABEL_0, LABEL_1, LABEL_2", f"variable {VARIABLE} is not set here"):
        assert problem in str(raised.value)


@pytest.mark.parametrize(("sections", "message"), [
    ({"factual": {"judge": "nli"}}, r"udasa\.factual\.model: .* needs the folder"),
    ({"value": {"judge": "classifier", "unsafe_label": "toxic"}}, r"udasa\.value\.model: .* needs the folder"),
    ({"value": {"judge": "classifier", "model": "x"}}, r"udasa\.value\.unsafe_label: .* needs the name"),
    ({"value": {"judge": "endpoint"}}, r"udasa\.value\.url: .* needs the http\(s\) address"),
])  # fmt: skip
def test_settings_that_are_missing(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    for check in (check_estimators, lambda config: build_estimators(config, tmp_path, "cpu", pytest.fail)):
        with pytest.raises(ConfigError, match=message):
            check(config_of(**sections))


def test_labels_are_read_without_the_weights(tmp_path: Path) -> None:
    folder = tiny_models.save_classifier(tmp_path / "safety", ["fine", "toxic"])
    (folder / "model.safetensors").unlink()
    value = {"judge": "classifier", "model": str(folder), "unsafe_label": "toxic"}
    check_estimators(config_of(value=value))
    with pytest.raises(ConfigError, match=r"'unsafe' must be one of the labels of udasa\.value\.model: fine, toxic"):
        check_estimators(config_of(value={**value, "unsafe_label": "unsafe"}))


def test_a_model_of_another_kind(tmp_path: Path) -> None:
    factual = {"judge": "nli", "model": str(tiny_models.save_encoder(tmp_path))}
    with pytest.raises(ConfigError, match="is a BertModel, not a model for sequence classification"):
        check_estimators(config_of(factual=factual))


def test_yes_and_no_of_the_measured_model(tmp_path: Path, measured: Path) -> None:
    check_estimators(UdasaConfig(), measured)
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("#")
    folder = tiny_models.save_causal(tmp_path / "marks", tokenizer)
    check_estimators(UdasaConfig())
    with pytest.raises(ConfigError, match="both begin with"):
        check_estimators(UdasaConfig(), folder)
    check_estimators(config_of(semantic={}), folder)


def test_measured_model_without_a_tokenizer(measured: Path) -> None:
    for file in (measured / "tokenizer.json", measured / "tokenizer_config.json"):
        file.unlink()
    with pytest.raises(ConfigError, match="the measured model's tokenizer cannot be loaded"):
        check_estimators(UdasaConfig(), measured)
    with pytest.raises(ConfigError, match=r"the measured model = .*cannot be loaded"):
        build_estimators(UdasaConfig(), measured, "cpu", pytest.fail)


def test_dtype_of_the_saved_model_does_not_matter_on_a_cpu(measured: Path, tmp_path: Path) -> None:
    """bfloat16 products are slow there, and too coarse to compare siblings."""
    model = AutoModelForCausalLM.from_pretrained(measured).bfloat16()
    half = tiny_models.save(model, tiny_models.byte_tokenizer(), tmp_path / "half")
    encoder = build_estimators(config_of(semantic={}), half, "cpu", pytest.fail).semantic
    assert encoder is not None
    tokens_1T = tiny_models.byte_tokenizer()("a plum", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    state_TD = model(tokens_1T, output_hidden_states=True).hidden_states[-1][0]
    expected_D = state_TD.mean(0) / state_TD.mean(0).norm()
    torch.testing.assert_close(encoder.embed(["a plum"])[0], expected_D, atol=1e-5, rtol=0)
