"""`python -m reroll` is `reroll`."""

import sys

from reroll.cli import main

sys.exit(main())
