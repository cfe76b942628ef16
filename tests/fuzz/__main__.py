"""`make fuzz`, or `python -m tests.fuzz --seconds 600 --seed 0`; see `tests/fuzz/running.py`."""

import sys

from tests.fuzz.running import main

if __name__ == "__main__":
    sys.exit(main())
