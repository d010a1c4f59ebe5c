"""`python -m jobs.evaluate`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
