"""Records of what a change must keep: made in several processes, written to a file, compared with one.

A file is `{where: {name: value}}`, `where` being all that the values depend on, such as a version of Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Values = dict[str, Any]


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both tools have."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    task = made.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="FILE", help="record what is made here")
    task.add_argument("--compare", type=Path, metavar="FILE", help="name what differs from the record")
    made.add_argument("--only", default="", help="only what has this in its name")
    made.add_argument("--workers", type=int, default=None, help="processes; default: one for each core")
    return made


def in_processes(work: Callable[[Any], Values], jobs: Iterable[Any], workers: int | None) -> Values:
    """What `work` gives for each job, together, in new processes that give way to others."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context, found = multiprocessing.get_context("spawn"), Values()
    with ProcessPoolExecutor(workers or cores, context, initializer=os.nice, initargs=(10,)) as pool:
        for done in pool.map(work, jobs):
            found |= done
    return dict(sorted(found.items()))


def read(file: Path) -> dict[str, Values]:
    return json.loads(file.read_text()) if file.exists() else {}


def finish(options: argparse.Namespace, where: str, found: Values) -> int:
    """Write what was found to the file, or compare it; the exit status: 0 if all is equal, 1 if not.

    Names that the file has not are printed, and no difference: a new case changes no other.
    """
    record, only = read(options.write or options.compare), options.only
    if options.write:
        record[where] = dict(sorted((found if not only else record.get(where, {}) | found).items()))
        parts = [
            f" {json.dumps(place)}: {{\n" + ",\n".join(f"  {json.dumps(n)}: {json.dumps(v)}" for n, v in values.items())
            for place, values in sorted(record.items())
        ]
        options.write.write_text("{\n" + "\n },\n".join(parts) + "\n }\n}\n")
        print(f"{len(found)} written to {options.write}, {where}")
        return 0
    wanted = {name: value for name, value in record[where].items() if only in name}
    differ = [name for name, value in wanted.items() if found.get(name) != value]
    new = sorted(found.keys() - wanted.keys())
    for name in differ:
        print(f"DIFFERS {name}: {wanted[name]}, now {found.get(name, 'not there')}")
    for name in new:
        print(f"NOT RECORDED {name}")
    print(f"{len(wanted) - len(differ)} are equal, {len(differ)} differ, {len(new)} are not recorded")
    return 1 if differ or not wanted else 0


def missing(options: argparse.Namespace, where: str) -> int:
    """0 if the file to compare with has a record of this place; else says so, and is 2, the exit status."""
    if options.write or where in (record := read(options.compare)):
        return 0
    print(f"nothing to compare with: here is {where}; recorded: {'; '.join(record) or 'nothing'}")
    return 2
