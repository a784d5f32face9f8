"""`python -m metafast` is the command `metafast`."""

import sys

from metafast.program.cli import main

sys.exit(main())
