"""From frames in the world and time of their files to a `Capture`."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from d4d_jax import cameras
from d4d_jax.cameras import Camera
from d4d_jax.typing import Alpha
from gaussians.captures import Capture, Views
from gaussians.datasets import normalisation
from gaussians.datasets.footage import Picture, ReadOptions
from gaussians.types import Splats


@dataclasses.dataclass(frozen=True)
class Shot:
    """One frame as its files describe it.

    Attributes:
        picture: the frame.
        pose: camera-to-world, OpenCV axes, in the world of the files.
        intrinsics: in pixels of the file.
        time: in the unit of the files.
    """

    picture: Picture
    pose: Float[np.ndarray, "4 4"]
    intrinsics: Float[np.ndarray, "3 3"]
    time: float


def assemble(
    moving: list[Shot],
    held_out: Mapping[str, list[Shot]],
    options: ReadOptions,
    *,
    in_seconds: bool,
) -> Capture:
    """Normalises times and world; the lists are emptied on the way, which halves the peak memory.

    The timestamps 0 and 1 are the first and last time of all sets. Frames are put in the order of
    time. When all frames are from one instant the object does not move: they are the moving and the
    still frames at once, at timestamp 0.

    Args:
        moving: the frames to fit, at least one.
        held_out: named frames to judge by.
        options: how frames are read.
        in_seconds: whether the times are in seconds.

    Raises:
        ValueError: the frames of a set differ in size or only some have alpha, or the object
            cannot be located.
    """
    sets = {"dynamic": moving, **held_out}
    times = [shot.time for shots in sets.values() for shot in shots]
    start, duration = min(times), max(times) - min(times)
    stacks = {name: _stack(shots, options) for name, shots in sets.items()}
    first = stacks["dynamic"]
    centre, scale = np.zeros(3), 1.0
    if options.normalise:
        centre, scale = normalisation.locate(first.poses, first.intrinsics, first.alpha)
    views = {
        name: stack.views(centre, scale, start, duration or 1.0) for name, stack in stacks.items()
    }
    fitted = views.pop("dynamic")
    return Capture(
        moving=fitted,
        still=None if duration else fitted,
        held_out=views,
        background=options.background,
        centre=(float(centre[0]), float(centre[1]), float(centre[2])),
        scale=scale,
        seconds=duration if in_seconds and duration else None,
    )


def assemble_as_is(shots: list[Shot], options: ReadOptions) -> Views:
    """Views in the world and time of their files; the list is emptied on the way.

    Raises:
        ValueError: the frames differ in size, or only some have alpha.
    """
    return _stack(shots, options).views(np.zeros(3), 1.0, 0.0, 1.0)


def denormalised(splats: Splats, capture: Capture) -> Splats:
    """Splats of a capture's reconstruction in the world and units of its files."""
    return dataclasses.replace(
        splats,
        means=splats.means / capture.scale + np.asarray(capture.centre, np.float32),
        log_scales=splats.log_scales - float(np.log(capture.scale)),
    )


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The arrays of a set of shots; poses and times are float64."""

    rgb: np.ndarray
    alpha: Alpha | None
    poses: Float[np.ndarray, "v 4 4"]
    intrinsics: Float[np.ndarray, "v 3 3"]
    times: Float[np.ndarray, "v"]

    def views(
        self, centre: Float[np.ndarray, "3"], scale: float, start: float, duration: float
    ) -> Views:
        poses = self.poses.copy()
        poses[:, :3, 3] = (poses[:, :3, 3] - centre) * scale
        height, width = self.rgb.shape[1:3]
        camera = Camera(
            cameras.invert(poses).astype(np.float32), self.intrinsics, width=width, height=height
        )
        times = ((self.times - start) / duration).astype(np.float32)
        return Views(self.rgb, self.alpha, camera, times)


def _stack(shots: list[Shot], options: ReadOptions) -> _Stack:
    """Stacks shots in the order of time, and empties the list."""
    shots.sort(key=lambda shot: shot.time)
    head = shots[0].picture
    shape, count = head.rgb.shape[:2], len(shots)
    rgb = np.empty((count, *shape, 3), np.float32)
    alpha = None if head.alpha is None else np.empty((count, *shape), np.float32)
    poses, intrinsics, times = np.empty((count, 4, 4)), np.empty((count, 3, 3)), np.empty(count)
    for i in reversed(range(count)):  # The frame read last is freed first.
        shot = shots.pop()
        _check_alike(shot.picture, head)
        rgb[i] = shot.picture.rgb
        if alpha is not None:
            alpha[i] = shot.picture.alpha
        file_size = np.array([shot.picture.width, shot.picture.height])
        poses[i], times[i] = shot.pose, shot.time
        intrinsics[i] = shot.intrinsics
        intrinsics[i, :2] *= (np.array(shape[::-1]) / file_size)[:, None]
    if alpha is not None and alpha.min() == 1:
        alpha = None  # An alpha channel that masks nothing tells nothing of the object.
    return _Stack(rgb, alpha, poses, intrinsics.astype(np.float32), times)


def _check_alike(picture: Picture, head: Picture) -> None:
    if picture.rgb.shape != head.rgb.shape:
        raise ValueError(
            f"{picture.name} is {picture.width} x {picture.height} pixels, but {head.name} is"
            f" {head.width} x {head.height}; give a size to resize them to."
        )
    if (picture.alpha is None) != (head.alpha is None):
        names = (head, picture) if picture.alpha is None else (picture, head)
        raise ValueError(
            f"{names[0].name} has an alpha channel and {names[1].name} has none; give all frames"
            " of a set one, or none."
        )
