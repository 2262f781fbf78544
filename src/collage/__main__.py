"""python -m collage"""

import sys

from collage.harness.cli import main

sys.exit(main())
