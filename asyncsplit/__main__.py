"""Run the command line: ``python -m asyncsplit``."""

import sys

from asyncsplit.cli import main

sys.exit(main())
