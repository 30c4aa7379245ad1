"""`python -m fsae`, for launchers that start a module in every process."""

from __future__ import annotations

import sys

from fsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
