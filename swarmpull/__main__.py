"""``python -m swarmpull``."""

from __future__ import annotations

import sys

from swarmpull.cli import main

sys.exit(main())
