"""The data suite: how fast clips come out of the training pipeline, and what it holds."""

import collections
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from d4d_jax.data import pipeline, records, shards
from experiments.benchmarks import measure
from experiments.benchmarks.tables import markdown, number

#: How clips are stored, and what `clip folders` is compared with.
STORES = ("clip folders", "ArrayRecord", "TFDS")
BASELINE = STORES[0]

_BATCH, _WARM, _TURN = 8, 6, 32  # clips a batch; batches before the clock starts; batches of a turn

Row = dict[str, Any]


def run(
    folders: Sequence[str], *, threads: int = 2, repeats: int = 25, seconds: float = 20.0
) -> list[Row]:
    """A row for each folder of clips and each way to store them.

    Args:
        folders: of clips of one length and size; read at that size, nothing is kept in memory.
        threads: that decode.
        repeats: most rounds; in a round every store of a folder has its turn.
        seconds: no round of a folder starts later than this.

    Raises:
        FileNotFoundError, ValueError: a folder holds no clips, or clips of several sizes.
    """
    rows = []
    for folder in folders:
        with tempfile.TemporaryDirectory() as scratch:
            stores = _store(folder, pathlib.Path(scratch))
            rates = _rates(stores, threads, repeats, seconds)
            for name, path in stores.items():
                source = pipeline.ClipSource(path)
                size = source[0]["dynamic"].shape[1]
                early, late = (
                    measure.in_fresh_process(_peak_mb, str(path), threads, batches)
                    for batches in (_TURN // 2, 2 * _TURN)
                )
                rows.append(
                    {
                        "size": size,
                        "store": name,
                        "clips": len(source),
                        "threads": threads,
                        "kb_per_clip": _bytes(path) / len(source) / 1e3,
                        "clips_per_s": list(measure.Spread.of(rates[name])),
                        "x": list(
                            measure.Spread.of(
                                [a / b for a, b in zip(rates[name], rates[BASELINE], strict=True)]
                            )
                        ),
                        "peak_mb_early": early,
                        "peak_mb_late": late,
                    }
                )
                logging.info("%d px, %s: %.0f clips/s.", size, name, rows[-1]["clips_per_s"][1])
    return rows


def table(rows: Sequence[Row]) -> str:
    """The figures of `run`."""
    headings = ("px", "stored as", "clips/s", "x", "kB a clip", "peak MB, early", "late")
    cells = [
        (
            str(row["size"]),
            row["store"],
            "{1:.0f} [{0:.0f}, {2:.0f}]".format(*row["clips_per_s"]),
            "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["x"]),
            number(row["kb_per_clip"]),
            number(row["peak_mb_early"]),
            number(row["peak_mb_late"]),
        )
        for row in rows
    ]
    return markdown(headings, cells, left=2)


def _store(folder: str, scratch: pathlib.Path) -> dict[str, pathlib.Path]:
    """The clips in every way, all of them in the split for training."""
    import tensorflow_datasets as tfds  # takes seconds

    from d4d_jax.data.tfds_orbits import OrbitClips

    tfds.disable_progress_bar()
    shards.build(folder, scratch / "records", fractions=shards.Fractions(0.0, 0.0))
    builder = OrbitClips(records=scratch / "records", data_dir=scratch / "tfds")
    builder.download_and_prepare()
    paths = (pathlib.Path(folder), scratch / "records", pathlib.Path(builder.data_dir))
    return dict(zip(STORES, paths, strict=True))


def _rates(
    stores: Mapping[str, pathlib.Path], threads: int, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Clips per second of each store, one figure per round, in processes of their own."""
    rates = collections.defaultdict(list)
    begin = time.perf_counter()
    for _ in range(repeats):
        for name, path in stores.items():
            rates[name].append(measure.in_fresh_process(_rate, str(path), threads))
        if time.perf_counter() - begin > seconds:
            break
    return rates


def _rate(path: str, threads: int) -> float:
    """Clips per second, without those that were read ahead when the clock starts."""
    batches = _batches(pathlib.Path(path), threads)
    for _ in range(_WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(_TURN):
        next(batches)
    return _TURN * _BATCH / (time.perf_counter() - start)


def _batches(path: pathlib.Path, threads: int):
    source = pipeline.ClipSource(path, cache_bytes=0)
    return iter(pipeline.make_dataset(source, batch_size=_BATCH, num_threads=threads))


def _peak_mb(path: str, threads: int, count: int) -> float | None:
    """The most that a process has held after so many batches."""
    batches = _batches(pathlib.Path(path), threads)
    for _ in range(count):
        next(batches)
    return measure.process_peak_mb()


def _bytes(path: pathlib.Path) -> int:
    """Size of the files of a store that hold clips."""
    if records.is_dataset(path):
        return sum(file.stat().st_size for file in path.glob("*array_record*"))
    return sum(
        os.path.getsize(file) for clip in pipeline.find_clips(path) for file in clip.iterdir()
    )
