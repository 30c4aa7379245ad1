"""`python -m fsvideo_pipeline`: the command `fsvideo` where its script is not on the path."""

from __future__ import annotations

import sys

from fsvideo_pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
