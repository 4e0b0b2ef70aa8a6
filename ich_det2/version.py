"""The package's version, which every room may name."""

__version__ = "0.2.0"
