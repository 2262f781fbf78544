"""python -m collage"""

from collage.harness.cli import shell

shell()
