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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_PAUSE = 0.01  # seconds after which the waiting threads of the call before have gone to sleep


class Spread(NamedTuple):
    """The quartiles of a figure that was taken several times."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of any number of samples above 0."""
        return cls(*(float(x) for x in np.percentile(samples, (25, 50, 75))))


def in_turn(
    calls: Mapping[K, Callable[[], Any]], *, repeats: int, seconds: float
) -> dict[K, float]:
    """Least milliseconds of each call over the rounds of `rounds`, which has the arguments."""
    samples = rounds(calls, repeats=repeats, seconds=seconds)
    return {key: min(times) for key, times in samples.items()}


def rounds(
    calls: Mapping[K, Callable[[], Any]], *, repeats: int, seconds: float
) -> dict[K, list[float]]:
    """Milliseconds of each call, one figure per round; in a round each call has its turn.

    Whatever else the machine does thus hits all of them alike. A turn is two calls, because the
    others have emptied the caches before the first; the lesser time counts.

    Args:
        calls: functions that return when their work is done, run at least once before.
        repeats: most rounds.
        seconds: no round starts later than this, but one is always run.
    """
    samples: dict[K, list[float]] = {key: [] for key in calls}
    begin = time.perf_counter()
    for _ in range(repeats):
        for key, call in calls.items():
            time.sleep(_PAUSE)
            times = []
            for _ in range(2):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            samples[key].append(min(times))
        if time.perf_counter() - begin > seconds:
            break
    return samples


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


def process_peak_mb() -> float | None:
    """Largest resident memory of this process so far, in MB, libraries included; None: unknown.

    Not `resource.getrusage`: on Linux its figure starts from that of the process that spawned this.
    """
    try:
        return _status()["VmHWM"] * 1024 / 1e6
    except (OSError, KeyError):
        return None


def device_peak_mb() -> float | None:
    """Largest use of the memory of jax's device so far, in MB; None where it does not count it."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 1e6


def program_mb(compiled: jax.stages.Compiled) -> float | None:
    """MB that a compiled program holds while it runs; None: its platform does not say.

    Arguments, temporaries, and results; a result in the place of a donated argument counts once.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return (sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes) / 1e6


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
