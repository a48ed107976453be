"""`python -m finepoint` is `finepoint`."""

import sys

from finepoint.cli import main

sys.exit(main())
