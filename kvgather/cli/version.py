"""The version of this package."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """This package's version, from the clone that it runs in, or from the metadata of an installed package."""
    clone = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if clone.is_file():
        project = tomllib.loads(clone.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "kvgather":
            return str(project["version"])
    try:
        return importlib.metadata.version("kvgather")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
