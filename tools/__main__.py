"""``python -m rankbook.tools`` is the console script."""

import sys

from rankbook.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
