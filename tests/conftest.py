"""Settings shared by all tests, and by the processes that they start."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests run small programs once: most of their time is compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
