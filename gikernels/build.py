"""`python -m gikernels.build`: see gikernels.backends.build, which does it."""

import sys

from gikernels.backends.build import main

if __name__ == "__main__":
    sys.exit(main())
