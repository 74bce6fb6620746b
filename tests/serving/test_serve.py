"""The server over HTTP: 65 clients at once, plain and streamed; refusals, cancellations, a server that is killed."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import openai
import pytest

from kvgather.replay.clients import Answer, Workload, ask_all
from kvgather.replay.process import ServerProcess
from kvgather.replay.prompts import prompts
from kvgather.replay.run import Outcome
from kvgather.serving.characters import character_tokenizer
from tests.serving.engines import expected

NAME, TEXTS, NEW = "random-tiny", prompts(65, 48, 16), 4
SERVER = ("kvgather", "serve", "--random-weights", "--device", "cpu", "--cache-dtype", "float32", "--num-blocks", "256")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(SERVER, 300) as server:
        server.wait_until_ready(120)
        yield server


def ask(server: ServerProcess, *, new: int = NEW, stream: bool = True, texts: list[str] = TEXTS) -> list[Answer]:
    return ask_all(server.url, Workload(NAME, texts, new, stream, 60.0), server.death)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
def test_65_clients_get_the_tokens_of_generate(server: ServerProcess, stream: bool) -> None:
    tokenizer = character_tokenizer(128)
    ids = tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS[::5])  # of every fifth: `generate` is slow
    answers = ask(server, stream=stream)
    assert [answer.error for answer in answers] == [""] * 65
    assert [answer.text for answer in answers[::5]] == [tokenizer.decode(new) for new in expected("tiny", ids, NEW)]
    assert all((answer.first is not None) is stream for answer in answers)
    assert server.death() == "" and server.status()["held_blocks"] == 0 and server.status()["hits"] > 30


def test_a_request_that_never_fits_is_refused_with_the_reason(server: ServerProcess) -> None:
    for stream in (False, True):
        (answer,) = ask(server, new=5000, stream=stream, texts=TEXTS[:1])
        assert answer.error.startswith(f"status 400: the prompt has {len(TEXTS[0])} tokens, and 5000 may be generated;")
    assert [answer.error for answer in ask(server)] == [""] * 65


def test_a_stream_that_is_closed_frees_its_blocks(server: ServerProcess) -> None:
    async def listen_and_leave() -> int:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model=NAME, prompt=TEXTS[0], max_tokens=2000, stream=True)
            async for _ in stream:
                held = await asyncio.to_thread(lambda: int(server.status()["held_blocks"]))
                await stream.close()
                return held
        return 0

    assert asyncio.run(listen_and_leave()) > 0
    end = time.monotonic() + 10
    while server.status()["held_blocks"] and time.monotonic() < end:
        time.sleep(0.05)
    assert server.status()["held_blocks"] == 0


def test_a_killed_server_gives_every_client_the_reason_within_a_second() -> None:
    killed: list[float] = []

    def kill() -> None:
        while server.status().get("num_steps", 0) < 20:  # in the middle of the answers
            time.sleep(0.05)
        server.process.kill()
        killed.append(time.monotonic())

    with ServerProcess((*SERVER, "--num-blocks", "2048"), 300) as server:
        server.wait_until_ready(120)
        killer = threading.Thread(target=kill)
        killer.start()
        answers = ask(server, new=300)
        seconds = time.monotonic() - killed[0]
        killer.join()
    assert {answer.error for answer in answers} == {"the engine's process died of SIGKILL"}
    assert not any(answer.timed_out for answer in answers) and seconds < 1.0


def test_an_engine_that_raises_gives_every_client_the_reason() -> None:
    """The server lives, and refuses later requests with the same reason; its health is that of the engine."""
    with ServerProcess(("tests.serving.raising",), 300) as server:
        server.wait_until_ready(120)
        begin = time.monotonic()
        reason = "CUDA error: an 'illegal memory access' was encountered"
        for stream in (True, False):
            answers = ask(server, stream=stream)
            outcome = Outcome(answers, "", {}, 0.0)
            assert outcome.completed <= 1 and all(found.endswith(reason) for found in outcome.reasons), outcome.reasons
        assert time.monotonic() - begin < 20 and server.status()["error"] == reason and server.death() == ""
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
