"""`python -m ociproxy`."""

from ociproxy.cli.main import main

main()
