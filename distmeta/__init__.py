"""distmeta: meta-learning for cold-start recommendation, from a laptop to a Ray cluster."""

__version__ = "0.1.0"
