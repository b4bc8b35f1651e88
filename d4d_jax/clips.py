"""OrbitClip, the value that passes between the parts, and the folder layout it is stored in.

A clip folder holds, as published by Diffusion4D: `multi_frame{i}.png` (the dynamic orbit, view and
time change together), `multi_static_frame{i}.png` (the same cameras, the object frozen at t = 0),
`front_frame{i}.png` (the first camera, all timestamps), and optionally the cameras `multi{i}.json`,
`static{i}.json` and `front.json`. Without camera files the standard orbit is assumed
(`d4d_jax.cameras.orbit`). We add an optional `caption.txt`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from d4d_jax import cameras, motion, pytree
from d4d_jax.cameras import Camera
from d4d_jax.typing import Alpha, AnyArray, Frames

#: What PIL raises for files that are no images, are cut short, or claim to be enormous.
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
)

Color = tuple[float, float, float]

WHITE: Color = (1.0, 1.0, 1.0)

#: File name stem of the frames and of the camera files of every view set.
_STEMS = {
    "dynamic": ("multi_frame", "multi"),
    "static": ("multi_static_frame", "static"),
    "front": ("front_frame", "front"),
}


@pytree.dataclass
class OrbitClip:
    """An orbital video of a moving object, with what is known about it.

    Attributes:
        camera: the orbit, leading axis t; static and dynamic frame i share camera i.
        timestamps: (t,) in [0, 1], of the dynamic and front frames. Static frames are at 0.
        dynamic: (t, h, w, 3) in [0, 1] on `background`, or None.
        static: likewise, the object frozen at timestamp 0.
        front: likewise, all timestamps seen from camera 0.
        dynamic_alpha, static_alpha, front_alpha: (t, h, w) in [0, 1], or None where the frames
            carry no alpha channel.
        motion: the motion magnitude m of Eq. 1 (`d4d_jax.motion`), or None when unknown.
        caption: what the clip shows; may be empty.
        background: the colour the frames are composited on.
    """

    camera: Camera
    timestamps: AnyArray
    dynamic: Frames | None = None
    static: Frames | None = None
    front: Frames | None = None
    dynamic_alpha: Alpha | None = None
    static_alpha: Alpha | None = None
    front_alpha: Alpha | None = None
    motion: float | AnyArray | None = None
    caption: str = pytree.static(default="")
    background: Color = pytree.static(default=WHITE)

    @property
    def num_frames(self) -> int:
        """The number T of timestamps."""
        return self.timestamps.shape[0]

    def resized(self, width: int, height: int) -> "OrbitClip":
        """The same clip at another resolution (area averaging when shrinking)."""
        changes: dict[str, Any] = {"camera": self.camera.resized(width, height)}
        for view in _STEMS:
            frames, alpha = getattr(self, view), getattr(self, f"{view}_alpha")
            if frames is not None:
                changes[view] = resize(frames, width, height)
            if alpha is not None:
                changes[f"{view}_alpha"] = resize(np.asarray(alpha)[..., None], width, height)[
                    ..., 0
                ]
        return dataclasses.replace(self, **changes)


def standard_clip(num_frames: int, width: int, height: int, **fields) -> OrbitClip:
    """A clip on the standard orbit with evenly spaced timestamps; `fields` are OrbitClip's."""
    return OrbitClip(
        camera=cameras.orbit(num_frames, width=width, height=height),
        timestamps=np.linspace(0, 1, num_frames, dtype=np.float32),
        **fields,
    )


def read_clip(
    path: str | os.PathLike,
    *,
    background: Color = WHITE,
    size: tuple[int, int] | None = None,
) -> OrbitClip:
    """Reads a clip folder.

    Args:
        path: the folder.
        background: colour in [0, 1] on which frames with alpha are composited.
        size: (width, height) to resize to; by default the size of the files.

    Returns:
        The clip, with numpy arrays. `motion` is set when dynamic and static frames are present; as
        defined by the paper it is taken on white, whatever the background.

    Raises:
        FileNotFoundError: the folder, or a frame or camera in the middle of a sequence, is missing.
        ValueError: a file cannot be decoded, or the sizes or numbers of frames differ. Every error
            names the file.
    """
    folder = Path(path)
    views = read_views(folder)
    num_frames, height, width = next(iter(views.values())).shape[:3]
    fields = {}
    for view, rgba in views.items():
        fields[view] = composite(rgba, background)
        if rgba.shape[-1] == 4:
            fields[f"{view}_alpha"] = rgba[..., 3]
    if "dynamic" in views and "static" in views:
        pair = (2 * composite(views[view], WHITE) - 1 for view in ("dynamic", "static"))
        fields["motion"] = float(motion.motion_magnitude(*pair))
    caption = folder / "caption.txt"
    clip = OrbitClip(
        camera=read_orbit(folder, num_frames, width, height),
        timestamps=np.linspace(0, 1, num_frames, dtype=np.float32),
        caption=caption.read_text(encoding="utf-8").strip() if caption.exists() else "",
        background=background,
        **fields,
    )
    return clip if size is None else clip.resized(*size)


def read_views(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the frames of a clip folder as they are stored.

    Returns:
        By the name of the view set ("dynamic", "static", "front"), those that are there:
        (t, h, w, 3 or 4) float32 in [0, 1], straight colour and, where the files have it, alpha.

    Raises:
        FileNotFoundError, ValueError: as `read_clip`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no clip folder {str(folder)!r}.")
    views = {view: _read_frames(folder, stem) for view, (stem, _) in _STEMS.items()}
    views = {view: rgba for view, rgba in views.items() if rgba is not None}
    if not views:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no clip: it has neither multi_frame0.png,"
            " multi_static_frame0.png nor front_frame0.png."
        )
    shapes = {view: rgba.shape[:3] for view, rgba in views.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{n} {view} frames of {w} x {h}" for view, (n, h, w) in shapes.items())
        raise ValueError(
            f"All view sets of a clip need the same length and size; {str(folder)!r} has {found}."
        )
    num_frames = next(iter(shapes.values()))[0]
    if num_frames < 2:
        raise ValueError(f"A clip needs at least 2 frames; {str(folder)!r} has {num_frames}.")
    return views


def read_orbit(folder: str | os.PathLike, num_frames: int, width: int, height: int) -> Camera:
    """The cameras of a clip folder's orbit, without its frames.

    They are those of the dynamic orbit, or else of the static one, or else the standard orbit.

    Raises:
        FileNotFoundError, ValueError: as `read_clip`.
    """
    folder = Path(folder)
    for view in ("dynamic", "static"):
        stem = _STEMS[view][1]
        if not _indices(folder, stem, "json"):
            continue
        paths = [folder / f"{stem}{i}.json" for i in range(num_frames)]
        return cameras.stack([_read_camera(path, width, height) for path in paths])
    return cameras.orbit(num_frames, width=width, height=height)


def composite(rgba: np.ndarray, background: Color) -> np.ndarray:
    """(..., 3 or 4) in [0, 1] with straight colour to (..., 3) on a background; RGB is returned."""
    if rgba.shape[-1] == 3:
        return rgba
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (1 - alpha) * np.asarray(background, np.float32)


def write_clip(clip: OrbitClip, path: str | os.PathLike) -> None:
    """Writes a clip folder: frames (RGBA with straight colour where alpha is known) and cameras.

    Reading it back on the same background gives the same frames up to the 8-bit rounding of PNG.
    The layout has no place for principal points off the centre, uneven timestamps and a motion
    magnitude that differs from that of the frames.

    Raises:
        FileExistsError: the folder already holds frames of a clip; nothing is overwritten.
    """
    folder = Path(path)
    for stem, _ in _STEMS.values():
        if (folder / f"{stem}0.png").exists():
            raise FileExistsError(
                f"{str(folder)!r} already holds a clip; choose an empty folder or remove it first."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for view, (stem, camera_stem) in _STEMS.items():
        frames, alpha = getattr(clip, view), getattr(clip, f"{view}_alpha")
        if frames is None:
            continue
        rgba = _uncomposite(np.asarray(frames), alpha, clip.background)
        for i, image in enumerate(np.round(255 * rgba).astype(np.uint8)):
            Image.fromarray(image).save(folder / f"{stem}{i}.png", optimize=True)
        for i in range(1 if view == "front" else clip.num_frames):
            name = "front.json" if view == "front" else f"{camera_stem}{i}.json"
            record = json.dumps(cameras.to_json(clip.camera[i]), indent=1)
            (folder / name).write_text(record, encoding="utf-8")
    if clip.caption:
        (folder / "caption.txt").write_text(clip.caption + "\n", encoding="utf-8")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads an image file as (h, w, 3 or 4) float32 in [0, 1]; the fourth channel is alpha.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or no image.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits
                grey = np.asarray(file, np.float32) / 65535
                return np.repeat(grey[..., None], 3, axis=-1)
            has_alpha = "A" in file.getbands() or "transparency" in file.info
            return np.asarray(file.convert("RGBA" if has_alpha else "RGB"), np.float32) / 255
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no image {str(path)!r}.") from None
    except _UNREADABLE as error:
        raise ValueError(
            f"{str(path)!r} cannot be decoded ({error}); it may be truncated or no image."
        ) from error


def _read_frames(folder: Path, stem: str) -> np.ndarray | None:
    """(t, h, w, 3 or 4) in [0, 1], or None when the folder has no such frames."""
    indices = _indices(folder, stem, "png")
    if not indices:
        return None
    for i in range(indices[-1] + 1):
        if not (folder / f"{stem}{i}.png").exists():
            raise FileNotFoundError(
                f"{str(folder / f'{stem}{i}.png')!r} is missing, although {stem}{indices[-1]}.png"
                " is there; frames must be numbered from 0 without gaps."
            )
    frames = []
    for i in indices:
        image = read_image(folder / f"{stem}{i}.png")
        if frames and image.shape != frames[0].shape:
            raise ValueError(
                f"{str(folder / f'{stem}{i}.png')!r} is {_describe(image)}, but {stem}0.png is"
                f" {_describe(frames[0])}."
            )
        frames.append(image)
    return np.stack(frames)


def _read_camera(path: Path, width: int, height: int) -> Camera:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds {record!r} instead of a camera's fields.")
        return cameras.from_json(record, width, height)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The camera file {str(path)!r} is missing; give one for every frame or none at all."
        ) from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no camera file: {error}") from error


def _indices(folder: Path, stem: str, suffix: str) -> Sequence[int]:
    """The sorted numbers i for which `{stem}{i}.{suffix}` exists."""
    matches = (re.fullmatch(rf"{stem}(\d+)\.{suffix}", name) for name in os.listdir(folder))
    return sorted(int(match.group(1)) for match in matches if match)


def _uncomposite(rgb: np.ndarray, alpha: AnyArray | None, background: Color) -> np.ndarray:
    """Straight RGBA whose compositing on `background` gives `rgb`; RGB alone without alpha."""
    if alpha is None:
        return np.clip(rgb, 0, 1)
    weight = np.asarray(alpha)[..., None]
    foreground = rgb - (1 - weight) * np.asarray(background, np.float32)
    color = np.where(weight > 0, foreground / np.maximum(weight, 1e-6), 0)
    return np.clip(np.concatenate([color, weight], -1), 0, 1)


def resize(frames: Frames, width: int, height: int) -> np.ndarray:
    """Resizes (t, h, w, c): box filter where the image shrinks, bilinear where it grows."""
    frames = np.asarray(frames, np.float32)
    shrinks = width <= frames.shape[2] and height <= frames.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    channels = np.moveaxis(frames, -1, 1).reshape(-1, *frames.shape[1:3])
    resized = [np.asarray(Image.fromarray(c).resize((width, height), method)) for c in channels]
    return np.moveaxis(
        np.stack(resized).reshape(len(frames), frames.shape[-1], height, width), 1, -1
    )


def _describe(image: np.ndarray) -> str:
    height, width, channels = image.shape
    return f"{width} x {height} {'RGBA' if channels == 4 else 'RGB'}"
