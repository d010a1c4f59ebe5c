"""`python -m jobs.prepare`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
