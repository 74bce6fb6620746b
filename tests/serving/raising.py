"""A server whose engine meets an error in a gather, as a GPU's engine does after an illegal access.

python -m tests.serving.raising --host 127.0.0.1 --port 8000
"""

from __future__ import annotations

import argparse

import torch

from kvgather.serving.options import Options
from kvgather.serving.serve import Sizes, Source, serve

REASON = 'CUDA error: an "illegal memory access" was encountered\nCUDA kernel errors might be reported later'


def broken(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError(REASON)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    source = Source("", "tiny", torch.device("cpu"), torch.float32)
    serve(source, Sizes(num_blocks=256), Options(gather=broken), arguments.host, arguments.port)
