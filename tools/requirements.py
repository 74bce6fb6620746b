"""Prints the requirements of pyproject.toml without torch and triton, which `make ... TORCH=own` installs."""

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Print one requirement a line: the dependencies and those of the extras in argv[1], separated by commas."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = list(project["dependencies"])
    for extra in sys.argv[1].split(","):
        requirements += project["optional-dependencies"][extra]
    for line in requirements:
        if not re.match(r"(torch|triton|triton-windows)\b(?!-)", line):
            print(line)


if __name__ == "__main__":
    main()
