"""The replay's clients reach the server of this machine where the environment names a proxy, which does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvgather.replay.clients import Workload, ask_all
from kvgather.replay.process import HOST, ServerProcess

STATUS = {"num_steps": 7}
COMPLETION = {
    "id": "a", "object": "text_completion", "created": 0, "model": "m",
    "choices": [{"index": 0, "text": "abc", "finish_reason": "stop", "logprobs": None}],
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(STATUS)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(COMPLETION)

    def reply(self, answer: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{HOST}:9")  # the port "discard", where nothing listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_process_is_asked_directly(server: HTTPServer) -> None:
    process = ServerProcess.__new__(ServerProcess)  # without a child: only its address is needed
    process.port = server.server_port
    assert process.status() == STATUS


def test_the_clients_connect_directly(server: HTTPServer) -> None:
    url = f"http://{HOST}:{server.server_port}"
    answers = ask_all(url, Workload("m", ["a", "b"], 3, False, 10.0), lambda: "is not started")
    assert [(answer.text, answer.error) for answer in answers] == [("abc", "")] * 2
