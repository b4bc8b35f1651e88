"""Records of orbital clips: what a data set consists of, and how it is read.

A record is a dict of these entries; view sets that a clip lacks are left out.

    dynamic, static, front   (t, h, w, 4) uint8: straight colour (0 where transparent), then alpha
    camera                   (t, 4, 4) float32: camera-to-world of the orbit, OpenGL axes
    intrinsics               (t, 3, 3) float32, in pixels
    motion                   float: the magnitude m of Eq. 1 times 100, on white; NaN if unknown
    caption                  string; may be empty
    clip, asset, action      strings: names of the clip, its 3D asset, and that asset's animation
    source, licence          strings: where the asset comes from; may be empty
    dynamic_latents, static_latents   (t, h, w, c): the latents of these views, and further arrays
                             that a prompt encoder made of the clip; see `d4d_jax.data.latents`

A data set is a folder of ArrayRecord files, each record of which is a map in MessagePack: numbers
and strings as they are, arrays as maps of `dtype`, `shape` and `zlib`, the compressed elements. So
`array_record`, `msgpack` and `zlib` are all that reading one needs. `dataset.json` lists the
splits, files, checksums and shapes. `d4d_jax.data.shards` writes it, and `d4d_jax.data.tfds_orbits`
turns it into a TFDS one.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import msgpack
import numpy as np

from d4d_jax import cameras, clips, motion
from d4d_jax.data import tables

#: The entries are described in the module's docstring.
Record = dict[str, Any]

#: Of the layout of the records; `dataset.json` says by which one it was written.
VERSION = "1.0.0"

VIEWS = ("dynamic", "static", "front")
LATENTS = ("dynamic_latents", "static_latents")
ARRAYS = ("camera", "intrinsics")
TEXTS = ("caption", "clip", "asset", "action", "source", "licence")

_INDEX = "dataset.json"


def read_folder(path: str | os.PathLike) -> Record:
    """The record of a clip folder; names come from its `clip.json`, or else from the folder.

    Raises:
        FileNotFoundError, ValueError: as `clips.read_clip`, or the frames have no alpha.
    """
    folder = Path(path)
    record: Record = {}
    for view, frames in clips.read_views(folder).items():
        if frames.shape[-1] != 4:
            raise ValueError(f"{str(folder)!r} lacks the alpha of its {view} frames.")
        pixels = np.round(255 * frames).astype(np.uint8)
        record[view] = pixels * (pixels[..., 3:] > 0)
    num_frames, height, width = next(iter(record.values())).shape[:3]
    orbit = clips.read_orbit(folder, num_frames, width, height)
    record["camera"] = np.asarray(orbit.opengl_camera_to_world, np.float32)
    record["intrinsics"] = np.asarray(orbit.intrinsics, np.float32)
    record["motion"] = _magnitude(record)
    facts = facts_of(folder)
    caption = folder / "caption.txt"
    if caption.exists():
        facts["caption"] = caption.read_text(encoding="utf-8").strip()
    names = {"clip": folder.name, "asset": folder.name, "action": "", **facts}
    return record | {name: str(names.get(name) or "") for name in TEXTS}


def facts_of(path: str | os.PathLike) -> dict[str, Any]:
    """What the `clip.json` of a clip folder says; nothing where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    file = Path(path) / "clip.json"
    if not file.exists():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}).") from error
    return facts


def asset_of(path: str | os.PathLike) -> str:
    """The asset that a clip folder shows: of its `clip.json`, or else the folder's name."""
    return str(facts_of(path).get("asset") or Path(path).name)


def to_clip(record: Record, *, background: clips.Color = clips.WHITE) -> clips.OrbitClip:
    """The clip of a record, on a background."""
    views = {view: record[view].astype(np.float32) / 255 for view in VIEWS if view in record}
    num_frames, height, width = next(iter(views.values())).shape[:3]
    fields: dict[str, Any] = {}
    for view, frames in views.items():
        fields[view] = clips.composite(frames, background)
        fields[f"{view}_alpha"] = frames[..., 3]
    pose = cameras.invert(cameras.opengl_to_opencv(record["camera"]))
    return clips.OrbitClip(
        camera=cameras.Camera(np.asarray(pose), record["intrinsics"], width=width, height=height),
        timestamps=np.linspace(0, 1, num_frames, dtype=np.float32),
        motion=None if math.isnan(record["motion"]) else record["motion"],
        caption=record["caption"],
        background=background,
        **fields,
    )


def encode(record: Record) -> bytes:
    """A record in MessagePack; equal records give equal bytes."""
    data: Any = msgpack.packb({name: _pack(value) for name, value in record.items()})
    return data


def decode(data: bytes, views: Sequence[str] = VIEWS) -> Record:
    """The record of its bytes.

    Args:
        data: by `encode`.
        views: the view sets and latents to decompress, of those that are there.

    Raises:
        ValueError: these are no bytes of a record.
    """
    try:
        entries = msgpack.unpackb(data)
        return {
            name: _unpack(entry)
            for name, entry in entries.items()
            if name not in (*VIEWS, *LATENTS) or name in views
        }
    except (ValueError, TypeError, KeyError, AttributeError, zlib.error) as error:
        raise ValueError(f"{len(data)} bytes are no record of a clip ({error}).") from error


class Records(Sequence[Record]):
    """Random access to the records of a split, decoded when asked for.

    Attributes:
        shapes: the different (t, h, w) that occur.
        latents: what `dataset.json` says of the latents, if they are decoded; else None.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str = "train",
        *,
        views: Sequence[str] = ("dynamic", "static"),
    ):
        """Opens a data set.

        Args:
            path: its folder, of `d4d_jax.data.shards` or of TFDS.
            split: "train", "val" or "test".
            views: the view sets to decode, of those that are there; or `LATENTS`.

        Raises:
            FileNotFoundError: there is no data set.
            ValueError: it has no such split, or is of another version.
        """
        self._path, self._split, self._views = Path(path), split, tuple(views)
        self._source: Any
        self._decode: Callable[[Any], Record]
        self.latents: dict[str, Any] | None = None
        if (self._path / _INDEX).exists():
            index = read_index(path)
            files = _entry(index["splits"], split, path)["files"]
            self._source = grain.sources.ArrayRecordDataSource(
                [str(self._path / name) for name in files]
            )
            self._decode = lambda data: decode(data, self._views)
            self.shapes = [tuple(shape) for shape in index["shapes"]]
            if set(LATENTS) <= set(views):
                if "latents" not in index:
                    raise ValueError(f"{str(path)!r} has no latents: see experiments.encode.")
                self.latents = {**index["latents"], "folder": str(path)}
        elif (self._path / "dataset_info.json").exists():
            from d4d_jax.data import tfds_orbits  # its import takes seconds

            self._source, shape = tfds_orbits.open_split(path, split, self._views)
            self._decode = tfds_orbits.to_record
            self.shapes = [shape]
        else:
            raise FileNotFoundError(
                f"There is no data set in {str(path)!r}: neither {_INDEX} nor dataset_info.json."
            )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self!r} has no clip {index}.")
        return self._decode(self._source[index % len(self)])

    def __repr__(self) -> str:
        return f"Records({self._path.name!r}, {self._split!r}, {len(self)} clips)"


def is_dataset(path: str | os.PathLike) -> bool:
    """Whether a folder holds a data set that `Records` opens."""
    return any((Path(path) / name).exists() for name in (_INDEX, "dataset_info.json"))


def read_index(path: str | os.PathLike) -> dict[str, Any]:
    """What `dataset.json` of a data set says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or was written by another major version.
    """
    file = Path(path) / _INDEX
    if not file.exists():
        raise FileNotFoundError(f"There is no data set in {str(path)!r}: {_INDEX} is missing.")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} does not describe a data set ({error}).") from error
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise ValueError(
            f"{str(path)!r} holds records of version {version}, and this library reads {VERSION};"
            " build it anew from the clips."
        )
    return index


def write_index(path: str | os.PathLike, index: dict[str, Any]) -> None:
    """Writes `dataset.json`, which makes the data set complete."""
    text = json.dumps({"version": VERSION, **index}, indent=1, ensure_ascii=False)
    tables.write_text(Path(path) / _INDEX, text + "\n")


def verify(path: str | os.PathLike) -> int:
    """Compares every file of a data set with its checksum.

    Returns:
        The number of files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file differs from what was written.
    """
    count = 0
    for split in read_index(path)["splits"].values():
        for name, entry in split["files"].items():
            file = Path(path) / name
            if not file.exists():
                raise FileNotFoundError(f"{str(file)!r} is missing from the data set.")
            if checksum(file) != entry["sha256"]:
                raise ValueError(f"{str(file)!r} is damaged: its SHA-256 is not the recorded one.")
            count += 1
    return count


def checksum(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    # The lowest level: for such pictures hardly larger than the highest, and the quickest to read.
    return {
        "dtype": value.dtype.str,
        "shape": value.shape,
        "zlib": zlib.compress(value.tobytes(), 1),
    }


def _unpack(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    data = zlib.decompress(entry["zlib"], bufsize=math.prod(entry["shape"]) + 1)
    return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"])


def _magnitude(record: Record) -> float:
    if not {"dynamic", "static"} <= set(record):
        return math.nan
    pair = (
        2 * clips.composite(record[view].astype(np.float32) / 255, clips.WHITE) - 1
        for view in ("dynamic", "static")
    )
    return float(motion.motion_magnitude(*pair))


def _entry(splits: Mapping[str, Any], split: str, path: str | os.PathLike) -> Any:
    if split not in splits:
        raise ValueError(f"{str(path)!r} has no split {split!r}, only {', '.join(splits)}.")
    return splits[split]
