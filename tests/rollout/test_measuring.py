"""A measured round: its files are those of one engine and plain loops, whatever died; nothing is done twice.

The model is a tiny one with random weights, the estimators count letters: simple, but no less real to the actors.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from asa_dist.config import ConfigError, ModelConfig, RolloutConfig
from asa_dist.config_udasa import UdasaConfig
from asa_dist.estimators.build import Estimators
from asa_dist.estimators.estimator import EstimatorError, Notify, Question
from asa_dist.records import Prompt, Response
from asa_dist.rollout.cluster import ClusterError, RayHandle, connect
from asa_dist.rollout.coordinator import RolloutFailure
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.hf_engine import HfEngine
from asa_dist.rollout.measuring import (
    Generator,
    MeasuringConfig,
    ScoringError,
    TextPrompt,
    check_files,
    measure,
    score,
)
from asa_dist.rollout.worker import build_engine
from asa_dist.runtime.measurements import RESPONSES, UNCERTAINTY, MeasurementFiles
from asa_dist.runtime.run_log import read_rows
from asa_dist.udasa.one_prompt import split_responses
from tests.rollout.ray_run import local_ray, wait_until
from tests.rollout.tiny_model import EOS, VOCAB_SIZE, make_model
from tests.udasa.measured import prompt_of

BREAKS = ["\n" * count for count in range(2, 12)]  # tokens that end a paragraph: the model finds some of them likely
DEADLINE_SECONDS = 250.0  # for a hang, not for a slow machine
ROLLOUT = RolloutConfig(responses_per_prompt=3, max_new_tokens=6)
CONFIG = MeasuringConfig(ModelConfig(), ROLLOUT, UdasaConfig(), seed=4, policy_version=7, prompts_per_bundle=2)
ONE_PROMPT = replace(CONFIG, udasa=UdasaConfig(sampling="one_prompt"))


# --- a model, prompts, estimators -------------------------------------------------------------------------------
def make_folder(folder: Path) -> Path:
    """A plain transformers folder with a tokenizer of words and paragraph breaks."""
    make_model(folder).save_pretrained(folder)
    words = [f"w{index}" if index != EOS else "<eos>" for index in range(VOCAB_SIZE - len(BREAKS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words + BREAKS)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def make_prompts(count: int) -> list[TextPrompt]:
    prompts = []
    for index in range(count):
        token_ids = np.arange(4, 6 + index, dtype=np.int32)
        prompts.append(TextPrompt(3 * index, " ".join(f"w{token}" for token in token_ids), token_ids, token_ids[:2]))
    return prompts


class LetterEncoder:
    """How often each letter occurs."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(text.count(letter)) for letter in "0123456789"] for text in texts])


@dataclass
class LetterJudge:
    """The share of a text's letters that are even digits: of prompt and response, or of the response alone."""

    folder: Path
    reads_prompt: bool
    notify: Notify

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        with (self.folder / "judged").open("a") as file:
            file.writelines(f"{json.dumps(question)}\n" for question in questions)
        if (self.folder / "broken").exists():
            raise EstimatorError("the endpoint is gone; try again later")
        if (self.folder / "notice").exists():
            self.notify("one text was truncated")
        return torch.tensor([share(prompt * self.reads_prompt + response) for prompt, response in questions])


def share(text: str) -> float:
    return sum(letter in "02468" for letter in text) / len(text) if text else math.nan


def build_letter_estimators(config: UdasaConfig, model_folder: Path, device: str, notify: Notify) -> Estimators:
    assert device == "cpu"
    factual, value = (LetterJudge(model_folder, reads_prompt, notify) for reads_prompt in (True, False))
    return Estimators(LetterEncoder(), factual, value)


class RecordedEngine(HfEngine):
    """Writes down whom it answers; a file `pause` holds one call up until there is a file `go`."""

    def generate(self, prompts: Sequence[Prompt]) -> list[tuple[Response, ...]]:
        folder = Path(self._model.config._name_or_path)
        if (folder / "pause").exists() and prompts[0].prompt_id == int((folder / "pause").read_text()):
            (folder / "pause").rename(folder / f"paused-{os.getpid()}")
            while not (folder / "go").exists():
                time.sleep(0.05)
        with (folder / "answered").open("a") as file:
            file.writelines(f"{prompt.prompt_id}\n" for prompt in prompts)
        return super().generate(prompts)


def build_recorded_engine(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
    return RecordedEngine(config_folder, model, sampling, "cpu")


def environment() -> dict[str, str]:
    """For a process that imports this file."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# --- the reference ----------------------------------------------------------------------------------------------
def expected_rows(folder: Path, prompts: Sequence[TextPrompt]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both files of an undisturbed round, by one engine and plain loops."""
    torch.set_num_threads(1)
    engine = HfEngine(str(folder), CONFIG.model, SamplingConfig(ROLLOUT, CONFIG.seed, EOS), "cpu")
    engine.load(CONFIG.policy_version, make_model(folder).named_parameters())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    answers, uncertainties = [], []
    for prompt in prompts:
        place = prompts.index(prompt) // 2 * 2
        bundle = [Prompt(other.prompt_id, CONFIG.policy_version, other.token_ids) for other in prompts[place:place + 2]]
        sampled = engine.generate(bundle)[prompts.index(prompt) - place]
        texts = [tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True) for response in sampled]
        answers.append({
            "prompt_id": prompt.prompt_id, "prompt": prompt.text, "prompt_token_ids": prompt.token_ids.tolist(),
            "policy_version": 7, "seed": 4,
            "responses": [{"text": text, "token_ids": response.token_ids.tolist(), "finished": response.finished}
                          for text, response in zip(texts, sampled, strict=True)]})
        uncertainties.append({"prompt_id": prompt.prompt_id, **expected_uncertainty(prompt.text, texts)})
    return answers, uncertainties


def expected_uncertainty(prompt: str, texts: Sequence[str]) -> dict[str, list[float | None]]:
    """Equations 1 to 6, one response at a time."""
    found: dict[str, list[float | None]] = {"semantic": [], "factual": [], "value": [], "total": []}
    for text in texts:
        others = list(texts)
        others.remove(text)
        parts = [1 - sum(cosine(text, other) for other in others) / len(others), share(prompt + text), share(text)]
        weights = [math.exp(part) for part in parts]
        total = sum(weight / sum(weights) * part for weight, part in zip(weights, parts, strict=True))
        for name, value in zip(found, [*parts, total], strict=True):
            found[name].append(None if math.isnan(value) else value)
    return found


def cosine(text: str, other: str) -> float:
    one, two = ([letters.count(letter) for letter in "0123456789"] for letters in (text, other))
    if not text.strip() or not other.strip():
        return 0.0
    return sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)


def assert_undisturbed(round_folder: Path, model_folder: Path, prompts: Sequence[TextPrompt]) -> None:
    for name, expected in zip((RESPONSES, UNCERTAINTY), expected_rows(model_folder, prompts), strict=True):
        found = sorted(read_rows(round_folder / name), key=lambda row: row["prompt_id"])
        assert len(found) == len(expected)
        for row, wanted in zip(found, expected, strict=True):
            if name == RESPONSES:
                assert row == wanted
            else:
                assert row.keys() == wanted.keys()
                for key in wanted:
                    assert row[key] == pytest.approx(wanted[key], abs=1e-6)


# --- without Ray ------------------------------------------------------------------------------------------------
def generator(folder: Path, config: MeasuringConfig) -> Generator:
    made = Generator(config, folder, build_engine)
    made.start()
    return made


def test_one_prompt_gives_all_responses(tmp_path: Path) -> None:
    """They are the parts of one long sample of the instruction, cut to length, and empty where there are too few."""
    folder, prompts = make_folder(tmp_path), make_prompts(8)
    one = generator(folder, ONE_PROMPT)
    found = one.work(prompts)
    rollout = ROLLOUT.model_copy(update={"responses_per_prompt": 1, "max_new_tokens": 18})
    engine = HfEngine(str(folder), CONFIG.model, SamplingConfig(rollout, CONFIG.seed, EOS), "cpu")
    engine.load(7, make_model(folder).named_parameters())
    samples = engine.generate([Prompt(prompt.prompt_id, 7, prompt.instruction_token_ids) for prompt in prompts])
    num_empty, num_cut = 0, 0
    for prompt, measured, (sample,) in zip(prompts, found, samples, strict=True):
        assert measured.token_ids.tolist() == prompt.token_ids.tolist() and measured.prompt == prompt.text
        parts = split_responses(one._decode(sample.token_ids))
        assert len(measured.responses) == 3
        for place, response in enumerate(measured.responses):
            tokens = [token for token in response.token_ids.tolist() if token != EOS]
            if place >= len(parts):
                assert (response.text, tokens, response.finished) == ("", [], False)
                num_empty += 1
                continue
            words = parts[place].split()
            assert response.finished == (EOS in response.token_ids.tolist())
            if not response.finished and len(words) >= 6:
                words, num_cut = words[:6], num_cut + 1
            assert [f"w{token}" for token in tokens] == words and response.text.split() == words
            if place + 1 < len(parts) and len(words) < 6:
                assert response.finished  # the model had gone on to the next one
    assert num_empty and num_cut


def test_what_the_model_has_no_room_for_and_what_is_missing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    long = TextPrompt(5, "w4", np.full(59, 4, np.int32))
    with pytest.raises(ConfigError, match=(
            r"prompt 5: its 59 tokens and 6 of a response are more than the model has room for, 64: lower "
            r"rollout\.max_new_tokens or leave it out")):
        generator(folder, CONFIG).work([long])
    with pytest.raises(ConfigError, match=r"prompt 5: udasa\.sampling one_prompt needs its instruction_token_ids"):
        generator(folder, ONE_PROMPT).work([long])


def test_a_folder_that_lacks_weights_is_not_measured(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make_folder(tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its files lack 1 parameters of the model, as model\.norm\.weight"):
        generator(tmp_path, CONFIG)


def test_scores_are_those_of_plain_loops(tmp_path: Path) -> None:
    texts = ["w24 w5", "w24", ""]
    estimators = build_letter_estimators(CONFIG.udasa, tmp_path, "cpu", print)
    found = score([prompt_of(*texts), prompt_of("w1 w2", "w1 w3", "w9")], estimators, CONFIG.udasa)
    for name, expected in expected_uncertainty("w8", texts).items():
        assert found[name].shape == (2, 3) and found[name].dtype == np.float64
        assert found[name][0] == pytest.approx([math.nan if u is None else u for u in expected], abs=1e-6, nan_ok=True)
    assert np.isnan(found["total"][0, 2]) and found["semantic"][0, 2] == 1
    only_value = score([prompt_of(*texts)], estimators, UdasaConfig(uncertainties=["value"]))
    assert only_value.keys() == {"value", "total"}


def test_an_estimator_that_breaks_is_named(tmp_path: Path) -> None:
    class Short(LetterJudge):
        def uncertainty(self, questions: Sequence[Question]) -> Tensor:
            return torch.zeros(1)

    sound = build_letter_estimators(CONFIG.udasa, tmp_path, "cpu", print)
    with pytest.raises(ScoringError, match="the value uncertainty failed: RuntimeError: shape"):
        score([prompt_of("w1", "w2")], replace(sound, value=Short(tmp_path, True, print)), CONFIG.udasa)
    (tmp_path / "broken").touch()
    with pytest.raises(EstimatorError, match="the endpoint is gone"):
        score([prompt_of("w1", "w2")], sound, CONFIG.udasa)


@pytest.mark.parametrize("change", [
    {"seed": 5}, {"policy_version": 8}, {"udasa": UdasaConfig(uncertainties=["value", "factual"])},
    {"rollout": ROLLOUT.model_copy(update={"responses_per_prompt": 4})},
])
def test_files_of_another_measurement_are_not_continued(tmp_path: Path, change: dict[str, Any]) -> None:
    files, (prompt,) = MeasurementFiles(tmp_path), make_prompts(1)
    check_files(files, [prompt], CONFIG)
    measured = replace(prompt_of("w4", "w5", "w6"), prompt_id=0, prompt=prompt.text, token_ids=prompt.token_ids)
    files.add_responses([measured])
    check_files(files, [prompt], CONFIG)
    files.add_uncertainties([measured], dict.fromkeys(("semantic", "factual", "value", "total"), np.zeros((1, 3))))
    check_files(files, [prompt], CONFIG)
    with pytest.raises(ConfigError, match="holds prompt 0 of another measurement"):
        check_files(files, [prompt], replace(CONFIG, **change))
    with pytest.raises(ConfigError, match="holds prompt 0 of another measurement"):
        check_files(files, [replace(prompt, token_ids=prompt.token_ids[:1])], CONFIG)


# --- with Ray ---------------------------------------------------------------------------------------------------
@dataclass
class Round:
    """A round of five prompts in bundles of two, and what was seen of it."""

    folder: Path
    config: MeasuringConfig = CONFIG
    prompts: list[TextPrompt] = field(default_factory=lambda: make_prompts(5))
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def measure(self) -> None:
        measure(self.prompts, self.folder, self.config, MeasurementFiles(self.folder),
                build_engine=build_recorded_engine, build_estimators=build_letter_estimators,
                on_event=lambda *event: self.events.append(event), progress=self.lines.append)

    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    def written(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines() if (self.folder / name).exists() else []

    def paused(self) -> int:
        """The process id of the generator that holds the bundle up."""
        (file,) = wait_until(lambda: list(self.folder.glob("paused-*")), "an engine call", DEADLINE_SECONDS)
        return int(file.name.partition("-")[2])


@pytest.fixture(scope="module")
def ray_handle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHandle]:
    with local_ray(tmp_path_factory.mktemp("home")) as handle:
        yield handle


def tear_last_line(path: Path) -> None:
    text = path.read_bytes()
    start = text.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(text[:(start + len(text)) // 2])


@pytest.mark.ray
def test_a_round_that_is_stopped_then_torn_then_finished(ray_handle: RayHandle, tmp_path: Path) -> None:
    four = make_prompts(4)
    (tmp_path / "broken").touch()
    stopped = Round(make_folder(tmp_path), prompts=four)
    with pytest.raises(EstimatorError, match=r"^the endpoint is gone; try again later$"):
        stopped.measure()
    assert len(stopped.written(RESPONSES)) in (2, 4) and stopped.written(UNCERTAINTY) == []

    (tmp_path / "broken").rename(tmp_path / "notice")
    (tmp_path / "judged").unlink()
    resumed = Round(tmp_path, prompts=four)
    resumed.measure()
    assert_undisturbed(tmp_path, tmp_path, four)
    assert len(resumed.written("judged")) == 24  # two judges, three responses to each of four prompts
    assert ("estimator_notice", {"notice": "one text was truncated"}) in resumed.events
    assert resumed.events[-1] == ("measured", {"prompts": 4, "responses": 12, "empty": 0, "unmeasured": 0})
    assert set(resumed.names()) == {"worker_started", "estimator_notice", "measured"}
    assert resumed.lines[-1].startswith("measuring: 4 of 4 prompts answered, 4 measured, ")
    assert resumed.lines[-1].endswith(" prompts/s, 0:00:00 left")

    (tmp_path / "answered").unlink()
    for name in (RESPONSES, UNCERTAINTY):
        tear_last_line(tmp_path / name)
    Round(tmp_path, prompts=four).measure()
    assert_undisturbed(tmp_path, tmp_path, four)
    assert resumed.written("answered") == ["6", "9"]  # its bundle, as a whole
    assert len(resumed.written("judged")) == 24 + 12

    finished = Round(tmp_path, prompts=four)
    finished.measure()
    assert finished.names() == ["measured"]


@pytest.mark.ray
def test_a_generator_killed_in_the_middle(ray_handle: RayHandle, tmp_path: Path) -> None:
    disturbed = Round(make_folder(tmp_path))
    (tmp_path / "pause").write_text("6")
    with ThreadPoolExecutor(1) as driver:
        done = driver.submit(disturbed.measure)
        try:
            psutil.Process(disturbed.paused()).kill()
        finally:
            (tmp_path / "go").touch()
        done.result(DEADLINE_SECONDS)
    assert_undisturbed(tmp_path, tmp_path, disturbed.prompts)
    assert sorted(map(int, disturbed.written("answered"))) == [0, 3, 6, 9, 12]
    (died,) = [details for event, details in disturbed.events if event == "worker_died"]
    assert died["worker"] == "generator-0"
    assert died["reason"].startswith("while responding to prompts 6 to 9: its process ended: ")


def drive(address: str, folder: str) -> None:
    """In a process of its own."""
    connect(address)
    Round(Path(folder)).measure()


@pytest.mark.ray
def test_the_driver_killed_in_the_middle(ray_handle: RayHandle, tmp_path: Path) -> None:
    resumed = Round(make_folder(tmp_path))
    (tmp_path / "pause").write_text("12")
    code = f"from {__name__} import drive; drive({ray_handle.address!r}, {str(tmp_path)!r})"
    driver = subprocess.Popen([sys.executable, "-c", code], env=environment())
    try:
        generator_pid = resumed.paused()
        wait_until(lambda: len(resumed.written(UNCERTAINTY)) == 4, "two bundles", DEADLINE_SECONDS)
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: not psutil.pid_exists(generator_pid), "the end of the driver's actors")
    with (tmp_path / UNCERTAINTY).open("a") as file:
        file.write('{"prompt_id": 12, "sem')
    resumed.measure()
    assert_undisturbed(tmp_path, tmp_path, resumed.prompts)
    assert list(map(int, resumed.written("answered"))) == [0, 3, 6, 9, 12]
    assert len(resumed.written("judged")) == 2 * 15


@pytest.mark.ray
def test_an_engine_that_cannot_be_built_and_too_small_a_ray(ray_handle: RayHandle, tmp_path: Path) -> None:
    def build_nothing(config_folder: str, model: ModelConfig, sampling: SamplingConfig) -> HfEngine:
        raise OSError("no such engine on this host")

    rollout = ROLLOUT.model_copy(update={"max_deaths_in_a_row": 1})
    files = MeasurementFiles(tmp_path)
    arguments: dict[str, Any] = {
        "build_estimators": build_letter_estimators, "on_event": lambda *event: None, "progress": print}
    with pytest.raises(RolloutFailure, match=r"every generator died 1 times in a row .* generator-0, while starting: "
                                             r"OSError: no such engine on this host"):
        measure(make_prompts(2), make_folder(tmp_path), replace(CONFIG, rollout=rollout), files,
                build_engine=build_nothing, **arguments)
    wide = replace(CONFIG, udasa=UdasaConfig(scorers=2))
    with pytest.raises(ClusterError, match=r"1 workers and 2 scorers need 3 CPU, Ray has 2: lower rollout\.workers"):
        measure(make_prompts(2), tmp_path, wide, files, **arguments)
