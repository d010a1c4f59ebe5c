"""`python -m jobs.reproduce`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
