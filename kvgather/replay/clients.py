"""Asynchronous clients of an OpenAI-compatible server, one for each prompt, each with its own time-out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai


@dataclass(frozen=True)
class Answer:
    """What one client got.

    Attributes:
        text: the generated text, as far as it came.
        error: the reason, or "" for a complete answer.
        seconds: from the request to the end of the answer.
        first: seconds until the first token, or None if the answer was not streamed or had none.
        timed_out: whether the client gave up.
    """

    text: str
    error: str
    seconds: float
    first: float | None = None
    timed_out: bool = False


@dataclass(frozen=True)
class Workload:
    """What the clients ask for.

    Attributes:
        model: the model's name at the server.
        prompts: one for each client.
        new_tokens: to generate for each.
        stream: whether the answers come token by token.
        timeout: seconds that a client waits.
    """

    model: str
    prompts: Sequence[str]
    new_tokens: int
    stream: bool
    timeout: float


def ask_all(
    url: str, workload: Workload, death: Callable[[], str], tell: Callable[[Answer], None] = lambda _: None
) -> list[Answer]:
    """Send all prompts at once, and wait for all answers.

    Args:
        url: of the server, without a path.
        workload: the prompts.
        death: how the server's process has ended, or "" while it runs: the reason of a broken connection.
        tell: called with each answer when it is complete.
    """
    work = _ask_all(url, workload, death, tell)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as other:  # a notebook's cells run in a loop, which cannot run another one
        return other.submit(asyncio.run, work).result()


async def _ask_all(
    url: str, workload: Workload, death: Callable[[], str], tell: Callable[[Answer], None]
) -> list[Answer]:
    async def one(prompt: str) -> Answer:
        answer = await _ask(client, prompt, workload, death)
        tell(answer)
        return answer

    direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # no proxy of the environment; `client` closes it
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=workload.timeout, http_client=direct
    ) as client:
        return list(await asyncio.gather(*(one(prompt) for prompt in workload.prompts)))


async def _ask(client: openai.AsyncOpenAI, prompt: str, workload: Workload, death: Callable[[], str]) -> Answer:
    begin, texts, first = time.perf_counter(), [], None
    error, timed_out = "", False
    request: dict[str, Any] = {
        "model": workload.model, "prompt": prompt, "max_tokens": workload.new_tokens, "temperature": 0,
    }  # fmt: skip
    try:
        async with asyncio.timeout(workload.timeout):
            if workload.stream:
                async for chunk in await client.completions.create(**request, stream=True):
                    if chunk.choices[0].text:
                        first = first or time.perf_counter() - begin
                        texts.append(chunk.choices[0].text)
            else:
                texts.append((await client.completions.create(**request)).choices[0].text)
    except (TimeoutError, openai.APITimeoutError):
        error, timed_out = f"no answer within {workload.timeout:g} s", True
    except openai.APIConnectionError as cause:
        error = await _broken(death) or f"the connection failed: {cause.__cause__ or cause}"
    except openai.APIStatusError as cause:
        error = f"status {cause.status_code}: {_reason(cause)}"
    except openai.APIError as cause:
        error = _reason(cause)
    return Answer("".join(texts), error, time.perf_counter() - begin, first, timed_out)


async def _broken(death: Callable[[], str], seconds: float = 5.0) -> str:
    """The reason of a broken connection: the server's processes may end a moment after its connections."""
    for _ in range(int(seconds / 0.02)):
        if how := death():
            return f"the engine's process {how}"
        await asyncio.sleep(0.02)
    return ""


def _reason(error: openai.APIError) -> str:
    return str(error.body or error.message)
