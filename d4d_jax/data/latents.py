"""A data set with the latents of its clips: the frozen networks run once, not in every step."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from d4d_jax.data import pipeline, records, tables


def encode(
    source: str | os.PathLike,
    out: str | os.PathLike,
    entries: Callable[[pipeline.Element], Mapping[str, np.ndarray]],
    about: Mapping[str, Any],
    *,
    on_clip: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Writes the records of a data set with further entries, file by file.

    The frames stay in the records, where they cost no time: only what is asked for is decompressed.
    The same call after a stop goes on with the files that are missing.

    Args:
        source: folder of a data set of `d4d_jax.data.shards`.
        out: folder of the new one; created.
        entries: `dynamic_latents` and `static_latents` (t, h, w, c) of a clip (see
            `pipeline.element`), and any further arrays that the network is told of it.
        about: plain values that say how they were made, among them "size", the pixels a side of
            the frames that `entries` gets. They become "latents" in `dataset.json`.
        on_clip: told after each clip how many are done.

    Returns:
        What the new `dataset.json` says.

    Raises:
        FileNotFoundError: there is no such data set.
        FileExistsError: `out` holds another one.
        ValueError: a record cannot be read.
    """
    index, out = records.read_index(source), Path(out)
    plan = json.dumps({"splits": index["splits"], "latents": dict(about)}, indent=1)
    _claim(out, plan)
    done = 0
    for split in index["splits"].values():
        files = {}
        for name, entry in split["files"].items():
            if not (out / name).exists():
                _write(Path(source) / name, out / name, entries, about["size"], done, on_clip)
            done += entry["clips"]
            files[name] = {"clips": entry["clips"], "sha256": records.checksum(out / name)}
        split["files"] = files
    records.write_index(out, {**index, "latents": dict(about)})
    return records.read_index(out)


def _claim(out: Path, plan: str) -> None:
    """Notes in the output folder what it is to hold; something else must not be there."""
    file = out / ".latents.json"
    known = file.read_text(encoding="utf-8") if file.exists() else None
    if known != plan and (known is not None or records.is_dataset(out)):
        raise FileExistsError(
            f"{str(out)!r} holds another data set; choose another folder or remove it first."
        )
    out.mkdir(parents=True, exist_ok=True)
    tables.write_text(file, plan)


def _write(
    source: Path,
    target: Path,
    entries: Callable[[pipeline.Element], Mapping[str, np.ndarray]],
    size: int,
    done: int,
    on_clip: Callable[[int], None],
) -> None:
    """Writes one file, which is there whole or not at all."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        stored: Any = grain.sources.ArrayRecordDataSource([str(source)])
        for i in range(len(stored)):
            record = records.decode(stored[i])
            sample = pipeline.record_element(record, size=size)
            further = {name: np.asarray(value) for name, value in entries(sample).items()}
            record |= {"motion": float(sample["motion"]), **further}
            writer.write(records.encode(record))
            on_clip(done + i + 1)
    finally:
        writer.close()
    partial.replace(target)
