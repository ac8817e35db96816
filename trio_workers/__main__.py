"""The command line: `python -m trio_workers`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
