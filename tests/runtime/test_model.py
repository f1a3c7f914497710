"""The module: packed equals unpacked, whatever shares the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asa_dist.asa.packing import MicroBatch, corpus_batch, pack_groups
from asa_dist.records import RolloutGroup
from asa_dist.runtime.model import ModelError, count_parameters, named_parts, segment_mask
from tests.asa import worlds
from tests.distributed import tiny


def logprobs(batch: MicroBatch) -> torch.Tensor:
    model = tiny.model(tiny.config(stage=0, model__tie_word_embeddings=False))
    with torch.no_grad():
        _, final_NH = model._trunk(batch)
        return model.lm.get_output_embeddings()(final_NH, batch.target_RT.flatten())[0]


def test_packed_rollouts_equal_one_sequence_per_row() -> None:
    groups = worlds.groups(np.random.default_rng(4), group_size=3)
    packed = pack_groups(groups, 120, worlds.TABLES, version=0)
    assert packed.input_ids_RT.shape[0] < 15 // 2, "several sequences should share a row"
    packed_N = logprobs(packed)
    for index, (group, response) in enumerate((g, r) for g in groups for r in g.responses):
        length = len(group.prompt.token_ids) + len(response.token_ids)
        alone = pack_groups([RolloutGroup(0, 0, group.prompt, (response,))], length, worlds.TABLES, version=0)
        assert packed.groups is not None and alone.groups is not None
        torch.testing.assert_close(
            packed_N[packed.groups.predicts_N == index],
            logprobs(alone)[alone.groups.predicts_N == 0],
            atol=1e-5,
            rtol=1e-5,
        )


def test_packed_documents_equal_documents_alone() -> None:
    rng = np.random.default_rng(5)
    documents = [torch.from_numpy(rng.integers(1, worlds.VOCAB, length)) for length in (7, 20, 13)]

    def rows(members: list[torch.Tensor]) -> MicroBatch:
        ids = torch.cat(members).unsqueeze(0)
        positions = torch.cat([torch.arange(len(member)) for member in members]).unsqueeze(0)
        segments = torch.cat([torch.full((len(member),), i) for i, member in enumerate(members)]).unsqueeze(0)
        targets = torch.cat([torch.cat([member[1:], torch.tensor([-100])]) for member in members]).unsqueeze(0)
        return corpus_batch(ids, positions, segments, targets)

    together = logprobs(rows(documents))
    torch.testing.assert_close(
        together, torch.cat([logprobs(rows([document])) for document in documents]), atol=1e-5, rtol=1e-5
    )


def test_segment_mask() -> None:
    mask = segment_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("tied", [True, False])
def test_parts_and_counts(tied: bool) -> None:
    model = tiny.model(tiny.config(stage=0, model__tie_word_embeddings=tied))
    names = [name for part, name, _ in named_parts(model) if part == "psi"]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) is not tied
    assert "model.embed_tokens.weight" in names
    hidden, mlp, layers, head, vocab = 32, 48, 3, 16, worlds.VOCAB
    block = (
        2 * hidden * hidden + 2 * hidden * head + 3 * hidden * mlp + 2 * hidden
    )  # q, o; k, v with one head of two; MLP; norms
    counts = count_parameters(model)
    assert counts["psi"] == layers * block + hidden + vocab * hidden * (1 if tied else 2)
    assert counts["phi"] == 16 * hidden + 2 * 16 + 1 + hidden + 1 + 4 * 16 + 4 + 4
    assert counts["xi"] == 3 * 5 + 3


def test_logits_that_are_no_plain_product_are_refused(tmp_path: object) -> None:
    from transformers import Gemma2Config

    Gemma2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    ).save_pretrained(str(tmp_path))
    settings = tiny.config(stage=0).model_copy(
        update={"model": tiny.config(stage=0).model.model_copy(update={"name_or_path": str(tmp_path)})}
    )
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        tiny.build_model(settings, 64, 0, on_cuda=False)
