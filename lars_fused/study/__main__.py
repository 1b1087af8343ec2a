"""`python -m lars_fused.study COMMAND`."""

import sys

from lars_fused.study.cli import main

sys.exit(main())
