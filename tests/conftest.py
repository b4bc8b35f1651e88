"""Settings shared by all tests, and by the processes that they start."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests run small programs once: most of their time is compilation.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The processes of one session, the binaries among them, share what they compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="d4d_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the programs that a file's tests compiled.

    Every program holds memory maps, and Linux grants a process 65,530 of them: the tests together
    need more, and the compiler aborts when they are used up.
    """
    yield
    jax.clear_caches()
    gc.collect()
