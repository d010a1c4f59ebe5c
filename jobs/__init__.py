"""Entry points for `python -m jobs.X` and `ray job submit`; the commands live in distmeta.commands."""
