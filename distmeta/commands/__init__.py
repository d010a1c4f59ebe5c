"""One file a command; `main(argv)` parses with cli.Parser and returns the exit status."""
