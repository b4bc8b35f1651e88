"""The binaries: train, sample, generate, reconstruct. Run them with `python -m experiments.NAME`."""
