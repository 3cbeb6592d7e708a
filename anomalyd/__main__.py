"""`python -m anomalyd` is `anomalyd`."""

import sys

from anomalyd.cli import main

if __name__ == "__main__":
    sys.exit(main())
