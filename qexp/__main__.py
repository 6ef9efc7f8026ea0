"""`python -m qexp`: the program `qexp`."""

import sys

from qexp.command.program import main

if __name__ == "__main__":
    sys.exit(main())
