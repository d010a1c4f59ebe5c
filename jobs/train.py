"""`python -m jobs.train`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
