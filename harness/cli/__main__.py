"""`python -m harness.cli` is `harness`."""

import sys

from harness.cli.parser import main

sys.exit(main())
