"""`python -m tune.search`: see `--help`."""

import sys

from distmeta.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
