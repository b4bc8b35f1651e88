"""What a rendering is made of, as far as it can be said without Blender.

Views and their file names, camera poses, times, cameras as JSON, the draws of one clip, lists of
further views, and which animations of an asset are meant. Standard library only: `blender.py` reads
this in Blender's own Python.
"""

import dataclasses
import json
import math
import random
from pathlib import Path

LENS_MM = 50.0
SENSOR_MM = 36.0
FOV = 2.0 * math.atan(SENSOR_MM / (2.0 * LENS_MM))  # 0.6911112 rad on both axes
DISTANCE = 2.0
MAX_DEPTH = 5.0
FORMAT_VERSION = 6

#: Sun lamps without shadow: name, Euler XYZ in radians, energy in W/m^2 (the middle of the three
#: whole numbers of which the published renderer draws one).
LIGHTS = (
    ("key", (0.785398, 0.0, -0.785398), 4),
    ("fill", (0.785398, 0.0, 2.356194), 3),
    ("rim", (-0.785398, 0.0, -3.926991), 4),
    ("bottom", (math.pi, 0.0, 0.0), 2),
)
PASSES = ("depth", "mask")


@dataclasses.dataclass(frozen=True)
class View:
    """A set of frames: where they are looked at from, and what their files are called.

    Attributes:
        frame: file name of frame i.
        camera: file name of its camera; of the only one when `quarter` is set.
        moves: whether time goes on, or stands at the first frame of the action.
        quarter: None goes round the object; else one camera, that many quarter turns from view 0.
    """

    frame: str
    camera: str
    moves: bool = True
    quarter: int | None = None


VIEWS = {
    "dynamic": View("multi_frame{}.png", "multi{}.json"),
    "static": View("multi_static_frame{}.png", "static{}.json", moves=False),
    "front": View("front_frame{}.png", "front.json", quarter=0),
    "right": View("right_frame{}.png", "right.json", quarter=1),
    "back": View("back_frame{}.png", "back.json", quarter=2),
    "left": View("left_frame{}.png", "left.json", quarter=3),
}
#: The views of the published data.
PUBLISHED = ("dynamic", "static", "front")


class RenderError(Exception):
    """A mistake of the user; its message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """What differs from clip to clip.

    Attributes:
        azimuth: of view 0 in radians.
        elevation: of the orbits, in radians.
        fixed_elevation: of the fixed views, in radians.
        energies: of the lamps in W/m^2.
    """

    azimuth: float
    elevation: float
    fixed_elevation: float
    energies: tuple[int, ...]


def draw(
    seed, asset, action, *, elevation=(0.0, 0.0), azimuth=0.0, any_azimuth=False, compat=False
):
    """The draws of one clip, which depend on the seed and the names, not on other clips.

    Args:
        seed: any number.
        asset: its name in the list of assets.
        action: the animation's.
        elevation: lowest and highest, in degrees; drawn evenly between them.
        azimuth: of view 0 in degrees, counter-clockwise seen from above.
        any_azimuth: whether to draw it from the whole circle instead.
        compat: as the published renderer does: the elevation is atan(whole degrees / 180), and 0
            in the fixed views; the azimuth is rounded to hundredths of a turn; the energies of the
            lamps are drawn.
    """
    chance = random.Random(f"{seed}\n{asset}\n{action}")
    # All are drawn, used or not, so that one option does not change the draws of another.
    degrees, turn = chance.uniform(*elevation), chance.random()
    energies = tuple(chance.randint(energy - 1, energy + 1) for _, _, energy in LIGHTS)
    turn = turn if any_azimuth else azimuth / 360.0
    if compat:
        angle = math.atan(round(degrees) / 180.0)
        return Draw(2.0 * math.pi * round(turn, 2), angle, 0.0, energies)
    angle = math.radians(degrees)
    return Draw(2.0 * math.pi * turn, angle, angle, tuple(energy for _, _, energy in LIGHTS))


def camera_to_world(view, num_views, elevation=0.0, azimuth=0.0, distance=DISTANCE):
    """Pose of one view of the orbit as nested lists (4, 4), OpenGL axes, angles in radians.

    View `i` of `n` looks at the origin from azimuth + 2 pi i / (n - 1): view 0 from (0, -d, 0),
    then counter-clockwise seen from above (+z), and the last view is the first again.
    """
    turn = azimuth + 2.0 * math.pi * view / max(num_views - 1, 1)
    sin_a, cos_a = math.sin(turn), math.cos(turn)
    sin_e, cos_e = math.sin(elevation), math.cos(elevation)
    right = (cos_a, sin_a, 0.0)
    up = (-sin_a * sin_e, cos_a * sin_e, cos_e)
    back = (sin_a * cos_e, -cos_a * cos_e, sin_e)
    rows = [[right[k], up[k], back[k], distance * back[k]] for k in range(3)]
    return [*rows, [0.0, 0.0, 0.0, 1.0]]


def view_pose(view, i, num_frames, drawn):
    """Pose of frame i of a `View`."""
    if view.quarter is None:
        return camera_to_world(i, num_frames, drawn.elevation, drawn.azimuth)
    azimuth = drawn.azimuth + view.quarter * math.pi / 2.0
    return camera_to_world(0, num_frames, drawn.fixed_elevation, azimuth)


def resample_frames(start, end, count, *, closed=True, compat=False):
    """The times of `count` frames of an action as (whole frame, fraction in [0, 1)).

    Args:
        start: first frame of the action, at 24 a second.
        end: its last.
        count: of frames wanted.
        closed: the last is `end`, so that a looping action closes as the orbit does. Otherwise
            the steps are (end - start) / count: what a looping action shows once.
        compat: frame after frame from `start` instead, as published, whatever the length.
    """
    steps = max(count - 1, 1) if closed else count
    step = 1.0 if compat else (end - start) / steps
    times = []
    for i in range(count):
        exact = closed and not compat and count > 1 and i == count - 1
        time = end if exact else start + i * step
        whole = math.floor(time + 1e-6)
        times.append((whole, max(time - whole, 0.0)))
    return times


def camera_json(pose, bbox):
    """The published per-view camera record: pose in Blender axes plus its OpenCV axes."""
    column = [[pose[row][k] for row in range(3)] for k in range(4)]
    return {
        "matrix_world": pose,
        "format_version": FORMAT_VERSION,
        "max_depth": MAX_DEPTH,
        "bbox": bbox,
        "origin": column[3],
        "x_fov": FOV,
        "y_fov": FOV,
        "x": column[0],
        "y": [-value for value in column[1]],
        "z": [-value for value in column[2]],
    }


def pass_name(frame, name):
    """The file of a pass: `multi_frame3.png` -> `multi_depth3.png`, `r_0.png` -> `r_0_mask.png`."""
    stem, middle, rest = frame.rpartition("frame")
    if middle:
        return f"{stem}{name}{rest}"
    stem, dot, suffix = frame.rpartition(".")
    return f"{stem}_{name}{dot}{suffix}"


def read_transforms(path):
    """The further views of a D-NeRF list: horizontal field of view, and the frames.

    Raises RenderError unless every frame has a relative `file_path`, a `time` in [0, 1] and a
    `transform_matrix` of 4 x 4 numbers.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        angle = float(record["camera_angle_x"])
        frames = [
            (str(frame["file_path"]), float(frame["time"]), frame["transform_matrix"])
            for frame in record["frames"]
        ]
    except OSError as error:
        raise RenderError(f"--transforms={path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RenderError(f"{path} is no list of views: {error!r}.") from error
    for name, time, pose in frames:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        square = [len(row) for row in pose] == [4] * 4
        if not (inside and 0.0 <= time <= 1.0 and square):
            raise RenderError(
                f"Frame {name!r} of {path} needs a path within the folder, a time in [0, 1] and a"
                f" pose of 4 x 4; its time is {time:g}."
            )
    return angle, frames


def pick_action(names, wanted):
    """Resolve `wanted` among the animation names: exactly, or by its last `|` part if unique."""
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise RenderError(f"--action is missing; the asset has {', '.join(sorted(names))}.")
    if wanted in names:
        return wanted
    tails = [name for name in names if name.rsplit("|", 1)[-1] == wanted]
    if len(tails) == 1:
        return tails[0]
    raise RenderError(
        f"The asset has no animation named {wanted!r}; it has {', '.join(sorted(names))}."
    )


def choose_actions(names, wanted=(), *, at_most=0, seed=0, asset=""):
    """The animations to render, in the order of the file: (name, None) or (wanted, why not).

    Args:
        names: that the asset has.
        wanted: as for `pick_action`; empty means all.
        at_most: draws so many of them; 0 keeps all.
        seed: of that draw, together with the asset's name.
        asset: the asset's name.
    """
    chosen, missing = set(names) if not wanted else set(), []
    for name in wanted:
        try:
            chosen.add(pick_action(names, name))
        except RenderError as error:
            missing.append((name, str(error)))
    if 0 < at_most < len(chosen):
        chosen = set(random.Random(f"{seed}\n{asset}").sample(sorted(chosen), at_most))
    return [(name, None) for name in names if name in chosen] + missing
