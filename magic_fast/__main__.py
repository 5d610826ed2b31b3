"""``python -m magic_fast`` is ``magic-fast``."""

import sys

from magic_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
