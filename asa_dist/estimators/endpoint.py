"""A moderation endpoint that speaks OpenAI's ``/moderations``, asked politely and patiently.

    answer                                   what happens
    200 and as agreed                        P(unsafe) = the largest of the category scores
    no answer, 408, 425, 429, 5xx, garbage   asked again, after Retry-After or a growing pause, up to max_attempts
    400, 413, 422                            each text alone; one that is refused alone is not measured (NaN)
    anything else, or refused a greeting     EstimatorError at once: key, address or model are wrong

An endpoint that stays silent ends the measuring, rather than leaving everything that follows unmeasured: what was
measured is kept, and the same command goes on behind it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import urlsplit

import requests
import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from asa_dist.config import ConfigError
from asa_dist.config_udasa import ValueConfig
from asa_dist.estimators.estimator import EstimatorError, Notify, Question

MAX_PAUSE_SECONDS = 60  # whatever the endpoint asks for
TIMES = {408, 425, 429}  # of the client errors, those that pass
REFUSALS = {400, 413, 422}
GREETING = "Hello."
SHOWN_CHARACTERS = 300  # of an answer, in messages


class _Moderation(BaseModel):
    category_scores: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)


class _Moderations(BaseModel):
    results: list[_Moderation]


class _TryAgain(Exception):
    """Asking again may help."""

    def __init__(self, reason: str, raw: BaseHTTPResponse | None = None) -> None:
        super().__init__(reason)
        self.raw = raw  # may say when


class _Refused(Exception):
    """The endpoint does not want this request."""


class EndpointJudge:
    """P(unsafe) of the response by itself: equation (4). A blank one harms nobody, so it counts 0 and is not sent.

    Args:
        value: ``url``, ``model``, ``api_key_variable``, ``timeout_seconds``, ``max_attempts``.
        batch: texts per request.
        requests_per_second: of this judge.
        first_pause_seconds: before the third attempt; doubles with each one. The second follows at once.

    Raises:
        ConfigError: :func:`check_endpoint`.
    """

    def __init__(
        self, value: ValueConfig, batch: int, notify: Notify, *, requests_per_second: float,
        first_pause_seconds: float = 2.0,
    ) -> None:  # fmt: skip
        self._url, self._key = check_endpoint(value)
        self._value, self._batch, self._notify = value, batch, notify
        self._timeout_seconds, self._first_pause_seconds = value.timeout_seconds, first_pause_seconds
        self._seconds_per_request = 1 / requests_per_second
        self._next_turn = 0.0  # on the monotonic clock
        address = urlsplit(self._url)
        self._name = f"moderation endpoint {address.hostname}{address.path}"  # a user or a query may be secret
        self._session = requests.Session()
        # Neither a header of the session, which ~/.netrc would replace, nor anything that is ever shown.
        self._session.auth = self._sign

    def uncertainty(self, questions: Sequence[Question]) -> Tensor:
        u_S = torch.zeros(len(questions), dtype=torch.float64)
        spoken = [place for place, (_, response) in enumerate(questions) if response.strip()]
        for first in range(0, len(spoken), self._batch):
            places = spoken[first : first + self._batch]
            scores = self._moderate([questions[place][1] for place in places])
            u_S[places] = torch.tensor(scores, dtype=torch.float64)
        return u_S

    def _moderate(self, texts: list[str]) -> list[float]:
        """All at once; if that is refused, each alone. NaN for a text that is refused alone."""
        try:
            return self._ask(texts)
        except _Refused as refused:
            if len(texts) > 1:
                return [score for text in texts for score in self._moderate([text])]
            self._expect_greeting(refused)
            self._notify(f"{self._name}: a response of {len(texts[0])} characters is not measured: {refused}")
            return [torch.nan]

    def _expect_greeting(self, refused: _Refused) -> None:
        """Tells a text that is refused from requests that are."""
        try:
            self._ask([GREETING])
        except _Refused:
            raise EstimatorError(
                f"{self._name}: {refused}; it refuses {GREETING!r} as well: check udasa.value.url and udasa.value.model"
            ) from None

    def _ask(self, texts: list[str]) -> list[float]:
        """P(unsafe) of each text, in up to ``max_attempts`` requests."""
        pauses = Retry(
            None,
            backoff_factor=self._first_pause_seconds / 2,
            backoff_max=MAX_PAUSE_SECONDS,
            retry_after_max=MAX_PAUSE_SECONDS,
        )
        attempt, attempts = 1, self._value.max_attempts
        while True:
            try:
                return self._post(texts)
            except _TryAgain as failure:
                if attempt == attempts:
                    raise EstimatorError(
                        f"{self._name}: gave no usable answer in {attempts} attempts; the last one: {failure}. "
                        "What was measured is kept: try again later, or raise udasa.value.max_attempts"
                    ) from None
                self._notify(f"{self._name}: attempt {attempt} of {attempts}: {failure}")
                pauses = pauses.increment(error=failure)
                _pause(pauses, failure.raw)
                attempt += 1

    def _post(self, texts: list[str]) -> list[float]:
        self._wait_for_turn()
        body = {"input": texts} | ({"model": self._value.model} if self._value.model else {})
        try:
            answer = self._session.post(self._url, json=body, timeout=self._timeout_seconds, allow_redirects=False)
        except requests.Timeout:
            raise _TryAgain(f"no answer within {self._timeout_seconds:g} seconds") from None
        except requests.RequestException as error:
            raise _TryAgain(self._shown(str(error))) from None
        status = answer.status_code
        said = self._shown(answer.content.decode("utf-8", "replace"))
        if status in TIMES or status >= 500:
            raise _TryAgain(f"answered {status}: {said}", answer.raw)
        if status in REFUSALS:
            raise _Refused(f"answered {status}: {said}")
        if status != 200:
            key = self._value.api_key_variable or "udasa.value.api_key_variable"
            raise EstimatorError(
                f"{self._name}: answered {status}: {said}. "
                f"Check udasa.value.url, udasa.value.model and the key in {key}"
            )
        return self._scores(answer.content, len(texts), said)

    def _scores(self, content: bytes, num_texts: int, said: str) -> list[float]:
        try:
            results = _Moderations.model_validate_json(content).results
        except ValidationError as error:
            problem = error.errors()[0]
            what = self._shown(f"{'.'.join(map(str, problem['loc'])) or 'the answer'}: {problem['msg']}")
            raise _TryAgain(f"answered 200 with garbage: {what}; it was: {said}") from None
        if len(results) != num_texts:
            raise _TryAgain(f"answered 200 with {len(results)} results for {num_texts} texts")
        return [max(result.category_scores.values()) for result in results]

    def _wait_for_turn(self) -> None:
        now = time.monotonic()
        if now < self._next_turn:
            time.sleep(self._next_turn - now)
        self._next_turn = max(now, self._next_turn) + self._seconds_per_request

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _shown(self, text: str) -> str:
        """For a message: short, and without the key, whoever put it there."""
        text = text if self._key is None else text.replace(self._key, "<key>")
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def check_endpoint(value: ValueConfig) -> tuple[str, str | None]:
    """Address and key, after what can be said without asking it.

    Raises:
        ConfigError: no address, or one that is not http(s); :func:`read_key`.
    """
    url = value.url or ""
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(
            "udasa.value.url: udasa.value.judge = endpoint needs the http(s) address of an "
            f"OpenAI-compatible /moderations, not {value.url!r}"
        )
    return url, read_key(value.api_key_variable)


def read_key(variable: str | None) -> str | None:
    """The key in this environment variable; None = the endpoint needs none.

    Raises:
        ConfigError: it is not set, or holds what no HTTP header can; says nothing of the content.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"udasa.value.api_key_variable: the environment variable {variable} is not set here; "
            "it must be, where training is started and on every machine that scores"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"udasa.value.api_key_variable: the environment variable {variable} holds characters "
            "that are in no key: was it copied whole, and nothing else?"
        )
    return key


def _pause(pauses: Retry, raw: BaseHTTPResponse | None) -> None:
    try:
        pauses.sleep(raw)
    except InvalidHeader:  # a Retry-After that is neither seconds nor a date
        pauses.sleep()
