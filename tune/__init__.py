"""`python -m tune.search` and the search spaces; what they do lives in `distmeta`."""
