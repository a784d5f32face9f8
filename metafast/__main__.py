"""`python -m metafast` is the command `metafast`."""

import sys

from metafast.cli import main

sys.exit(main())
