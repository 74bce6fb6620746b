"""One run of an engine inside this process: prompts that are queued before it starts, so that its steps repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import transformers

from ..serving import Options, install
from ..serving.counters import Step
from ..serving.models import random_model
from ..serving.serve import Sizes

__all__ = ["EngineRun"]


class EngineRun:
    """A run of the tiny GPT-OSS, with random weights and greedy.

    All requests are queued before the engine starts, so that equal arguments give the same steps. A server's requests
    come at any time.

    Attributes:
        tokens: the generated tokens of each request, in the order of the prompts; complete after `results`.
        steps: the engine's steps, see `kvgather.serving.counters.Step`.
        hits, hit_tokens, prompt_tokens: requests that found cached blocks, tokens of these blocks, and of all prompts.
    """

    def __init__(
        self, options: Options, prompts: Sequence[Sequence[int]], new: int, sizes: Sizes, *, device: str = "cpu"
    ) -> None:
        """Keep the arguments; nothing runs yet.

        Args:
            options: of the pools and the attention.
            prompts: token ids of each request.
            new: tokens to generate for each.
            sizes: of the engine.
            device: "cpu" or "cuda".
        """
        self._options, self._prompts, self._new, self._sizes = options, prompts, new, sizes
        self._device = torch.device(device)
        self.tokens: list[list[int]] = []
        self.steps: list[Step] = []
        self.hits = self.hit_tokens = self.prompt_tokens = 0

    def results(self) -> Iterator[int]:
        """Run, and yield the number of completed requests after each.

        Raises:
            RuntimeError: the engine has failed a request, or gave no answer within a minute.
        """
        transformers.logging.set_verbosity_error()
        model = random_model("tiny", device=self._device, dtype=torch.float32)
        engine = install(model, self._options, self._sizes.batching())
        try:
            names = [engine.add_request(list(prompt), max_new_tokens=self._new) for prompt in self._prompts]
            engine.start()
            done: dict[str, list[int]] = {}
            while len(done) < len(names):
                result = engine.get_result(timeout=60)
                if result is None or result.error:
                    raise RuntimeError("no answer within 60 s" if result is None else str(result.error))
                if result.is_finished():
                    done[result.request_id] = result.generated_tokens
                    yield len(done)
            cache = engine.cache
            assert cache is not None
            self.hits, self.hit_tokens = cache.hits, cache.hit_tokens
            self.prompt_tokens = sum(map(len, self._prompts))
        finally:
            if engine.is_running():
                engine.stop(timeout=10, hard_stop=True)
        self.tokens, self.steps = [done[str(name)] for name in names], list(engine.counters.steps)

    def run(self) -> EngineRun:
        """Run to the end; returns the run itself."""
        for _ in self.results():
            pass
        return self

    def differing(self, other: EngineRun) -> list[int]:
        """The indices of the requests whose tokens are not those of another run."""
        pairs = zip(self.tokens, other.tokens, strict=True)
        return [i for i, (mine, theirs) in enumerate(pairs) if mine != theirs]
