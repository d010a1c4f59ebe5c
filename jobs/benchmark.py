"""`python -m jobs.benchmark`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
