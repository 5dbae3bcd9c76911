"""``python -m mergekit_vision``."""

import sys

from mergekit_vision.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
