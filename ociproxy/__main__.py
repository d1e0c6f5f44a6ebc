"""`python -m ociproxy`. Tests: tests/load."""

from ociproxy.cli.main import main

main()
