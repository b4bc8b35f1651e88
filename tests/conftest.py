"""Settings shared by all tests: the CPU, whatever else the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
