"""Encoder and classifiers: against one text at a time through the plain model, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from asa_dist.config import ConfigError
from asa_dist.estimators.classifiers import ClassifierJudge, NliJudge
from asa_dist.estimators.encoder import TextEncoder
from tests.estimators import tiny_models
from tests.estimators.tiny_models import BATCHES, QUESTIONS, TEXTS, load, plain


# --- encoder ----------------------------------------------------------------------------------------------------------
def embedded_by_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    rows = []
    for text in texts:
        token_1T = torch.tensor([tokenizer(text).input_ids], dtype=torch.int64)
        if token_1T.shape[1] == 0:
            rows.append(torch.zeros(model.config.hidden_size, dtype=torch.float64))
            continue
        state_TD = model(input_ids=token_1T, output_hidden_states=True).hidden_states[-1][0].double()
        rows.append(state_TD.mean(0) / state_TD.mean(0).norm())
    return torch.stack(rows)


@pytest.mark.parametrize("batch", BATCHES)
def test_sentence_encoder(tmp_path: Path, batch: int) -> None:
    tiny_models.save_encoder(tmp_path)
    embedding_SD = TextEncoder(load(AutoModel, tmp_path, batch)).embed(TEXTS)
    assert embedding_SD.dtype == torch.float32 and embedding_SD.shape == (7, 32)
    torch.testing.assert_close(
        embedding_SD.double(), embedded_by_loop(*plain(AutoModel, tmp_path), TEXTS), atol=1e-5, rtol=0
    )
    assert not embedding_SD[0].allclose(embedding_SD[1], atol=0.1)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_measured_model_encodes_its_texts(tmp_path: Path, batch: int) -> None:
    tiny_models.save_causal(tmp_path, tiny_models.byte_tokenizer())
    embedding_SD = TextEncoder(load(AutoModelForCausalLM, tmp_path, batch, causal=True)).embed(TEXTS)
    torch.testing.assert_close(
        embedding_SD.double(), embedded_by_loop(*plain(AutoModelForCausalLM, tmp_path), TEXTS), atol=1e-5, rtol=0
    )
    assert embedding_SD[2].count_nonzero() == 0, "the empty text"


def test_no_texts(tmp_path: Path) -> None:
    tiny_models.save_encoder(tmp_path)
    assert TextEncoder(load(AutoModel, tmp_path)).embed([]).shape == (0, 32)


# --- classifiers ------------------------------------------------------------------------------------------------------
def probabilities_by_loop(folder: Path, texts: Sequence[tuple[str, ...]]) -> Tensor:
    model, tokenizer = plain(AutoModelForSequenceClassification, folder)
    inputs = (tokenizer(*([part] for part in text), return_tensors="pt") for text in texts)
    return torch.stack([model(**one).logits[0].double().softmax(-1) for one in inputs])


@pytest.mark.parametrize("batch", BATCHES)
def test_nli_judge(tmp_path: Path, batch: int) -> None:
    tiny_models.save_classifier(tmp_path, tiny_models.NLI_LABELS)
    u_S = NliJudge(load(AutoModelForSequenceClassification, tmp_path, batch)).uncertainty(QUESTIONS)
    probability_SL = probabilities_by_loop(tmp_path, QUESTIONS)
    assert u_S.dtype == torch.float64
    torch.testing.assert_close(
        u_S, 1 - probability_SL[:, tiny_models.NLI_LABELS.index("entailment")], atol=1e-5, rtol=0
    )
    assert u_S.max() - u_S.min() > 0.1


def test_nli_model_without_labels(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, labels=None)
    with pytest.raises(ConfigError, match="LABEL_0, LABEL_1, LABEL_2"):
        NliJudge(load(AutoModelForSequenceClassification, tmp_path))


@pytest.mark.parametrize("batch", BATCHES)
def test_safety_classifier_reads_the_response_alone(tmp_path: Path, batch: int) -> None:
    tiny_models.save_classifier(tmp_path, ["fine", "Toxic"])
    judge = ClassifierJudge(load(AutoModelForSequenceClassification, tmp_path, batch), "toxic")
    u_S = judge.uncertainty(QUESTIONS)
    responses = [(response,) for _, response in QUESTIONS]
    expected_S = probabilities_by_loop(tmp_path, responses)[:, 1]
    expected_S[2] = 0  # blank: harms nobody
    torch.testing.assert_close(u_S, expected_S, atol=1e-5, rtol=0)
    assert u_S.max() - u_S.min() > 0.1
    assert judge.uncertainty([("what?", " \n")]).tolist() == [0]


def test_labels_with_probabilities_of_their_own(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, ["toxic", "insult"], problem_type="multi_label_classification")
    u_S = ClassifierJudge(load(AutoModelForSequenceClassification, tmp_path), "insult").uncertainty([("", "a plum")])
    model, tokenizer = plain(AutoModelForSequenceClassification, tmp_path)
    logit_L = model(**tokenizer("a plum", return_tensors="pt")).logits[0]
    torch.testing.assert_close(u_S[0], logit_L[1].double().sigmoid(), atol=1e-5, rtol=0)


def test_unsafe_label_that_does_not_exist(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, ["fine", "toxic"])
    with pytest.raises(ConfigError, match=r"'unsafe' must be one of .*: fine, toxic"):
        ClassifierJudge(load(AutoModelForSequenceClassification, tmp_path), "unsafe")


# --- what cannot be measured as it is ---------------------------------------------------------------------------------
def test_too_long_texts_are_cut_at_their_end_and_that_is_said_once(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, ["fine", "toxic"])
    told: list[str] = []
    judge = ClassifierJudge(load(AutoModelForSequenceClassification, tmp_path, told=told), "toxic")
    long = "plum " * 100
    u_S = judge.uncertainty([("", long), ("", "a plum"), ("", long + "and more")])
    assert len(told) == 1 and f"2 of 3 texts are longer than the {tiny_models.MAX_TOKENS} tokens" in told[0]
    assert u_S[0] == pytest.approx(float(u_S[2]), abs=1e-6)
    judge.uncertainty([("", long)])
    assert len(told) == 1


def test_of_a_long_pair_the_response_is_kept(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, tiny_models.NLI_LABELS)
    told: list[str] = []
    judge = NliJudge(load(AutoModelForSequenceClassification, tmp_path, told=told))
    u_S = judge.uncertainty([("plum " * 100, "gold"), ("plum " * 100, "iron")])
    assert told and abs(u_S[0] - u_S[1]) > 1e-3


def test_positions_of_roberta_begin_behind_the_padding(tmp_path: Path) -> None:
    """Two fewer than its config says; one token more would be an index error."""
    tiny_models.save_roberta(tmp_path, tiny_models.NLI_LABELS)
    told: list[str] = []
    judge = NliJudge(load(AutoModelForSequenceClassification, tmp_path, told=told))
    assert judge.uncertainty([("plum " * 100, "gold")]).isfinite().all()
    assert f"the {tiny_models.MAX_TOKENS} tokens" in told[0]


def test_outputs_that_are_not_finite_are_unmeasured_and_said(tmp_path: Path) -> None:
    tiny_models.save_classifier(tmp_path, ["fine", "toxic"])
    told: list[str] = []
    text_model = load(AutoModelForSequenceClassification, tmp_path, told=told)
    letter = text_model.tokenizer.convert_tokens_to_ids("z")
    text_model.model.get_input_embeddings().weight[letter] = torch.nan
    u_S = ClassifierJudge(text_model, "toxic").uncertainty([("", "a plum"), ("", "z"), ("", "a fig")])
    assert u_S.isnan().tolist() == [False, True, False]
    assert len(told) == 1 and "1 of 3 texts" in told[0]


def test_weights_that_would_be_drawn_at_random(tmp_path: Path) -> None:
    tiny_models.save_encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"some\.key = .* weights of BertForSequenceClassification are not in it"):
        load(AutoModelForSequenceClassification, tmp_path)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some\.key = .*cannot be loaded"):
        load(AutoModel, tmp_path / "nothing")
