"""``python -m localize``: the command line without its script."""

import sys

from localize.cli.app import main

sys.exit(main())
