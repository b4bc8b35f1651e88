"""Captures by one or several cameras with a `cameras.json`: videos, or folders of frames."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gaussians.captures import Capture
from gaussians.datasets import records
from gaussians.datasets.assembly import Shot, assemble
from gaussians.datasets.footage import VIDEOS, Picture, ReadOptions, masked_sequence, read_sequence

_DEFAULTS = ReadOptions()

#: Names that the frames to fit go by.
_RESERVED = ("dynamic", "static")


def read_multiview(folder: str | os.PathLike, options: ReadOptions = _DEFAULTS) -> Capture:
    """Reads a folder in which several resting cameras see every instant.

        cameras.json
        cam00.mp4             a video (.mp4, .webm, .mov, .mkv, .avi, .gif), or
        cam01/0000.png ...    a folder of evenly numbered images for each camera
        masks/cam00.mp4       optional, likewise for each camera: white where the object is

    `cameras.json` holds

        {"fps": 24,
         "convention": "opencv",
         "held_out": ["cam01"],
         "cameras": [{"name": "cam00", "fx": 500, "fy": 500, "cx": 320, "cy": 240,
                      "width": 640, "height": 480, "camera_to_world": [[...], ...]}, ...]}

    with poses and intrinsics as in `records.pose_of` and `records.intrinsics_of`; fields beside the
    list hold for all cameras that do not say otherwise. `times`, a rising list in seconds, may
    replace `fps`; without both, videos tell their own rate, and images leave the seconds unknown.
    Frame i of all cameras shows the same instant. Every camera of `held_out` becomes a held-out set
    of its name.

    Raises:
        FileNotFoundError: a file of the capture is missing.
        ValueError: a file cannot be read, or what it says makes no sense; the sentence names it.
    """
    path = Path(folder) / "cameras.json"
    document = records.read_json(path)
    rig = _rig(records.entries(document, path, ("cameras",)), path)
    document = document if isinstance(document, Mapping) else {}
    held = _held_out(document, rig, path)
    poses = {name: records.pose_of(record, f"Camera {name!r}") for name, record in rig.items()}
    sources = {name: _source(path.parent, name) for name in rig}
    pictures, counts, rates = {}, {}, {}
    for name, source in sources.items():
        pictures[name], counts[name], rate = read_sequence(source, options)
        if rate is not None:
            rates[name] = rate
        pictures[name] = _with_masks(pictures[name], counts[name], path.parent, name, options)
        _check_equal(counts, "frames", "all cameras need one for every instant")
    if not {"fps", "times"} & set(document):
        _check_equal(rates, "frames per second", 'say which holds with "fps" or "times"')
    count, rate = next(iter(counts.values())), next(iter(rates.values()), None)
    times, in_seconds = _times(document, count, rate, path)
    sets: dict[str, list[Shot]] = {"dynamic": [], **{name: [] for name in held}}
    for name, record in rig.items():
        cards, where = [record] * count, [poses[name]] * count
        shots = _shots(
            pictures.pop(name), cards, where, times, [f"Camera {name!r}"] * count, options
        )
        sets[name if name in held else "dynamic"] += shots
    return assemble(sets.pop("dynamic"), sets, options, in_seconds=in_seconds)


def read_video(
    video: str | os.PathLike,
    cameras: str | os.PathLike | None = None,
    options: ReadOptions = _DEFAULTS,
) -> Capture:
    """Reads the video of one camera, which may move.

    The cameras file is as for `read_multiview`, without names: its list (`cameras` or `frames`)
    holds one record for every frame of the video, or a single one for all of them. The masks of
    `clip.mp4`, if any, are `masks/clip.mp4` or the images in `masks/clip/`.

    Args:
        video: the file, or a folder of numbered images.
        cameras: the JSON file; by default the one beside the video with its name (`clip.json` for
            `clip.mp4`), or else `cameras.json`.
        options: how frames are read.

    Raises:
        FileNotFoundError: the video or the cameras file is missing.
        ValueError: a file cannot be read, or what it says makes no sense; the sentence names it.
    """
    video = Path(video)
    path = _cameras_beside(video) if cameras is None else Path(cameras)
    document = records.read_json(path)
    cards = records.entries(document, path, ("cameras", "frames"))
    document = document if isinstance(document, Mapping) else {}
    names = [f"Camera {i} in {str(path)!r}" for i in range(len(cards))]
    poses = [records.pose_of(card, name) for card, name in zip(cards, names, strict=True)]
    pictures, count, fps = read_sequence(video, options)
    if len(cards) not in (1, count):
        raise ValueError(
            f"{str(path)!r} has {len(cards)} cameras, but {str(video)!r} has {count} frames; give"
            " one camera for every frame, or a single one."
        )
    pictures = _with_masks(pictures, count, video.parent, video.stem, options)
    times, in_seconds = _times(document, count, fps, path)
    each = count // len(cards)
    shots = _shots(pictures, cards * each, poses * each, times, names * each, options)
    del pictures  # `assemble` frees the frames one by one.
    return assemble(shots, {}, options, in_seconds=in_seconds)


def is_rig(path: Path) -> bool:
    """Whether a cameras file names its cameras, as that of several does."""
    cards = records.entries(records.read_json(path), path, ("cameras", "frames"))
    return any("name" in card for card in cards)


def _rig(cards: list[dict[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    rig = {}
    for i, card in enumerate(cards):
        name = card.get("name")
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(
                f"Camera {i} in {str(path)!r} needs a name, that of its video or folder; got"
                f" {name!r}."
            )
        if name in rig:
            raise ValueError(f"{str(path)!r} has two cameras with the name {name!r}.")
        rig[name] = card
    return rig


def _held_out(document: Mapping[str, Any], rig: Mapping[str, Any], path: Path) -> list[str]:
    held = document.get("held_out", [])
    if not isinstance(held, list):
        raise ValueError(f"held_out in {str(path)!r} must be a list of names; got {held!r}.")
    unknown = [name for name in held if name not in rig]
    if unknown:
        raise ValueError(
            f"held_out in {str(path)!r} names {unknown[0]!r}, but the cameras are {', '.join(rig)}."
        )
    reserved = [name for name in held if name in _RESERVED]
    if reserved:
        raise ValueError(
            f"The held-out camera {reserved[0]!r} in {str(path)!r} needs another name: that one is"
            " for frames that are fitted."
        )
    if len(set(held)) == len(rig):
        raise ValueError(f"held_out in {str(path)!r} leaves no camera to fit.")
    return held


def _with_masks(
    pictures: list[Picture], count: int, folder: Path, name: str, options: ReadOptions
) -> list[Picture]:
    """Frames with their masks, where the capture has a folder of masks."""
    if not (folder / "masks").is_dir():
        return pictures
    return masked_sequence(pictures, count, _source(folder / "masks", name), options)


def _source(folder: Path, name: str) -> Path:
    """The folder or the video of a camera."""
    found = [folder / name] if (folder / name).is_dir() else []
    found += [path for suffix in VIDEOS if (path := folder / f"{name}{suffix}").is_file()]
    if not found:
        raise FileNotFoundError(
            f"The frames of camera {name!r} are missing: {str(folder)!r} has neither a folder"
            f" {name} nor a video {name}.mp4 ({', '.join(VIDEOS[1:])})."
        )
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ValueError(f"Camera {name!r} has both {names} in {str(folder)!r}; keep one.")
    return found[0]


def _cameras_beside(video: Path) -> Path:
    for path in (video.with_suffix(".json"), video.parent / "cameras.json"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"The video {str(video)!r} has no cameras: put {video.with_suffix('.json').name} or"
        " cameras.json beside it."
    )


def _shots(
    pictures: list[Picture],
    cards: list[dict[str, Any]],
    poses: list[Float[np.ndarray, "4 4"]],
    times: Float[np.ndarray, "n"],
    names: list[str],
    options: ReadOptions,
) -> list[Shot]:
    """The chosen frames with their cameras; the other lists are of all frames."""
    shots = []
    for i, picture in zip(range(len(times))[options.slice], pictures, strict=True):
        size = picture.width, picture.height
        intrinsics = records.intrinsics_of(cards[i], *size, names[i])
        shots.append(Shot(picture, poses[i], intrinsics, float(times[i])))
    return shots


def _times(
    document: Mapping[str, Any], count: int, fps: float | None, path: Path
) -> tuple[Float[np.ndarray, "n"], bool]:
    """When the frames were taken, and whether that is in seconds."""
    times = document.get("times")
    if times is not None:
        try:
            array = np.asarray(times, float)
        except (TypeError, ValueError):
            array = np.zeros(0)
        if array.shape != (count,):
            raise ValueError(
                f"times in {str(path)!r} must be one number for each of the {count} frames."
            )
        if not np.isfinite(array).all() or (np.diff(array) <= 0).any():
            wrong = 1 + int(np.argmax(~(np.diff(array) > 0)))
            raise ValueError(
                f"times in {str(path)!r} must rise from frame to frame; number {wrong} is"
                f" {times[wrong]} after {times[wrong - 1]}."
            )
        return array, True
    fps = document.get("fps", fps)
    if fps is None:
        return np.arange(count, dtype=float), False
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise ValueError(f"fps in {str(path)!r} must be above 0; got {fps!r}.")
    return np.arange(count) / fps, True


def _check_equal(values: Mapping[str, int | float], what: str, remedy: str) -> None:
    """Raises when a camera differs from the first."""
    for name, value in values.items():
        first, expected = next(iter(values.items()))
        if not math.isclose(value, expected, rel_tol=1e-3):
            raise ValueError(
                f"Camera {first!r} has {expected:g} {what}, but {name!r} has {value:g}; {remedy}."
            )
