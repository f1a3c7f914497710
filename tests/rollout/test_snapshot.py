"""The snapshot's bytes: nothing changes on the way, and what was not written by us is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load, save

from asa_dist.records import LedgerSnapshot, OpenStep, Prompt, Response, RolloutGroup
from asa_dist.rollout.snapshot import dump_snapshot, load_snapshot


def random_response(random: np.random.Generator, num_tokens: int, version: int) -> Response:
    def any_bits() -> np.ndarray:  # NaN, infinities and subnormal numbers among them
        return random.integers(0, 2**32, num_tokens, np.uint32).view(np.float32)

    spans = ((0, version), (num_tokens // 2, version + 1)) if num_tokens > 2 else ((0, version),)
    return Response(random.integers(0, 2**31, num_tokens).astype(np.int32), any_bits(), any_bits(),
                    bool(random.integers(2)), spans)


def random_snapshot(seed: int, next_step: int = 7, num_variants: int = 0) -> LedgerSnapshot:
    random = np.random.default_rng(seed)
    steps = []
    for step, indices in ((next_step, (0, 1, 2, 3)), (next_step + 1, (1, 3)), (next_step + 2, ())):
        prompts = tuple(Prompt(int(random.integers(2**40)), step % 2, np.arange(i + 1, dtype=np.int32), tuple(
            random.integers(0, 2**31, 1 + i + k).astype(np.int32) for k in range(num_variants))) for i in range(4))
        groups = tuple(RolloutGroup(step, i, prompts[i], tuple(
            random_response(random, num_tokens, step - 1) for num_tokens in (0, 1, i, 5))) for i in indices)
        steps.append(OpenStep(step, prompts, groups))
    return LedgerSnapshot(next_step, tuple(steps))


def bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


def plain(snapshot: LedgerSnapshot) -> object:
    """All of it, comparable by ==, arrays by their bits."""
    def prompt(p: Prompt) -> object:
        return p.prompt_id, p.epoch, [bits(token_ids) for token_ids in p.phrasings]

    def response(r: Response) -> object:
        return bits(r.token_ids), bits(r.logprob_T), bits(r.behaviour_logprob_T), r.finished, r.spans

    return snapshot.next_step, [
        (step.step, [prompt(p) for p in step.prompts],
         [(g.step, g.index, prompt(g.prompt), [response(r) for r in g.responses]) for g in step.groups])
        for step in snapshot.steps]


@pytest.mark.parametrize("snapshot", [
    random_snapshot(0), random_snapshot(1), random_snapshot(2, num_variants=3), LedgerSnapshot(0, ()),
    LedgerSnapshot(5, (OpenStep(5, (), ()),))])
def test_round_trip(snapshot: LedgerSnapshot) -> None:
    data = dump_snapshot(snapshot)
    assert plain(load_snapshot(data)) == plain(snapshot)
    assert dump_snapshot(load_snapshot(data)) == data


def test_another_dtype_is_not_rounded_silently() -> None:
    prompt = Prompt(0, 0, np.array([1], np.int64))
    with pytest.raises(TypeError, match="int64"):
        dump_snapshot(LedgerSnapshot(0, (OpenStep(0, (prompt,), ()),)))


def test_bytes_that_end_early_are_refused() -> None:
    data = dump_snapshot(random_snapshot(0))
    for length in [*range(0, 40), *range(40, len(data), 97), len(data) - 1]:
        with pytest.raises(ValueError, match=f"these {length} bytes are no intact snapshot of rollouts: .+"):
            load_snapshot(data[:length])


def test_contents_that_contradict_each_other_are_refused() -> None:
    data = dump_snapshot(random_snapshot(0))
    arrays = load(data)
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]

    def with_arrays(**others: np.ndarray) -> bytes:
        return save({**arrays, **others}, header)

    assert plain(load_snapshot(with_arrays())) == plain(random_snapshot(0))
    logprob, tokens = arrays["logprob"], arrays["response_tokens"]
    for bad, reason in [
        (b"", "header too small"),
        (save({"w": logprob}), r"the header has \[\] instead of 'asa-dist rollouts 1'"),
        (save(arrays, {"asa-dist rollouts 2": ""}), "the header has .'asa-dist rollouts 2'. instead of"),
        (save(arrays, {"asa-dist rollouts 1": "{}"}), "'steps'"),
        (save(arrays, {"asa-dist rollouts 1": "[0]"}), "indices must be integers"),
        (save({"w": logprob}, header), "'prompt_tokens'"),
        (with_arrays(logprob=logprob[1:]), "logprob ends at"),
        (with_arrays(response_tokens=np.append(tokens, tokens[:1])), "response_tokens has .* are accounted for"),
        (with_arrays(logprob=logprob.astype(np.float64)), "logprob is float64"),
        (with_arrays(prompt_tokens=arrays["prompt_tokens"][None]), "prompt_tokens is int32"),
    ]:
        with pytest.raises(ValueError, match=f"no intact snapshot of rollouts: .*{reason}"):
            load_snapshot(bad)
