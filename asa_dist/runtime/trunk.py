"""What every trained model here has in common: a trunk whose tokens are scored in rows that several sequences share.

The trunk is any ``transformers`` causal language model. Its output projection is replaced by a head that owns the same
weight and turns hidden states into log-probabilities chunk by chunk: under ZeRO-3 a parameter exists only inside the
forward of the module that owns it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from asa_dist.asa.objective import TokenScores
from asa_dist.asa.packing import IGNORED, MicroBatch
from asa_dist.config import ArchitectureConfig, ModelConfig
from asa_kernels import token_logprob
from asa_kernels.cpu_linear import use_cpu_linear

PSI = "psi"


class ModelError(Exception):
    """A model that cannot be built or trained: says which and why."""


class TokenLogprobHead(nn.Module):
    """The output projection, as log-probabilities and entropies of given targets."""

    def __init__(self, weight_VH: nn.Parameter, chunk_tokens: int, temperature: float):
        super().__init__()
        self.weight = weight_VH
        self.chunk_tokens = chunk_tokens
        self.temperature = temperature

    def forward(self, hidden_NH: Tensor, target_N: Tensor, is_sampled_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob_N with gradient, tempered_logprob_N, entropy_N), float32; 0 where the target is IGNORED.

        Where nothing was sampled (``is_sampled_N`` False: corpus tokens) the tempered one may be 0 as well.
        """
        logprob_N, entropy_N = token_logprob(hidden_NH, self.weight, target_N, chunk_tokens=self.chunk_tokens)
        tempered_N = logprob_N.detach()
        if self.temperature != 1.0:
            sampled_target_N = torch.where(is_sampled_N, target_N, IGNORED)
            with torch.no_grad():
                tempered_N, _ = token_logprob(
                    hidden_NH,
                    self.weight,
                    sampled_target_N,
                    temperature=self.temperature,
                    chunk_tokens=self.chunk_tokens,
                )
        return logprob_N, tempered_N, entropy_N.detach()


class TrunkModel(nn.Module):
    """The generator ψ (``lm``). Subclasses add a ``forward`` that yields a loss, and what else they train.

    Args:
        lm: the trunk; its output projection is replaced.
        chunk_tokens: tokens whose logits exist at the same time.
        temperature: at which rollouts are sampled.
    """

    def __init__(self, lm: PreTrainedModel, chunk_tokens: int, temperature: float):
        super().__init__()
        self.vocab_size = lm.config.vocab_size
        self.lm = lm
        lm.set_output_embeddings(TokenLogprobHead(lm.get_output_embeddings().weight, chunk_tokens, temperature))

    def parts(self) -> dict[str, nn.Module]:
        """What is trained, each part with a learning rate and a gradient norm of its own; ψ first."""
        return {PSI: self.lm}

    def token_scores(self, batch: MicroBatch, final_NH: Tensor) -> TokenScores:
        """Log-probabilities and entropies of the batch's targets."""
        head = self.lm.get_output_embeddings()
        return TokenScores(*head(final_NH, batch.target_RT.flatten(), ~batch.is_corpus_RT.flatten()))

    def trunk_states(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Hidden states (middle_NH, final_NH) of all tokens; segments of a row do not see each other."""
        num_rows, row_length = batch.input_ids_RT.shape
        if self.lm.config._attn_implementation == "flash_attention_2":
            # flash-attn takes one long row: positions that restart at 0 mark where sequences begin
            output = self.lm.base_model(
                input_ids=batch.input_ids_RT.view(1, -1),
                position_ids=_restarting_positions(batch).view(1, -1),
                use_cache=False,
                output_hidden_states=True,
            )
        else:
            output = self.lm.base_model(
                input_ids=batch.input_ids_RT,
                position_ids=batch.position_ids_RT,
                use_cache=False,
                output_hidden_states=True,
                attention_mask=segment_mask(batch.segment_RT),
            )
        middle = output.hidden_states[(len(output.hidden_states) - 1) // 2]  # of layer ⌊L/2⌋; [0] are the embeddings
        return middle.reshape(num_rows * row_length, -1), output.last_hidden_state.reshape(num_rows * row_length, -1)


def segment_mask(segment_RT: Tensor) -> Tensor:
    """Boolean [R, 1, T, T]: causal, within equal segments; every position sees itself (no empty softmax)."""
    same_RTT = segment_RT.unsqueeze(2) == segment_RT.unsqueeze(1)
    return (same_RTT & torch.ones_like(same_RTT[0]).tril()).unsqueeze(1)


def _restarting_positions(batch: MicroBatch) -> Tensor:
    """Positions for flash-attn: padding counts from 0 too, as a sequence of its own."""
    padding_RT = batch.segment_RT < 0
    return torch.where(padding_RT, padding_RT.long().cumsum(1) - 1, batch.position_ids_RT)


# --- building ---------------------------------------------------------------------------------------------------
def trunk_config(config: ModelConfig, vocab_size: int, eos_token_id: int, row_tokens: int) -> PretrainedConfig:
    """The trunk's transformers config, from scratch or pretrained, with all dropout off, as rollout workers have it.

    Raises:
        ModelError: a pretrained model that is missing, or that trainer and workers would not compute alike.
    """
    if config.name_or_path is None:
        return _llama_config(config.architecture, vocab_size, eos_token_id)
    try:
        loaded = AutoConfig.from_pretrained(Path(config.name_or_path).expanduser(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name_or_path = {config.name_or_path!r}: {error}") from None
    if (problem := _unfit_for_training(loaded, vocab_size, row_tokens)) is not None:
        raise ModelError(f"model.name_or_path = {config.name_or_path!r}: {problem}")
    _zero_dropout(loaded)
    return loaded


def _llama_config(arch: ArchitectureConfig, vocab_size: int, eos_token_id: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_key_value_heads,
        max_position_embeddings=arch.max_position_embeddings,
        rope_theta=arch.rope_theta,
        initializer_range=arch.initializer_std,
        tie_word_embeddings=arch.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        use_cache=True,
    )


def _unfit_for_training(trunk: PretrainedConfig, vocab_size: int, row_tokens: int) -> str | None:
    """Why a pretrained trunk cannot be trained here; None if it can."""
    if getattr(trunk, "vocab_size", None) is None:
        return f"{type(trunk).__name__} is no plain causal language model"
    for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(trunk, attribute, None) not in (None, 1.0):
            return (
                f"its {attribute} = {getattr(trunk, attribute)} changes the logits after the output projection, "
                "which the chunked log-probabilities do not compute; choose another model"
            )
    if (window_tokens := _attention_window(trunk)) < row_tokens:
        return (
            f"its attention sees {window_tokens} tokens back, rows have data.sequence_length = {row_tokens}: the "
            "trainer's rows have no such window, rollout workers would; choose shorter rows or another model"
        )
    context_tokens = getattr(trunk, "max_position_embeddings", None)
    if context_tokens is not None and row_tokens > context_tokens:
        return f"its context is {context_tokens} tokens, data.sequence_length = {row_tokens} is longer"
    if trunk.vocab_size < vocab_size:
        return f"it has {trunk.vocab_size} embeddings, the tokenizer {vocab_size} tokens: they do not belong together"
    return None


def _attention_window(trunk: PretrainedConfig) -> float:
    """Tokens that the narrowest layer sees; infinite without a window, 0 for windowed layers of unknown width."""
    layer_types = set(getattr(trunk, "layer_types", None) or ())
    sliding = getattr(trunk, "sliding_window", None) if getattr(trunk, "use_sliding_window", True) else None
    if sliding is None and "sliding_attention" in layer_types:
        sliding = 0
    chunked = (getattr(trunk, "attention_chunk_size", None) or 0) if "chunked_attention" in layer_types else None
    return min((window for window in (sliding, chunked) if window is not None), default=math.inf)


def _zero_dropout(trunk: PretrainedConfig) -> None:
    """Rollout workers drop nothing, so neither may the trainer: log-probabilities would not belong to the samples.

    In the config, not only in the modules: attention reads these numbers itself.
    """
    for name, value in trunk.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(trunk, name, 0.0)


def build_trunk(
    config: ModelConfig, seed: int, vocab_size: int, eos_token_id: int, row_tokens: int, on_cuda: bool
) -> PreTrainedModel:
    """The causal language model in float32 on the CPU, the same on every rank: from ``seed``, or pretrained.

    Raises:
        ModelError: as :func:`trunk_config`; or an output projection that the head cannot take the place of.
    """
    trunk = trunk_config(config, vocab_size, eos_token_id, row_tokens)
    attention = config.attention_implementation(on_cuda)
    torch.manual_seed(seed)
    if config.name_or_path is None:
        lm = AutoModelForCausalLM.from_config(
            trunk, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
        )
    else:
        lm = AutoModelForCausalLM.from_pretrained(
            Path(config.name_or_path).expanduser(),
            config=trunk,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    projection = lm.get_output_embeddings()
    if not isinstance(projection, nn.Linear) or getattr(projection, "bias", None) is not None:
        raise ModelError(f"{type(lm).__name__}: its output projection is not a plain Linear without bias")
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what a model does not take from its config
    if not on_cuda:
        use_cpu_linear(lm)
    if config.activation_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lm
