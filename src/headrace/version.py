"""The one place that states headrace's version."""

__version__ = "0.1.0"
