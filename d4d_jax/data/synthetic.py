"""Procedural orbital clips: a few coloured ellipsoids, one of them moving, ray-cast exactly.

They serve tests and demos, where a rendered asset would be slow or unknown: every pixel follows
from a scene of a dozen numbers, from any camera and at any time. No part of a scene mirrors
another, so that a flipped axis or a reversed orbit changes the picture.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from d4d_jax import cameras, clips
from d4d_jax.typing import AnyArray

#: Direction to the light and the share of a colour that unlit surfaces keep.
_LIGHT = np.array([0.4, -0.7, 0.6], np.float32) / np.linalg.norm([0.4, -0.7, 0.6])
_AMBIENT = 0.45

# The figure before the seed varies it: body (long in y), head (front, raised), arm (on +x only,
# the part that moves), foot (back, low, on -x). Centres, half-axes, travel; world units.
_CENTRES = np.array([[0, 0, -0.05], [0, -0.27, 0.2], [0.3, 0.02, 0], [-0.18, 0.22, -0.3]])
_HALF_AXES = np.array([[0.2, 0.3, 0.2], [0.13, 0.13, 0.15], [0.12, 0.09, 0.1], [0.1, 0.16, 0.08]])
_TRAVEL = np.array([[0, 0, 0], [0, 0, 0], [0.06, -0.15, 0.28], [0, 0, 0]])
_COLOURS = np.array([[0.9, 0.75, 0.2], [0.85, 0.2, 0.2], [0.15, 0.35, 0.9], [0.15, 0.65, 0.3]])


@dataclasses.dataclass(frozen=True)
class Scene:
    """Axis-aligned ellipsoids. At time t in [0, 1] each stands at `centres + travel * s(t)`,
    where s(t) = (1 - cos 2 pi t) / 2 leaves 0, reaches 1 half-way and comes back.

    Attributes:
        centres: (n, 3) at t = 0, world units, inside the unit cube with all of the travel.
        half_axes: (n, 3).
        travel: (n, 3) displacement half-way through the clip; zero rows stand still.
        colours: (n, 3) in [0, 1].
    """

    centres: Float[np.ndarray, "n 3"]
    half_axes: Float[np.ndarray, "n 3"]
    travel: Float[np.ndarray, "n 3"]
    colours: Float[np.ndarray, "n 3"]

    def centres_at(self, time: float) -> Float[np.ndarray, "n 3"]:
        """Where the ellipsoids stand at `time` in [0, 1]."""
        swing = 0.5 - 0.5 * np.cos(2 * np.pi * time)
        return (self.centres + swing * self.travel).astype(np.float32)


def make_scene(seed: int = 0, *, motion: float = 1.0) -> Scene:
    """The figure with its proportions and colours varied by `seed` (0 leaves it as drawn).

    Args:
        seed: any integer.
        motion: factor on the travel of the moving part; 0 makes a static scene. Beyond 1 the
            figure may leave the unit cube.
    """
    rng = np.random.default_rng(seed)
    amount = 0.0 if seed == 0 else 1.0
    stretch = 1 + amount * rng.uniform(-0.2, 0.2, (4, 3))
    colours = np.clip(_COLOURS + amount * rng.uniform(-0.3, 0.3, (4, 3)), 0.05, 0.95)
    if seed != 0:
        colours = colours[rng.permutation(4)]
    return Scene(
        centres=(_CENTRES + amount * rng.uniform(-0.03, 0.03, (4, 3))).astype(np.float32),
        half_axes=(_HALF_AXES * stretch).astype(np.float32),
        travel=(motion * _TRAVEL * (1 + amount * rng.uniform(-0.3, 0))).astype(np.float32),
        colours=colours.astype(np.float32),
    )


def render(
    scene: Scene,
    camera: cameras.Camera,
    timestamps: Float[AnyArray, "t"],
    *,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    samples: int = 2,
) -> tuple[Float[np.ndarray, "t h w 3"], Float[np.ndarray, "t h w"]]:
    """Ray-casts the scene from `t` cameras at `t` times: any held-out view at any time.

    Args:
        scene: what to draw.
        camera: `t` cameras along the leading axis.
        timestamps: in [0, 1], one for each camera.
        background: the colour behind the object, in [0, 1].
        samples: rays a pixel and axis, averaged (2 means four rays a pixel).

    Returns:
        The frames in [0, 1] composited on the background, and their alpha.

    Raises:
        ValueError: there are not as many timestamps as cameras.
    """
    times = np.asarray(timestamps, np.float32)
    if len(times) != len(camera):
        raise ValueError(f"{len(camera)} cameras need as many timestamps, not {len(times)}.")
    drawn = [_render_frame(scene, camera[i], float(time), samples) for i, time in enumerate(times)]
    premultiplied = np.stack([colour for colour, _ in drawn])
    alpha = np.stack([cover for _, cover in drawn])
    rgb = premultiplied + (1 - alpha[..., None]) * np.asarray(background, np.float32)
    return rgb.astype(np.float32), alpha


def make_clip(
    seed: int = 0,
    *,
    num_frames: int = 24,
    size: int = 64,
    motion: float = 1.0,
    elevation: float = 0.0,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    samples: int = 2,
) -> clips.OrbitClip:
    """A complete clip: dynamic orbit, static orbit and front view, with alpha and cameras.

    Args:
        seed: varies the figure, see `make_scene`.
        num_frames: at least 2; the time runs from 0 to 1 and the orbit makes one full turn.
        size: pixels, square.
        motion: factor on how far the moving part travels.
        elevation: of the orbit, radians.
        background: behind the object, in [0, 1].
        samples: rays a pixel and axis.
    """
    scene = make_scene(seed, motion=motion)
    orbit = cameras.orbit(num_frames, elevation=elevation, width=size, height=size)
    times = np.linspace(0, 1, num_frames, dtype=np.float32)
    settings = {"background": background, "samples": samples}
    dynamic, dynamic_alpha = render(scene, orbit, times, **settings)
    static, static_alpha = render(scene, orbit, np.zeros_like(times), **settings)
    still = cameras.stack([orbit[0]] * num_frames)
    front, front_alpha = render(scene, still, times, **settings)
    return clips.OrbitClip(
        dynamic=dynamic,
        static=static,
        front=front,
        dynamic_alpha=dynamic_alpha,
        static_alpha=static_alpha,
        front_alpha=front_alpha,
        camera=orbit,
        timestamps=times,
        background=background,
        caption=f"a figure of coloured ellipsoids waving an arm, number {seed}",
        motion=float(100 * np.mean(np.square(2 * (dynamic - static)))),
    )


def _render_frame(
    scene: Scene, camera: cameras.Camera, time: float, samples: int
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """One frame: colour premultiplied by alpha, and alpha."""
    origin, rays = _rays(camera, samples)
    centres = scene.centres_at(time)
    nearest = np.full(len(rays), np.inf, np.float32)
    colour = np.zeros((len(rays), 3), np.float32)
    for centre, half_axes, paint in zip(centres, scene.half_axes, scene.colours, strict=True):
        index, depth, normal = _intersect(origin, rays, centre, half_axes)
        closer = depth < nearest[index]
        index, normal = index[closer], normal[closer]
        nearest[index] = depth[closer]
        shade = _AMBIENT + (1 - _AMBIENT) * np.maximum(normal @ _LIGHT, 0)
        colour[index] = shade[:, None] * paint
    cover = np.isfinite(nearest).astype(np.float32)
    blocks = (camera.height, samples, camera.width, samples)
    colour = colour.reshape(*blocks, 3).mean((1, 3))
    return colour, cover.reshape(blocks).mean((1, 3))


def _rays(
    camera: cameras.Camera, samples: int
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "n 3"]]:
    """The camera centre and one world direction (of unit depth) for each sample, row by row."""
    x = (np.arange(camera.width * samples) + 0.5) / samples
    y = (np.arange(camera.height * samples) + 0.5) / samples
    grid = np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))], -1).reshape(-1, 3)
    pose = np.asarray(camera.camera_to_world)
    pixel_to_world = pose[:3, :3] @ np.linalg.inv(np.asarray(camera.intrinsics))
    return pose[:3, 3], (grid @ pixel_to_world.T).astype(np.float32)


def _intersect(
    origin: Float[np.ndarray, "3"],
    rays: Float[np.ndarray, "n 3"],
    centre: Float[np.ndarray, "3"],
    half_axes: Float[np.ndarray, "3"],
) -> tuple[np.ndarray, Float[np.ndarray, "m"], Float[np.ndarray, "m 3"]]:
    """Rays that hit an ellipsoid: their indices, the depth of the first hit, the unit normal.

    In coordinates divided by the half-axes the ellipsoid is a unit sphere and the hit solves a
    quadratic in the depth.
    """
    start = (origin - centre) / half_axes
    direction = rays / half_axes
    a = np.einsum("nk,nk->n", direction, direction)
    b = direction @ start
    discriminant = b * b - a * (start @ start - 1)
    index = np.flatnonzero(discriminant > 0)
    depth = (-b[index] - np.sqrt(discriminant[index])) / a[index]
    index, depth = index[depth > 0], depth[depth > 0]
    normal = (start + depth[:, None] * direction[index]) / half_axes
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return index, depth.astype(np.float32), normal.astype(np.float32)
