"""Many independent items through one function: on the cores of this machine, or on a cluster.

Rendering assets, measuring clips and encoding shards have this shape. What became of an item is
written to a file of its own as soon as it is known, so that a run that was stopped, in any way,
goes on where it was, and one bad item costs nothing but itself. The same function runs here, in
processes, or as an Apache Beam pipeline on whatever runner its options name.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)

Work = Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Attributes:
        key: of the item.
        error: one sentence that says why it failed, or None.
        seconds: that it took.
        value: what the work returned; empty when it failed.
    """

    key: str
    error: str | None
    seconds: float
    value: dict[str, Any]


def run(
    work: Work,
    items: Mapping[str, Any],
    *,
    folder: str | os.PathLike,
    workers: int = 1,
    beam: Sequence[str] | None = None,
    retry_failures: bool = True,
) -> list[Outcome]:
    """Calls `work` with every item that has no outcome in `folder` yet.

    Args:
        work: of one item; returns values that JSON can hold. An exception is the item's failure,
            and the others go on. For more than this process it needs to be picklable, and its
            module importable where it runs.
        items: by key. A key names the item for ever: its outcome is found by it.
        folder: where the outcomes are kept; created. A cluster needs one that all machines see.
        workers: processes on this machine; 1 works in this one.
        beam: options of an Apache Beam pipeline, which then does the work instead, as in
            `["--runner=FlinkRunner", "--flink_master=..."]`. Needs the extra `[beam]`.
        retry_failures: whether items that failed before are tried again.

    Returns:
        The outcomes, in the order of `items`.

    Raises:
        ValueError: `workers` is not positive, or Beam is wanted and not installed.
        RuntimeError: a worker process was killed, or an outcome did not arrive in `folder`.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}.")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    known = read(folder, items)
    todo = {
        key: item
        for key, item in items.items()
        if key not in known or (retry_failures and known[key].error is not None)
    }
    attempt = functools.partial(_attempt, work, folder)
    if todo and beam is not None:
        _run_on_beam(attempt, todo, beam)
    elif todo:
        _report(_run_here(attempt, todo, workers), len(todo))
    outcomes = read(folder, items)
    lost = [key for key in items if key not in outcomes]
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(items)} outcomes, that of {lost[0]!r} first, did not arrive in"
            f" {str(folder)!r}; all workers need to see that folder."
        )
    return [outcomes[key] for key in items]


def read(folder: str | os.PathLike, keys: Iterable[str]) -> dict[str, Outcome]:
    """The outcomes that are there, by key."""
    found = {}
    for key in keys:
        path = _path(Path(folder), key)
        if path.exists():
            found[key] = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    return found


def fingerprint(folder: str | os.PathLike) -> str:
    """Tells by names, sizes and times of its files whether a folder is still the same.

    For keys of work on folders: what is changed there is worked on again.
    """
    files = sorted(Path(folder).iterdir())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:32]


def _path(folder: Path, key: str) -> Path:
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _attempt(work: Work, folder: Path, entry: tuple[str, Any]) -> Outcome:
    """Works on one item and writes what became of it; an existing outcome is replaced whole."""
    key, item = entry
    start, error, value = time.monotonic(), None, {}
    try:
        value = work(item)
    except Exception as raised:
        _LOGGER.debug("%s failed:", key, exc_info=raised)
        error = " ".join(str(raised).split()) or type(raised).__name__
    outcome = Outcome(key, error, round(time.monotonic() - start, 3), value)
    path = _path(folder, key)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")
    partial.replace(path)
    return outcome


def _run_here(
    attempt: Callable[[tuple[str, Any]], Outcome], items: Mapping[str, Any], workers: int
) -> Iterable[Outcome]:
    if workers == 1:
        yield from map(attempt, items.items())
        return
    # Spawned: a fork of a process whose libraries run threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(items)), context) as pool:
        futures = [pool.submit(attempt, entry) for entry in items.items()]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process was killed, perhaps for want of memory; lower workers"
                f"={workers} and run the same again: finished items are kept."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _run_on_beam(
    attempt: Callable[[tuple[str, Any]], Outcome], items: Mapping[str, Any], options: Sequence[str]
) -> None:
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError as error:
        raise ValueError(
            "Apache Beam is not installed; pip install 'd4d_jax[beam]', or leave beam out."
        ) from error
    _LOGGER.info("%d items go to Apache Beam.", len(items))
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        entries = pipeline | "Items" >> beam.Create(list(items.items()))
        # Without it a runner may fuse the steps and leave everything to one worker.
        _ = entries | "Spread" >> beam.Reshuffle() | "Work" >> beam.Map(attempt)


def _report(outcomes: Iterable[Outcome], total: int) -> None:
    """Logs how far the work is, at most every ten seconds, and every failure."""
    start = last = time.monotonic()
    failures = 0
    for done, outcome in enumerate(outcomes, 1):
        if outcome.error is not None:
            failures += 1
            _LOGGER.warning("%s failed: %s", outcome.key, outcome.error)
        now = time.monotonic()
        if now - last >= 10 or done == total:
            last, rest = now, (now - start) / done * (total - done)
            _LOGGER.info(
                "%d of %d done, %d failed, %.1f a minute, %d:%02d to go.",
                *(done, total, failures, 60 * done / max(now - start, 1e-9)),
                *divmod(round(rest), 60),
            )
