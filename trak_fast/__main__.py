"""`python -m trak_fast` is the command `trak-fast`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
