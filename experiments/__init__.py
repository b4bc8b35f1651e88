"""The binaries; run them with `python -m experiments.NAME`."""
