"""The moderation endpoint: well answered, busy, broken, silent, refusing; and that nobody ever reads the key."""

from __future__ import annotations

import logging
import math
import time
import traceback
from pathlib import Path

import pytest

from asa_dist.config import ConfigError
from asa_dist.config_udasa import ValueConfig
from asa_dist.estimators.endpoint import EndpointJudge, check_endpoint
from asa_dist.estimators.estimator import EstimatorError
from tests.estimators.scripted_endpoint import Reply, ScriptedEndpoint, moderations, score_of, serve

KEY, VARIABLE = "sk-very-secret-0123456789", "TEST_MODERATION_KEY"
QUESTIONS = [("what?", text) for text in ("a plum", "an apple", "", "iron", "everyone says gold")]
EXPECTED = [score_of(text) for _, text in QUESTIONS]
BUSY = Reply(429, '{"error": {"message": "slow down"}}')
BAD_ANSWERS = {
    "no JSON": "<html>welcome</html>",
    "no results": '{"id": 1}',
    "no scores": '{"results": [{"flagged": true}]}',
    "no category": '{"results": [{"category_scores": {}}]}',
    "no number": '{"results": [{"category_scores": {"hate": "much"}}]}',
    "not finite": '{"results": [{"category_scores": {"hate": NaN}}]}',
    "no probability": '{"results": [{"category_scores": {"hate": 1.5}}]}',
    "one too many": moderations(["a", "b"]),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


def judge_of(
    endpoint: ScriptedEndpoint,
    told: list[str] | None = None,
    *,
    batch: int = 8,
    max_attempts: int = 3,
    requests_per_second: float = 1000.0,
    timeout_seconds: float = 20.0,
) -> EndpointJudge:
    value = ValueConfig(
        judge="endpoint",
        url=endpoint.url,
        model="m",
        api_key_variable=VARIABLE,
        timeout_seconds=timeout_seconds,
        max_attempts=max_attempts,
    )
    return EndpointJudge(
        value,
        batch,
        pytest.fail if told is None else told.append,
        first_pause_seconds=0.0,
        requests_per_second=requests_per_second,
    )


def test_largest_category_score_of_each_response() -> None:
    with serve() as endpoint:
        assert judge_of(endpoint, batch=3).uncertainty(QUESTIONS).tolist() == EXPECTED
    assert endpoint.texts == [["a plum", "an apple", "iron"], ["everyone says gold"]], "batched, blank ones left out"
    assert endpoint.bodies[0]["model"] == "m"
    assert set(endpoint.authorizations) == {f"Bearer {KEY}"}


def test_without_key_and_model() -> None:
    with serve() as endpoint:
        judge = EndpointJudge(ValueConfig(judge="endpoint", url=endpoint.url), 8, pytest.fail, requests_per_second=1000)
        assert judge.uncertainty([("", "iron")]).tolist() == [score_of("iron")]
    assert endpoint.bodies == [{"input": ["iron"]}]
    assert endpoint.authorizations == [None]


def test_netrc_does_not_replace_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with serve() as endpoint:
        judge_of(endpoint).uncertainty([("", "iron")])
    assert endpoint.authorizations == [f"Bearer {KEY}"]


@pytest.mark.parametrize("failure", [
    BUSY, Reply(500, "oops"), Reply(503, ""), Reply(429, "", {"Retry-After": "whenever"}),
    *(Reply(200, body) for body in BAD_ANSWERS.values()),
])  # fmt: skip
def test_asked_again_until_it_answers_well(failure: Reply) -> None:
    told: list[str] = []
    with serve(failure, failure) as endpoint:
        assert judge_of(endpoint, told).uncertainty([("", "iron")]).tolist() == [score_of("iron")]
    assert endpoint.texts == [["iron"]] * 3
    assert len(told) == 2 and f"answered {failure.status}" in told[0] and "attempt 2 of 3" in told[1]


@pytest.mark.parametrize("failure", [BUSY, Reply(500, "oops"), *(Reply(200, body) for body in BAD_ANSWERS.values())])
def test_given_up_after_max_attempts(failure: Reply) -> None:
    with serve(*[failure] * 4) as endpoint:
        with pytest.raises(EstimatorError, match=f"in 3 attempts; the last one: answered {failure.status}"):
            judge_of(endpoint, []).uncertainty([("", "iron")])
        assert len(endpoint.bodies) == 3


def test_retry_after_is_kept_to() -> None:
    with serve(Reply(429, "", {"Retry-After": "1"})) as endpoint:
        start = time.monotonic()
        judge_of(endpoint, []).uncertainty([("", "iron")])
        assert time.monotonic() - start >= 1.0


def test_rate_limit() -> None:
    with serve() as endpoint:
        start = time.monotonic()
        judge_of(endpoint, batch=1, requests_per_second=20.0).uncertainty([("", "iron")] * 5)
        assert time.monotonic() - start >= 4 / 20


def test_silence_is_not_waited_for() -> None:
    told: list[str] = []
    with serve(Reply(None)) as endpoint:
        judge = judge_of(endpoint, told, timeout_seconds=2.0, max_attempts=6)
        assert judge.uncertainty([("", "iron")]).tolist() == [score_of("iron")]
    assert "no answer within 2 seconds" in told[0]


def test_nobody_there() -> None:
    with serve() as endpoint:
        pass
    with pytest.raises(EstimatorError, match=r"(?s)no usable answer in 2 attempts.*refused"):
        judge_of(endpoint, [], max_attempts=2).uncertainty([("", "iron")])


def test_a_refused_text_is_not_measured_and_the_others_are() -> None:
    told: list[str] = []
    with serve() as endpoint:
        endpoint.refused = "apple"
        u_S = judge_of(endpoint, told).uncertainty(QUESTIONS).tolist()
    assert math.isnan(u_S[1]) and [u_S[place] for place in (0, 2, 3, 4)] == [EXPECTED[place] for place in (0, 2, 3, 4)]
    assert len(told) == 1 and "of 8 characters is not measured: answered 400" in told[0] and "taste" in told[0]


def test_an_endpoint_that_refuses_everything_is_named() -> None:
    with serve() as endpoint:
        endpoint.refused = ""
        with pytest.raises(EstimatorError, match=r"(?s)answered 400: .*'Hello\.' as well: check udasa\.value\.url"):
            judge_of(endpoint).uncertainty(QUESTIONS)


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_no_second_attempt_helps(status: int) -> None:
    with serve(Reply(status, "no", {"Location": "/elsewhere"})) as endpoint:
        with pytest.raises(EstimatorError, match=f"answered {status}: no. Check .* the key in {VARIABLE}"):
            judge_of(endpoint).uncertainty([("", "iron")])
        assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("failure", [
    Reply(401, f"Incorrect API key provided: {KEY}"), Reply(500, KEY), Reply(400, KEY), Reply(200, KEY),
    Reply(200, f'{{"results": [{{"category_scores": {{"{KEY}": 2}}}}]}}'),
])  # fmt: skip
def test_the_key_is_in_no_message_and_no_log(failure: Reply, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with serve(*[failure] * 8) as endpoint:
        judge = judge_of(endpoint, told)
        with pytest.raises(EstimatorError) as raised:
            judge.uncertainty([("", "iron")])
    shown = "".join(traceback.format_exception(raised.value)) + "".join(told) + caplog.text + repr(judge)
    assert "<key>" in shown
    assert KEY not in shown


# --- before anything starts -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", [None, "", "moderations", "ftp://host/moderations", "http://"])
def test_address_that_is_none(url: str | None) -> None:
    with pytest.raises(ConfigError, match=r"udasa\.value\.url: .* not"):
        check_endpoint(ValueConfig(judge="endpoint", url=url))


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_key_that_is_not_set(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    if key is not None:
        monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(ConfigError, match=f"the environment variable {VARIABLE} is not set here"):
        check_endpoint(ValueConfig(judge="endpoint", url="https://host/v1", api_key_variable=VARIABLE))


@pytest.mark.parametrize("key", [f"{KEY}\nsecond line", f"{KEY}…", f"export K={KEY} "])
def test_key_that_no_header_can_hold(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(ConfigError, match=f"{VARIABLE} holds characters that are in no key") as raised:
        check_endpoint(ValueConfig(judge="endpoint", url="https://host/v1", api_key_variable=VARIABLE))
    assert KEY not in "".join(traceback.format_exception(raised.value))
