"""Captures from files: the layouts that others store moving objects in.

- a clip folder with `multi_frame0.png` (`d4d_jax.clips`); a `transforms_test.json` in it adds views
  by further cameras, held out as the set "test" (`read_held_out`),
- `transforms_train.json` and its like, of D-NeRF and Blender (`read_transforms`),
- a folder with `cameras.json` and a video or a folder of images for each camera (`read_multiview`),
- a video and the poses of its one camera (`read_video`).

`read_capture` recognises them. What it returns is in the world and time of this library: the object
around the origin in a unit cube, timestamps from 0 to 1; `Capture.centre`, `Capture.scale` and
`Capture.seconds` lead back, and so does `denormalised` for splats.
"""

import dataclasses
import os
from pathlib import Path

from d4d_jax.clips import WHITE, Color, read_clip
from gaussians.captures import Capture, of_clip
from gaussians.datasets import multiview
from gaussians.datasets.assembly import denormalised
from gaussians.datasets.footage import VIDEOS, ReadOptions
from gaussians.datasets.multiview import read_multiview, read_video
from gaussians.datasets.transforms import read_held_out, read_transforms

__all__ = [
    "ReadOptions",
    "denormalised",
    "find_layout",
    "read_capture",
    "read_held_out",
    "read_multiview",
    "read_transforms",
    "read_video",
]

LAYOUTS = ("clip", "transforms", "multiview", "video")


def read_capture(
    path: str | os.PathLike,
    *,
    background: Color = WHITE,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    limit: int | None = None,
    normalise: bool = True,
    layout: str | None = None,
) -> Capture:
    """Reads a capture of any layout.

    All frames are kept in memory as float32: 200 frames of 800 x 800 take 1.5 GB. `size`, `stride`
    and `limit` save memory while reading, too.

    Args:
        path: a folder, or a video with a cameras file beside it.
        background: colour in [0, 1] on which frames with alpha are composited.
        size: (width, height) to resize to; by default the size of the files.
        stride: reads every so many instants.
        limit: reads at most so many instants, the earliest.
        normalise: moves and scales the world so that the object stands around the origin; a clip
            does so already.
        layout: "clip", "transforms", "multiview" or "video"; by default what `find_layout` says.

    Returns:
        The capture, with numpy arrays.

    Raises:
        FileNotFoundError: a file of the capture is missing.
        ValueError: the layout is unknown or ambiguous, a file cannot be read, or what it says makes
            no sense; the sentence names it.
    """
    path = Path(path)
    options = ReadOptions(background, size, stride, limit, normalise)
    layout = find_layout(path) if layout is None else layout
    if layout == "clip":
        return _read_clip(path, options)
    if layout == "transforms":
        return read_transforms(path, options)
    if layout == "multiview":
        return read_multiview(path, options)
    if layout == "video":
        if path.is_dir():
            return read_video(_only_video(path), path / "cameras.json", options)
        return read_video(path, options=options)
    raise ValueError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.")


def find_layout(path: str | os.PathLike) -> str:
    """The layout of a folder or file: "clip", "transforms", "multiview" or "video".

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it has no known layout, or more than one.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in VIDEOS:
        return "video"
    if not path.exists():
        raise FileNotFoundError(f"There is no capture {str(path)!r}.")
    found = {}
    for layout, names in {
        "clip": ("multi_frame0.png", "multi_static_frame0.png", "front_frame0.png"),
        "transforms": ("transforms_train.json", "transforms.json"),
        "cameras": ("cameras.json",),
    }.items():
        present = [name for name in names if (path / name).is_file()]
        if present:
            found[layout] = present[0]
    if not found:
        raise ValueError(
            f"{str(path)!r} is no capture: it is no video, and no folder with multi_frame0.png,"
            " transforms_train.json, or cameras.json beside videos or folders of frames."
        )
    if len(found) > 1:
        raise ValueError(
            f"{str(path)!r} holds {' and '.join(found.values())}; say which layout to read:"
            f" {', '.join(LAYOUTS)}."
        )
    if "cameras" not in found:
        return next(iter(found))
    return "multiview" if multiview.is_rig(path / "cameras.json") else "video"


def _read_clip(path: Path, options: ReadOptions) -> Capture:
    # Imported here: preparation knows of fields and optimization, which other layouts do without.
    from gaussians.preparation import find_static_time

    clip = read_clip(path, background=options.background, size=options.size)
    capture = of_clip(clip, 0.0 if clip.static is None else find_static_time(clip))
    held_out = {name: views[options.slice] for name, views in capture.held_out.items()}
    if (path / "transforms_test.json").is_file():
        held_out["test"] = read_held_out(path / "transforms_test.json", options)
    return dataclasses.replace(capture, moving=capture.moving[options.slice], held_out=held_out)


def _only_video(folder: Path) -> Path:
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if len(videos) != 1:
        found = f"{len(videos)} videos" if videos else "no video"
        raise ValueError(
            f"{str(folder)!r} has {found} beside a cameras.json without camera names; it needs one"
            " video, or a name for every camera."
        )
    return videos[0]
