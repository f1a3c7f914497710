"""A moderation endpoint on this machine that does what a script says, request by request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LONGEST_SILENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Reply:
    """None as status: says nothing until the test ends."""

    status: int | None = 200
    body: str | None = None  # None = what OpenAI would answer
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class ScriptedEndpoint:
    url: str
    script: list[Reply]  # for one request after the other; behind its end all are answered well
    refused: str | None = None  # a request with a text that contains this is answered 400
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of all requests
    authorizations: list[str | None] = field(default_factory=list)
    test_ended: threading.Event = field(default_factory=threading.Event)

    @property
    def texts(self) -> list[list[str]]:
        return [body["input"] for body in self.bodies]


def score_of(text: str) -> float:
    """What the endpoint finds."""
    return len(text) % 10 / 10


def moderations(texts: Sequence[str]) -> str:
    results = [
        {
            "flagged": score_of(text) > 0.5,
            "categories": {"hate": False, "violence": False},
            "category_scores": {"hate": score_of(text) / 2, "violence": score_of(text), "sexual": 0},
        }
        for text in texts
    ]
    return json.dumps({"id": "modr-1", "model": "omni-moderation", "results": results})


@contextmanager
def serve(*script: Reply) -> Iterator[ScriptedEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.bodies.append(body)
            endpoint.authorizations.append(self.headers["Authorization"])
            reply = endpoint.script.pop(0) if endpoint.script else Reply()
            if endpoint.refused is not None and any(endpoint.refused in text for text in body["input"]):
                reply = Reply(400, '{"error": {"message": "input is not to my taste"}}')
            if reply.status is None:
                endpoint.test_ended.wait(LONGEST_SILENCE_SECONDS)
                return
            content = (moderations(body["input"]) if reply.body is None else reply.body).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Not in the tests' output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = ScriptedEndpoint(f"http://127.0.0.1:{server.server_port}/v1/moderations", list(script))
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.test_ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
