"""`python -m kvgather.cli`: the same as `python -m kvgather`."""

import sys

from .entry import main

if __name__ == "__main__":
    sys.exit(main())
