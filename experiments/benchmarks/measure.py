"""Time and memory of calls, as all suites measure them."""

import concurrent.futures
import ctypes
import datetime
import math
import multiprocessing
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_PAUSE = 0.01  # seconds after which the waiting threads of the call before have gone to sleep


def in_turn(
    calls: Mapping[K, Callable[[], Any]], *, repeats: int, seconds: float
) -> dict[K, float]:
    """Least milliseconds of each call, over rounds in which each has its turn.

    Whatever else the machine does thus hits all of them alike. A turn is two calls, because the
    others have emptied the caches before the first.

    Args:
        calls: functions that return when their work is done, run at least once before.
        repeats: most rounds.
        seconds: no round starts later than this, but one is always run.
    """
    least = dict.fromkeys(calls, math.inf)
    begin = time.perf_counter()
    for _ in range(repeats):
        for key, call in calls.items():
            time.sleep(_PAUSE)
            for _ in range(2):
                start = time.perf_counter()
                call()
                least[key] = min(least[key], 1e3 * (time.perf_counter() - start))
        if time.perf_counter() - begin > seconds:
            break
    return least


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)` in a new process; function, arguments and result are pickled.

    Raises:
        MemoryError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except concurrent.futures.BrokenExecutor:
            raise MemoryError("its process was killed") from None


def peak_mb(call: Callable[[], Any], *, on_host: bool) -> float | None:
    """MB by which the first run of `call` raises the memory in use, at its highest; None: unknown.

    On the host this is resident memory that is not file-backed: results and temporaries count, what
    was there before (inputs, compiled code) and the pages of libraries do not. Free pages of the
    heap are given back before, so that none of them is used unseen. Elsewhere it is what the
    allocator of jax's device reports. Run it in a process that has done little else.
    """
    if not on_host:
        device = jax.devices()[0]
        before = (device.memory_stats() or {}).get("bytes_in_use")
        call()
        after = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return None if before is None or after is None else (after - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    except (OSError, AttributeError):
        return None
    before = _status()
    call()
    after = _status()
    grown = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])
    return max(grown, 0) * 1024 / 1e6


def threads() -> int:
    """Hardware threads that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def free_memory() -> float:
    """Bytes of the host's memory that a new array may take; infinity where that is unknown."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    found = re.search(r"MemAvailable:\s*(\d+) kB", text)
    return 1024.0 * int(found.group(1)) if found else math.inf


def machine() -> str:
    """Processor, accelerator, threads, version of jax, date: what figures depend on."""
    device = jax.devices()[0]
    accelerator = [] if device.platform == "cpu" else [device.device_kind]
    parts = [_processor(), *accelerator, f"{threads()} threads", f"jax {jax.__version__}"]
    return ", ".join([*parts, datetime.date.today().isoformat()])


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    return name.group(1) if name else platform.processor() or platform.machine()


def _status() -> dict[str, int]:
    """The entries of /proc/self/status that are kB."""
    text = pathlib.Path("/proc/self/status").read_text()
    return {name: int(kb) for name, kb in re.findall(r"(\w+):\s*(\d+) kB", text)}
