"""A pull-only, pull-through, caching OCI Distribution server."""

__version__ = "0.2.0"
