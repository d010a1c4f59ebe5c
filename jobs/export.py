"""`python -m jobs.export`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
