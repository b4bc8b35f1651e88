"""NeRF-style captures: `transforms_train.json` and its like, as of D-NeRF, Blender, nerfstudio."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gaussians.captures import Capture, Views
from gaussians.datasets import records
from gaussians.datasets.assembly import Shot, assemble, assemble_as_is
from gaussians.datasets.footage import IMAGES, ReadOptions, masked, read_mask, read_picture

_DEFAULTS = ReadOptions()


def read_transforms(folder: str | os.PathLike, options: ReadOptions = _DEFAULTS) -> Capture:
    """Reads a folder of NeRF's layout.

    `transforms_train.json` (or, alone, `transforms.json`) names the frames to fit;
    `transforms_val.json` and `transforms_test.json`, where present, become the held-out sets "val"
    and "test". Each holds `frames`, a list of records with

    - `file_path` from the folder, with or without the suffix (.png, .jpg, ...),
    - `mask_path`, optional, an image that is white where the object is,
    - `transform_matrix`, camera-to-world with OpenGL axes,
    - `time`, in any unit, from the same zero in all files. Absent in all frames means that nothing
      moves.

    The intrinsics, `camera_angle_x` in radians or `fl_x`, `fl_y`, `cx`, `cy` in pixels, stand
    beside the list or in its records, and so do `w` and `h`, if anywhere.

    Raises:
        FileNotFoundError: a file of the capture is missing.
        ValueError: a file cannot be read, or what it says makes no sense; the sentence names it.
    """
    folder = Path(folder)
    train = folder / "transforms_train.json"
    if not train.exists() and (folder / "transforms.json").exists():
        train = folder / "transforms.json"
    sets = {"train": _frames(train)}
    for name in ("val", "test"):
        path = folder / f"transforms_{name}.json"
        if path.exists():
            sets[name] = _frames(path)
    _check_times([frame for frames in sets.values() for frame in frames])
    last, shots = None, {}
    for name, frames in sets.items():
        times = np.array([frame.time or 0.0 for frame in frames])
        chosen = options.choose(times, last)
        if chosen.any():
            shots[name] = [frames[i].shot(options) for i in np.flatnonzero(chosen)]
        last = float(times[chosen].max()) if last is None else last
    return assemble(shots.pop("train"), shots, options, in_seconds=False)


def read_held_out(path: str | os.PathLike, options: ReadOptions = _DEFAULTS) -> Views:
    """Reads one list of views beside a clip, such as `transforms_test.json`.

    The records are those of `read_transforms`, but poses are in the world of the clip already, and
    times are its timestamps. All frames are read, whatever `options.stride` and `limit` say.

    Raises:
        FileNotFoundError: the list or an image is missing.
        ValueError: a file cannot be read, a time is outside [0, 1], or what it says makes no sense.
    """
    frames = _frames(Path(path))
    for frame in frames:
        if not 0 <= (frame.time or 0.0) <= 1:
            raise ValueError(
                f"The time of {frame.name} must lie in [0, 1], the clip's; got {frame.time}."
            )
    return assemble_as_is([frame.shot(options) for frame in frames], options)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A checked record whose image is not read yet."""

    name: str
    path: Path
    record: Mapping[str, Any]
    pose: Float[np.ndarray, "4 4"]
    time: int | float | None
    mask: Path | None

    def shot(self, options: ReadOptions) -> Shot:
        picture = read_picture(self.path, options)
        if self.mask is not None:
            picture = masked(picture, read_mask(self.mask, options), options.background)
        size = picture.width, picture.height
        intrinsics = records.intrinsics_of(self.record, *size, self.name)
        return Shot(picture, self.pose, intrinsics, float(self.time or 0))


def _frames(path: Path) -> list[_Frame]:
    frames: dict[Path, _Frame] = {}
    for i, record in enumerate(records.entries(records.read_json(path), path, ("frames",))):
        name = f"Frame {i} of {str(path)!r}"
        if not isinstance(record.get("file_path"), str):
            raise ValueError(f"{name} has no file_path.")
        image = _find_image(path, record["file_path"])
        if image in frames:
            raise ValueError(f"{str(path)!r} names the frame {record['file_path']!r} twice.")
        time = record.get("time")
        if time is not None and not (isinstance(time, int | float) and math.isfinite(time)):
            raise ValueError(f"The time of {name} must be a finite number; got {time!r}.")
        name = f"{name} ({record['file_path']})"
        mask = record.get("mask_path")
        mask = None if mask is None else _find_image(path, str(mask))
        frames[image] = _Frame(name, image, record, records.pose_of(record, name), time, mask)
    return list(frames.values())


def _find_image(path: Path, file_path: str) -> Path:
    image = path.parent / file_path.replace("\\", "/")
    for candidate in (image, *(Path(f"{image}{suffix}") for suffix in IMAGES)):
        if candidate.is_file():
            return candidate
    tried = "" if image.suffix.lower() in IMAGES else f", with {', '.join(IMAGES)} or without"
    raise FileNotFoundError(f"{str(image)!r}, named by {path.name}, is missing{tried}.")


def _check_times(frames: list[_Frame]) -> None:
    timed = [frame for frame in frames if frame.time is not None]
    if timed and len(timed) < len(frames):
        without = next(frame for frame in frames if frame.time is None)
        raise ValueError(
            f"The frame {str(without.path)!r} has no time, but {str(timed[0].path)!r} has one; give"
            " all frames of all sets a time, or none."
        )
