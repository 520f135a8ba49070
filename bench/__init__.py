"""One script for each claim in the README: `python -m bench.NAME [--quick]`."""
