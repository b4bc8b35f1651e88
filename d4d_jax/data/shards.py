"""Building a data set: clip folders to ArrayRecord files, split by asset.

Every file is an item of work of its own (`bulk.run`), here or on Apache Beam. Which split a clip
belongs to is a function of the name of its asset alone, so that all clips of an asset share it,
also those of a later, larger data set.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d4d_jax.data import bulk, pipeline, records, tables

_LOGGER = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
FAILURE_COLUMNS = ("clip", "reason")


@dataclasses.dataclass(frozen=True)
class Fractions:
    """Shares of the assets that the splits take, on average; the rest is for training.

    Raises:
        ValueError: a share is negative, or nothing is left for training.
    """

    val: float = 0.05
    test: float = 0.05

    def __post_init__(self):
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise ValueError(
                f"val={self.val} and test={self.test} must not be negative and add up to below 1."
            )


def split_of(asset: str, fractions: Fractions) -> str:
    """The split of an asset, drawn by the SHA-256 of its name."""
    draw = int.from_bytes(hashlib.sha256(asset.encode()).digest()[:8], "big") / 2**64
    if draw < fractions.test:
        return "test"
    return "val" if draw < fractions.test + fractions.val else "train"


def build(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    names: Sequence[str] | None = None,
    fractions: Fractions | None = None,
    shard_clips: int = 256,
    workers: int = 1,
    beam: Sequence[str] | None = None,
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Writes the data set of a folder of clips.

    The folder gets the files `{split}-{i}-of-{n}.array_record`, `dataset.json`, which is written
    last, and `failures.tsv`. The same call after a stop goes on with the files that are missing;
    equal clips give equal bytes.

    Args:
        source: folder whose subfolders are clips.
        out: the folder of the data set; created.
        names: of the clips to take, such as those that curation kept; all by default.
        fractions: of the splits; by default `Fractions()`.
        shard_clips: at most so many clips a file.
        workers: processes, on this machine.
        beam: options of an Apache Beam pipeline, which then does the work.

    Returns:
        What `dataset.json` says, and the rows of `failures.tsv`.

    Raises:
        FileNotFoundError: there is no such folder, or no clip of such a name in it.
        FileExistsError: `out` holds the data set of other clips or settings.
        ValueError: `shard_clips` is not positive, or no clip could be read.
        RuntimeError: a worker process was killed.
    """
    if shard_clips < 1:
        raise ValueError(f"shard_clips must be at least 1; got {shard_clips}.")
    folders = _folders(Path(source), names)
    shards = _plan(folders, fractions or Fractions(), shard_clips)
    out = Path(out).absolute()
    _claim(out, shards)
    write = functools.partial(_write_shard, out)
    outcomes = bulk.run(write, shards, folder=out / ".records", workers=workers, beam=beam)
    broken = next((outcome for outcome in outcomes if outcome.error is not None), None)
    if broken:
        raise RuntimeError(f"{broken.key.split()[0]} could not be written: {broken.error}")
    failures = sorted(tuple(row) for outcome in outcomes for row in outcome.value["failures"])
    tables.write_table(out / "failures.tsv", FAILURE_COLUMNS, failures)
    index = _describe([outcome.value for outcome in outcomes])
    if not index["splits"]:
        raise ValueError(f"None of {len(folders)} clips can be read; {': '.join(failures[0])}")
    records.write_index(out, index)
    for split in SPLITS:
        entry = index["splits"].get(split, {"clips": 0, "assets": 0})
        _LOGGER.info("%s: %d clips of %d assets.", split, entry["clips"], entry["assets"])
    return index, failures


def _folders(source: Path, names: Sequence[str] | None) -> list[Path]:
    if names is None:
        return pipeline.find_clips(source)
    folders = [source / name for name in names]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(f"There is no clip folder {str(missing[0])!r}.")
    if not folders:
        raise FileNotFoundError("The list of clips is empty.")
    return folders


def _plan(
    folders: Sequence[Path], fractions: Fractions, shard_clips: int
) -> dict[str, dict[str, Any]]:
    """The items of work: by file name and contents, the split and the clips of a file.

    The clips of a split are mixed, so that reading a file from its start is not reading the
    assets one after the other.
    """
    by_split: dict[str, list[Path]] = defaultdict(list)
    for folder in sorted(folders, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        by_split[split_of(records.asset_of(folder), fractions)].append(folder)
    shards = {}
    for split in SPLITS:
        clips = by_split[split]
        count = math.ceil(len(clips) / shard_clips)
        for i in range(count):
            part = clips[i * len(clips) // count : (i + 1) * len(clips) // count]
            file = f"{split}-{i:05d}-of-{count:05d}.array_record"
            digest = hashlib.sha256("".join(bulk.fingerprint(path) for path in part).encode())
            key = f"{file} {records.VERSION} {digest.hexdigest()[:16]}"
            shards[key] = {"file": file, "split": split, "clips": [str(path) for path in part]}
    return shards


def _claim(out: Path, shards: dict[str, Any]) -> None:
    """Notes the plan in the output folder; another one must not be there."""
    plan, wanted = out / ".records" / "plan.json", sorted(shards)
    if (plan.exists() and json.loads(plan.read_text(encoding="utf-8")) != wanted) or (
        not plan.exists() and records.is_dataset(out)
    ):
        raise FileExistsError(
            f"{str(out)!r} holds a data set of other clips or settings; choose another folder or"
            " remove it first."
        )
    plan.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(plan, json.dumps(wanted, indent=1))


def _write_shard(out: Path, shard: dict[str, Any]) -> dict[str, Any]:
    """Writes one file; a clip that cannot be read is left out and named."""
    from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

    target = out / shard["file"]
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    # One record a group, so that reading one reads no other; it is compressed already.
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    assets, shapes, failures = set(), set(), []
    count = 0
    try:
        for path in shard["clips"]:
            try:
                record = records.read_folder(path)
            except (ValueError, OSError) as error:
                failures.append((Path(path).name, " ".join(str(error).split())))
                continue
            writer.write(records.encode(record))
            count += 1
            assets.add(record["asset"])
            shapes.add(next(record[view].shape[:3] for view in records.VIEWS if view in record))
    finally:
        writer.close()
    checksum = records.checksum(partial)
    partial.replace(target)
    return {
        "file": shard["file"],
        "split": shard["split"],
        "clips": count,
        "sha256": checksum,
        "assets": sorted(assets),
        "shapes": sorted(shapes),
        "failures": failures,
    }


def _describe(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `dataset.json` says of files that were written."""
    splits = {}
    for split in SPLITS:
        mine = [file for file in files if file["split"] == split and file["clips"]]
        if mine:
            splits[split] = {
                "clips": sum(file["clips"] for file in mine),
                "assets": len({asset for file in mine for asset in file["assets"]}),
                "files": {
                    file["file"]: {"clips": file["clips"], "sha256": file["sha256"]}
                    for file in mine
                },
            }
    shapes = sorted({tuple(shape) for file in files for shape in file["shapes"]})
    return {"splits": splits, "shapes": [list(shape) for shape in shapes]}
