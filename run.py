"""The program `qexp` from a clone: `python run.py --help`."""

import sys

from qexp.command.program import main

if __name__ == "__main__":
    sys.exit(main())
