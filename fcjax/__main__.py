"""`python -m fcjax` is the command `fcjax`."""

import sys

from fcjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
