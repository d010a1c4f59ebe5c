"""One file a source of raw data: it reads its own layout strictly and hands tables to data/write.py."""
