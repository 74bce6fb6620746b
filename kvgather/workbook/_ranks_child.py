"""One rank of `kvgather.workbook.ranks_run`: joins the group, calls the function, and writes what it returned.

python -m kvgather.workbook._ranks_child FOLDER RANK
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from kvgather.lab.child import leave_no_core


def main() -> None:
    leave_no_core()
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    module, _, name = settings["job"].partition(":")
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=settings["ranks"],
        timeout=timedelta(seconds=settings["timeout"]),
    )
    answer = getattr(importlib.import_module(module), name)(rank, settings["ranks"], **settings["arguments"])
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(answer), encoding="utf-8")
    os.replace(part, folder / f"{rank}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
