"""A real engine on this package's pools: transformers' continuous batching, with our cache and attention in it.

Transformers schedules, chunks prefills, preempts, samples and serves over HTTP. Its paged cache becomes one
`PagedKVCache` per layer, and its attention becomes `prefix_attention`:

    import kvgather.serving as serving

    serving.install(model, serving.Options(), batching, generation)
    model.generate_batch(prompts)

Needs the extra `kvgather[serving]`.
"""

from .contract import check_version

check_version()  # before the imports below, which would fail with the name of one moved class

from .manager import EngineManager, EngineStopped, RequestCancelled, RequestRefused, install  # noqa: E402
from .options import Gather, Options  # noqa: E402

__all__ = [
    "EngineManager",
    "EngineStopped",
    "Gather",
    "Options",
    "RequestCancelled",
    "RequestRefused",
    "install",
]
