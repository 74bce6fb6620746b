"""`python -m kvgather`: the command line, for environments without the `kvgather` script on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
