"""Measuring a round of UDASA: N responses to every prompt, and how uncertain each of them is.

    prompts ──► bundles ──► Generator × rollout.workers ──► responses.jsonl ──► Scorer × udasa.scorers
                                                                                      └──► uncertainty.jsonl

A bundle, some consecutive prompts, goes through an actor as one call, and is written when it comes out. What is written
stays: measuring again goes on where the files end. A bundle that was written in part, or lost with its actor, goes
again as a whole, because what an engine samples depends in its last bits on which prompts share a call: so the files
become those of an undisturbed run, but for the order of their lines.

Shapes: P prompts of a bundle, N responses to each, S = P·N, T tokens, D size of an embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from asa_dist.config import ConfigError, ModelConfig, RolloutConfig
from asa_dist.config_udasa import UdasaConfig
from asa_dist.estimators.build import Estimators
from asa_dist.estimators.estimator import EstimatorError, Notify
from asa_dist.records import MeasuredPrompt, MeasuredResponse, Prompt, Response, TextPrompt, unmeasured
from asa_dist.rollout.cluster import ClusterError
from asa_dist.rollout.engine import SamplingConfig
from asa_dist.rollout.pool import ActorPool, OnEvent, wait_for_any
from asa_dist.rollout.weights import DTYPES
from asa_dist.rollout.worker import EngineBuilder, build_engine
from asa_dist.udasa.one_prompt import split_responses
from asa_dist.udasa.uncertainty import fuse, semantic_uncertainty

if TYPE_CHECKING:
    from asa_dist.runtime.measurements import MeasurementFiles

EstimatorBuilder = Callable[[UdasaConfig, Path, str, Notify], Estimators]  # as `estimators.build.build_estimators`


class ScoringError(Exception):
    """An estimator failed; the message names it."""


@dataclass(frozen=True)
class MeasuringConfig:
    """The sections of the config that measuring uses, and what identifies this round."""

    model: ModelConfig
    rollout: RolloutConfig
    udasa: UdasaConfig
    seed: int  # of the run
    policy_version: int  # of the weights in the model folder; each version samples with noise of its own
    prompts_per_bundle: int

    @property
    def sampling(self) -> RolloutConfig:
        """For the engine: with one_prompt it gives one response, N times as long."""
        if self.udasa.sampling == "independent":
            return self.rollout
        longest = self.rollout.responses_per_prompt * self.rollout.max_new_tokens
        return self.rollout.model_copy(update={"responses_per_prompt": 1, "max_new_tokens": longest})


# --- actors -----------------------------------------------------------------------------------------------------
class Generator:
    """Responds to bundles of prompts; a :class:`asa_dist.rollout.pool.PoolActor`."""

    def __init__(self, config: MeasuringConfig, model_folder: Path, build_engine: EngineBuilder) -> None:
        self._config, self._model_folder, self._build_engine = config, model_folder, build_engine

    def start(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(self._config.rollout.threads_per_worker)
        folder, model = str(self._model_folder), self._config.model
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        sampling = SamplingConfig(self._config.sampling, self._config.seed, self._tokenizer.eos_token_id)
        self._engine = self._build_engine(folder, model, sampling)
        weights, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[model.dtype], trust_remote_code=False, output_loading_info=True)
        if missing := sorted(found["missing_keys"]):
            raise ConfigError(f"{folder}: its files lack {len(missing)} parameters of the model, as {missing[0]}")
        self._engine.load(self._config.policy_version, weights.named_parameters())
        self._context_tokens = getattr(weights.config, "max_position_embeddings", None)

    def work(self, prompts: Sequence[TextPrompt]) -> list[MeasuredPrompt]:
        """The prompts with their responses, in order; nothing is measured yet.

        Raises:
            ConfigError: the model has no room for a prompt and its responses, or a prompt lacks its instruction.
        """
        asked = [Prompt(prompt.prompt_id, self._config.policy_version, self._asked(prompt)) for prompt in prompts]
        return [
            MeasuredPrompt(prompt.prompt_id, prompt.text, prompt.token_ids, self._engine.version, self._config.seed,
                           self._responses(sampled))
            for prompt, sampled in zip(prompts, self._engine.generate(asked), strict=True)
        ]

    def _asked(self, prompt: TextPrompt) -> np.ndarray:
        independent = self._config.udasa.sampling == "independent"
        token_ids = prompt.token_ids if independent else prompt.instruction_token_ids
        if token_ids is None:
            raise ConfigError(f"prompt {prompt.prompt_id}: udasa.sampling one_prompt needs its instruction_token_ids")
        new_tokens = self._config.sampling.max_new_tokens
        if self._context_tokens is not None and len(token_ids) + new_tokens > self._context_tokens:
            raise ConfigError(
                f"prompt {prompt.prompt_id}: its {len(token_ids)} tokens and {new_tokens} of a response are more than "
                f"the model has room for, {self._context_tokens}: lower rollout.max_new_tokens or leave it out")
        return token_ids

    def _responses(self, sampled: Sequence[Response]) -> tuple[MeasuredResponse, ...]:
        if self._config.udasa.sampling == "independent":
            return tuple(unmeasured(self._decode(response.token_ids), response.token_ids, response.finished)
                         for response in sampled)
        (whole,) = sampled
        parts = split_responses(self._decode(whole.token_ids))
        responses = [self._part(part, whole.finished or index + 1 < len(parts)) for index, part in enumerate(parts)]
        count = self._config.rollout.responses_per_prompt
        missing = [unmeasured("", np.array([], np.int32), finished=False)] * count
        return tuple((responses + missing)[:count])

    def _part(self, text: str, finished: bool) -> MeasuredResponse:
        """A part of a response as a response of its own, cut where one that was sampled alone would be."""
        before = "" if self._tokenizer.chat_template else " "  # plain text goes on after the prompt
        token_ids = self._tokenizer(before + text, add_special_tokens=False, split_special_tokens=True).input_ids
        token_ids += [self._tokenizer.eos_token_id] * finished
        kept = np.array(token_ids[:self._config.rollout.max_new_tokens], np.int32)
        if len(kept) < len(token_ids):
            text, finished = self._decode(kept), False
        return unmeasured(text, kept, finished)

    def _decode(self, token_ids: np.ndarray) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Scorer:
    """Measures bundles of responses; a :class:`asa_dist.rollout.pool.PoolActor`."""

    def __init__(self, config: MeasuringConfig, model_folder: Path, build_estimators: EstimatorBuilder) -> None:
        self._config, self._model_folder, self._build_estimators = config, model_folder, build_estimators
        self._notices: list[str] = []

    def start(self) -> None:
        torch.set_num_threads(self._config.rollout.threads_per_worker)
        device = "cuda" if self._config.udasa.gpus_per_scorer else "cpu"
        self._estimators = self._build_estimators(
            self._config.udasa, self._model_folder, device, self._notices.append)

    def work(self, prompts: Sequence[MeasuredPrompt]) -> tuple[dict[str, np.ndarray], list[str]]:
        """What :func:`score` gives, and what the estimators have to say about it."""
        u_PN = score(prompts, self._estimators, self._config.udasa)
        notices = self._notices.copy()
        self._notices.clear()
        return u_PN, notices


def score(prompts: Sequence[MeasuredPrompt], estimators: Estimators, config: UdasaConfig) -> dict[str, np.ndarray]:
    """Every uncertainty of the config, and ``total``, float64 [P, N] each; NaN = could not be measured.

    Raises:
        ScoringError: an estimator broke, or did not give one number (or NaN) for each response; names it.
        ConfigError, EstimatorError: as an estimator raised it.
    """
    shape = len(prompts), len(prompts[0].responses)
    texts = [response.text for prompt in prompts for response in prompt.responses]
    questions = [(prompt.prompt, response.text) for prompt in prompts for response in prompt.responses]

    def measured(name: str) -> Tensor:
        if name == "semantic":
            assert estimators.semantic is not None
            embedding_PND = estimators.semantic.embed(texts).view(*shape, -1)
            says_PN = torch.tensor([bool(text.strip()) for text in texts]).view(shape)
            return semantic_uncertainty(embedding_PND, says_PN, config.semantic.per)
        judge = {"factual": estimators.factual, "value": estimators.value}[name]
        assert judge is not None
        return judge.uncertainty(questions).double().view(shape)

    u_PN = {}
    for name in map(str, config.uncertainties):
        try:
            u_PN[name] = measured(name)
        except (ConfigError, EstimatorError):
            raise
        except Exception as error:
            raise ScoringError(f"the {name} uncertainty failed: {type(error).__name__}: {error}") from error
    u_PN["total"] = fuse(torch.stack([*u_PN.values()], -1), config.fusion)
    return {name: value_PN.numpy() for name, value_PN in u_PN.items()}


# --- the round --------------------------------------------------------------------------------------------------
def measuring_resources(rollout: RolloutConfig, udasa: UdasaConfig) -> dict[str, int]:
    """CPUs and GPUs that all actors together take from Ray; a scorer has as many CPUs as a rollout actor."""
    return {
        "CPU": (rollout.workers + udasa.scorers) * rollout.threads_per_worker,
        "GPU": rollout.workers * rollout.gpus_per_worker + udasa.scorers * udasa.gpus_per_scorer,
    }


def measure(
    prompts: Sequence[TextPrompt], model_folder: Path, config: MeasuringConfig, files: MeasurementFiles, *,
    build_estimators: EstimatorBuilder, build_engine: EngineBuilder = build_engine, on_event: OnEvent,
    progress: Callable[[str], None],
) -> None:
    """Generates and measures what ``files`` lack, in the Ray that this process is connected to.

    Args:
        prompts: with different ids. Their order decides which are bundled.
        model_folder: of transformers, with a tokenizer; readable on all actors' hosts.
        build_estimators, build_engine: top-level functions, called in each actor's process.
        on_event: see :class:`ActorPool`; also ``estimator_notice``, and at the end ``measured`` with what was counted.
        progress: told several times a second how far it is; what it raises ends the measuring.

    Raises:
        ClusterError: Ray has too few CPUs or GPUs.
        ConfigError: the files are those of another measurement, or an actor cannot work with this config.
        EstimatorError: as an estimator raised it: it has tried often enough.
        RolloutFailure: all actors of a kind failed ``rollout.max_deaths_in_a_row`` times in a row.
        OSError: a file cannot be written.
    What has been written stays, whatever is raised.
    """
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise ValueError("prompts with the same id")
    check_files(files, prompts, config)
    _check_resources(config)
    rollout, udasa = config.rollout, config.udasa
    generators = _pool(
        Generator, (config, model_folder, build_engine), rollout.workers, rollout.gpus_per_worker, "responding to",
        rollout.lease_timeout_seconds, rollout, on_event)
    scorers = _pool(
        Scorer, (config, model_folder, build_estimators), udasa.scorers, udasa.gpus_per_scorer, "scoring",
        udasa.scorer_timeout_seconds, rollout, on_event)
    started_seconds, num_scored_before = time.monotonic(), len(files.uncertainties)
    try:
        for first in range(0, len(prompts), config.prompts_per_bundle):
            bundle = prompts[first:first + config.prompts_per_bundle]
            if any(prompt.prompt_id not in files.responses for prompt in bundle):
                generators.submit(bundle)
            elif any(prompt.prompt_id not in files.uncertainties for prompt in bundle):
                scorers.submit([files.responses[prompt.prompt_id] for prompt in bundle])
        while generators.is_busy or scorers.is_busy:
            for bundle, generated in generators.collect():
                files.add_responses(generated)
                scorers.submit([files.responses[prompt.prompt_id] for prompt in bundle])
            for responded, (u_PN, notices) in scorers.collect():
                files.add_uncertainties(responded, u_PN)
                for notice in notices:
                    on_event("estimator_notice", {"notice": notice})
            seconds = time.monotonic() - started_seconds
            progress(_progress(files, len(prompts), len(files.uncertainties) - num_scored_before, seconds))
            wait_for_any([generators, scorers])
    finally:
        generators.close()
        scorers.close()
    on_event("measured", files.counts())


def _pool(
    kind: type, arguments: tuple[Any, ...], size: int, num_gpus: int, verb: str, task_timeout_seconds: float,
    rollout: RolloutConfig, on_event: OnEvent,
) -> ActorPool[Any, Any]:
    import ray

    actor_class = ray.remote(kind).options(num_cpus=rollout.threads_per_worker, num_gpus=num_gpus)
    return ActorPool(
        kind.__name__.lower(), size, lambda: actor_class.remote(*arguments),
        lambda bundle: f"{verb} prompts {bundle[0].prompt_id} to {bundle[-1].prompt_id}",
        final_errors=(ConfigError, EstimatorError), start_timeout_seconds=rollout.timeout_seconds,
        task_timeout_seconds=task_timeout_seconds, max_deaths_in_a_row=rollout.max_deaths_in_a_row,
        on_event=on_event)


def check_files(files: MeasurementFiles, prompts: Iterable[TextPrompt], config: MeasuringConfig) -> None:
    """Raises ConfigError: what is there was not measured from these prompts, or not in this way."""
    names = {*config.udasa.uncertainties, "total"}
    way = config.policy_version, config.seed, config.rollout.responses_per_prompt
    for prompt in prompts:
        found = files.responses.get(prompt.prompt_id)
        is_same = found is None or (
            found.prompt == prompt.text and np.array_equal(found.token_ids, prompt.token_ids)
            and way == (found.policy_version, found.seed, len(found.responses)))
        if not is_same or files.uncertainties.get(prompt.prompt_id, dict.fromkeys(names)).keys() != names:
            raise ConfigError(
                f"{files.folder}: what was measured there holds prompt {prompt.prompt_id} of another measurement: "
                "text, round, seed, number of responses or uncertainties differ. Take another folder, or empty it")


def _check_resources(config: MeasuringConfig) -> None:
    import ray

    total = ray.cluster_resources()
    for resource, needed in measuring_resources(config.rollout, config.udasa).items():
        if needed > total.get(resource, 0):
            raise ClusterError(
                f"{config.rollout.workers} workers and {config.udasa.scorers} scorers need {needed} {resource}, "
                f"Ray has {total.get(resource, 0):g}: lower rollout.workers or udasa.scorers")


def _progress(files: MeasurementFiles, num_prompts: int, num_scored_now: int, seconds: float) -> str:
    num_scored = len(files.uncertainties)
    line = f"measuring: {len(files.responses)} of {num_prompts} prompts answered, {num_scored} measured"
    if rate := num_scored_now / seconds:
        line += f", {rate:.3g} prompts/s, {timedelta(seconds=round((num_prompts - num_scored) / rate))} left"
    return line
