"""Differentiable rendering of Gaussian splats: one signature, several implementations.

    render = rasterize(splats, cameras, background)  # .rgb .alpha .depth .expected_depth ...

All follow the conventions of 3D Gaussian Splatting (Kerbl et al. 2023): support where
alpha >= 1/255, alpha at most `alpha_max`, a pixel stops before its transmittance would fall below
1e-4. The support is the exact ellipse; the original's tile boxes at three sigma are not imitated.

| implementation | runs on | what it is |
|---|---|---|
| `reference` | everywhere, float64 too | every splat against every pixel, JAX's own gradients |
| `tiled` | everywhere, float64 too | splats sorted into tiles, plain XLA operations |
| `cpu` | CPU | a C++ kernel, built at installation where there is a compiler |
| `pallas` | GPU; elsewhere interpreted, slowly | one kernel per tile |
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from d4d_jax import pytree
from d4d_jax.typing import AnyArray
from gaussians import sh as spherical_harmonics
from gaussians.projection import BLUR, NEAR, Projection, project
from gaussians.rasterize import cpu, pallas, reference, tiled
from gaussians.rasterize.screen import ALPHA_MIN, Composite, CompositeFn, ScreenSplats
from gaussians.types import Camera, Splats

__all__ = [
    "Composite",
    "CompositeFn",
    "Probe",
    "Render",
    "ScreenSplats",
    "available",
    "chosen",
    "rasterize",
]


def _none(dtype: Any) -> None:
    """No obstacle anywhere."""


class _Implementation(NamedTuple):
    """What makes up an implementation.

    composite: Blends what is on the screen.
    project: Brings splats there, see `gaussians.projection.project`.
    obstacle: Of a dtype: why it cannot run natively here on such arrays, or None.
    """

    composite: CompositeFn
    project: Callable[..., Projection] = project
    obstacle: Callable[[Any], str | None] = _none


_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "reference": _Implementation(reference.composite),
    "tiled": _Implementation(tiled.composite),
    "cpu": _Implementation(cpu.composite, cpu.project, cpu.obstacle),
    "pallas": _Implementation(pallas.composite, obstacle=pallas.obstacle),
}
#: What `implementation=None` tries, in this order.
_PREFERRED = ("cpu", "tiled")

#: How many axes each array of the arguments has behind its leading ones.
_OWN_AXES = {
    "means": 2,
    "log_scales": 2,
    "quaternions": 2,
    "opacity_logits": 1,
    "sh": 3,
    "active": 1,
    "world_to_camera": 2,
    "intrinsics": 2,
    "background": 1,
    "mean2d": 2,
    "absolute": 2,
}


@pytree.dataclass
class Render:
    """A rendered view, or with leading axes *b several.

    Attributes:
        rgb: Colour over the background; 0 or above, not clipped at 1.
        alpha: Opacity in [0, 1]: sum_k a_k T_k.
        depth: Accumulated camera z, sum_k a_k T_k z_k, *not* divided by alpha, with a gradient.
        expected_depth: depth / alpha, the mean z of what a pixel shows; 0 where alpha is 0.
        radii: Largest half extent in pixels of each splat's support; 0 where nothing of it falls
            inside the image. No gradient.
        overflow: Splat-tile pairs that did not fit `capacity`. When above 0 some splats are missing
            in some tiles: render again with a larger capacity.
        invalid: Active splats that hold NaN or Inf; they are not drawn.
    """

    rgb: Float[Array, "*b h w 3"]
    alpha: Float[Array, "*b h w"]
    depth: Float[Array, "*b h w"]
    expected_depth: Float[Array, "*b h w"]
    radii: Float[Array, "*b n"]
    overflow: Int[Array, "*b"]
    invalid: Int[Array, "*b"]


@pytree.dataclass
class Probe:
    """Zeros that change no image, and whose gradients tell densification where splats are missing.

    The gradients come out of the same backward pass as all others, in the unit of the original's
    thresholds (0.0002): loss per half image width and half image height. A probe without leading
    axes receives the sum over the views; the norm that densification averages is one view's.

    Attributes:
        mean2d: Its gradient is that of each splat's projected centre (Kerbl et al. 2023, 5.2).
        absolute: Its gradient sums the absolute values of the pixels' contributions to the former,
            component by component, so that pulls in opposite directions do not cancel (Ye et al.
            2024, AbsGS, Eq. 8). None, the default, saves that sum.
    """

    mean2d: Float[AnyArray, "*b n 2"]
    absolute: Float[AnyArray, "*b n 2"] | None = None

    @classmethod
    def zeros(cls, n: int, *, absolute: bool = False) -> "Probe":
        """For n splats, with or without the absolute variant."""
        return cls(jnp.zeros((n, 2)), jnp.zeros((n, 2)) if absolute else None)


def available() -> tuple[str, ...]:
    """The names of the implementations that run natively on this platform."""
    return tuple(
        name for name, entry in _IMPLEMENTATIONS.items() if entry.obstacle(jnp.float32) is None
    )


def chosen(implementation: str | Sequence[str] | None = None, dtype: Any = jnp.float32) -> str:
    """The name of the implementation that `rasterize` runs on this platform.

    Args:
        implementation: A name, taken as it is; names to try in order, of which the first one that
            runs natively here is taken; or None for the fastest here.
        dtype: Of the splats.

    Raises:
        ValueError: When a name is unknown, or none of several runs here.
    """
    if isinstance(implementation, str):
        _known(implementation)
        return implementation
    obstacles = []
    for name in _PREFERRED if implementation is None else implementation:
        obstacle = _known(name).obstacle(dtype)
        if obstacle is None:
            return name
        obstacles.append(f"{name}: {obstacle}")
    raise ValueError(
        f"None of the rasterizers {tuple(implementation or ())} runs here ({'; '.join(obstacles)});"
        ' add "tiled", which runs everywhere.'
    )


def rasterize(
    splats: Splats,
    cameras: Camera,
    background: Float[AnyArray, "... 3"],
    *,
    near: float | Float[AnyArray, ""] = NEAR,
    far: float | Float[AnyArray, ""] = math.inf,
    sh_degree: int | None = None,
    antialiased: bool = False,
    alpha_max: float = 0.99,
    blur: float | Float[AnyArray, ""] = BLUR,
    implementation: str | Sequence[str] | None = None,
    tile_size: int | None = None,
    capacity: int | None = None,
    probe: Probe | None = None,
) -> Render:
    """Renders splats as cameras see them.

    Differentiable with respect to every float array, cameras included (the depth *order* is a
    constant). Slots that are inactive, hold a number that is not finite, or lie outside the view
    change nothing and receive gradient 0.

    Any of splats, cameras, background and probe may have leading axes; they broadcast against each
    other as arrays do. Eight cameras of one object: give cameras with leading axis 8. Eight objects
    seen by three cameras each: splats with leading axes (8, 1), cameras with (8, 3) or (3,).

    Args:
        splats: The Gaussians, arrays (*b, n, ...).
        cameras: One or more, arrays (*b, ...).
        background: Colour behind everything, (*b, 3).
        near: Splats with camera z at or below this, or below 0, are not drawn.
        far: Splats with camera z at or above this are not drawn.
        sh_degree: Degree of spherical harmonics to evaluate; None takes all coefficients.
        antialiased: Lowers each opacity by as much as the blur widens the footprint (Mip-Splatting,
            Yu et al. 2024, Eq. 9), so that splats under a pixel do not gain light.
        alpha_max: Alphas above are cut to this, without gradient there, in (0, 1). The original has
            0.99; many later implementations have 0.999.
        blur: Variance in px^2 added to each splat's footprint (`gaussians.projection.project`).
        implementation: A name of the table above, names to try in order, or None (see `chosen`).
        tile_size: Side of the tiles in pixels; None takes what is fastest. `tiled` takes any even
            number, `pallas` 4, 8 or 16, `cpu` 8 only.
        capacity: Most (splat, tile) pairs that `tiled` and `pallas` keep; None picks a size from
            the number of splats and pixels. Time and memory grow with it; a change compiles anew.
            `cpu` grows its list itself and never overflows.
        probe: Zeros whose gradient is the densification signal.

    Raises:
        ValueError: When the leading axes do not broadcast, the implementation is unknown or cannot
            run here, or a number is out of its range.
    """
    dtype = jnp.result_type(*splats.parameters.values())
    implemented = _IMPLEMENTATIONS[chosen(implementation, dtype)]
    _check(cameras, alpha_max, tile_size, capacity)
    composite = functools.partial(
        implemented.composite,
        width=cameras.width,
        height=cameras.height,
        tile_size=tile_size,
        capacity=capacity,
        alpha_max=alpha_max,
    )

    # One type for all: the kernels have no mixed arithmetic, and a camera of NumPy is float64.
    parameters = {k: jnp.asarray(v, dtype) for k, v in splats.parameters.items()}

    def one(splats: Splats, camera: Camera, background: Array, probe: Probe | None) -> Render:
        usable = _usable(splats)
        projection = implemented.project(
            splats.means,
            splats.log_scales,
            splats.quaternions,
            camera,
            usable,
            blur=blur,
            near=near,
            far=far,
        )
        colours = _colours(splats, usable, camera, sh_degree)
        screen = _to_screen(splats, usable, projection, colours, antialiased)
        if probe is not None:
            screen = _probed(screen, probe, camera.width, camera.height)
        blended = composite(screen)
        alpha, depth = blended.alpha, blended.features[..., 3]
        covered = alpha > 0.0
        return Render(
            rgb=blended.features[..., :3] + (1.0 - alpha)[..., None] * background,
            alpha=alpha,
            depth=depth,
            expected_depth=jnp.where(covered, depth / jnp.where(covered, alpha, 1.0), 0.0),
            radii=_radii(screen, camera.width, camera.height),
            overflow=blended.overflow,
            invalid=jnp.sum(jnp.asarray(splats.active) & ~usable, dtype=jnp.int32),
        )

    cameras, probe, background = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype), (cameras, probe, background)
    )
    return _over_leading_axes(one, splats.with_parameters(parameters), cameras, background, probe)


def _known(name: str) -> _Implementation:
    if name not in _IMPLEMENTATIONS:
        names = ", ".join(sorted(_IMPLEMENTATIONS))
        raise ValueError(f"There is no rasterizer {name!r}; choose one of {names}.")
    return _IMPLEMENTATIONS[name]


def _check(cameras: Camera, alpha_max: float, tile_size: int | None, capacity: int | None) -> None:
    if not 0.0 < alpha_max < 1.0:
        raise ValueError(f"alpha_max must lie between 0 and 1; got {alpha_max}.")
    if tile_size is not None and (tile_size < 2 or tile_size % 2):
        raise ValueError(f"tile_size must be an even number of pixels; got {tile_size}.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity {capacity} leaves no room for a single pair; use at least 1.")
    if cameras.width < 0 or cameras.height < 0:
        raise ValueError(f"An image cannot be {cameras.width} x {cameras.height} pixels large.")


def _over_leading_axes(
    one: Callable[..., Render],
    splats: Splats,
    cameras: Camera,
    background: AnyArray,
    probe: Probe | None,
) -> Render:
    """`one`, mapped over the leading axes of its arguments once those are broadcast."""
    arguments = (splats, cameras, {"background": background}, probe)
    paths, structure = jax.tree_util.tree_flatten_with_path(arguments)
    leaves = [leaf for _, leaf in paths]
    names = [getattr(path[-1], "name", "background") for path, _ in paths]
    leading = [
        np.shape(leaf)[: np.ndim(leaf) - _OWN_AXES[n]]
        for n, leaf in zip(names, leaves, strict=True)
    ]
    try:
        axes = np.broadcast_shapes(*leading)
    except ValueError:
        found = ", ".join(f"{name} {own}" for name, own in zip(names, leading, strict=True) if own)
        raise ValueError(f"These leading axes do not broadcast: {found}.") from None
    if not axes:
        return one(splats, cameras, background, probe)

    def flat(leaf: AnyArray, own: tuple[int, ...]) -> Array:
        if not own:
            return jnp.asarray(leaf)
        inner = np.shape(leaf)[len(own) :]
        return jnp.broadcast_to(leaf, (*axes, *inner)).reshape(math.prod(axes), *inner)

    def render(*leaves: Array) -> Render:
        splats, cameras, rest, probe = jax.tree.unflatten(structure, leaves)
        return one(splats, cameras, rest["background"], probe)

    in_axes = [0 if own else None for own in leading]
    renders = jax.vmap(render, in_axes=in_axes)(*map(flat, leaves, leading))
    return jax.tree.map(lambda leaf: leaf.reshape(*axes, *leaf.shape[1:]), renders)


def _to_screen(
    splats: Splats,
    usable: Bool[Array, "n"],
    projection: Projection,
    colours: Float[Array, "n 3"],
    antialiased: bool,
) -> ScreenSplats:
    opacities = jax.nn.sigmoid(jnp.where(usable, splats.opacity_logits, 0.0))
    if antialiased:
        opacities = opacities * projection.compensations
    return ScreenSplats(
        means2d=projection.means2d,
        factors=projection.factors,
        opacities=opacities,
        features=jnp.concatenate([colours, projection.depths[:, None]], axis=-1),
        depths=lax.stop_gradient(projection.depths),
        extents=_extents(opacities, projection.variances),
        visible=projection.visible & (opacities >= ALPHA_MIN),
    )


def _colours(
    splats: Splats, usable: Bool[Array, "n"], camera: Camera, sh_degree: int | None
) -> Float[Array, "n 3"]:
    offsets = jnp.where(usable[:, None], splats.means, 0.0) - camera.position
    squared = jnp.sum(offsets * offsets, axis=-1, keepdims=True)
    directions = offsets * lax.rsqrt(jnp.maximum(squared, 1e-20))
    coefficients = jnp.where(usable[:, None, None], splats.sh, 0.0)
    return jnp.asarray(spherical_harmonics.to_rgb(coefficients, directions, sh_degree))


def _extents(opacities: Float[Array, "n"], variances: Float[Array, "n 2"]) -> Float[Array, "n 2"]:
    """Half width and height of the ellipses in which alpha reaches 1/255."""
    log_ratio = jnp.log(jnp.maximum(opacities / ALPHA_MIN, 1.0))
    return jnp.sqrt(2.0 * lax.stop_gradient(log_ratio[:, None] * variances))


def _probed(screen: ScreenSplats, probe: Probe, width: int, height: int) -> ScreenSplats:
    half_size = jnp.array([width / 2, height / 2], screen.means2d.dtype)
    absolute = None if probe.absolute is None else probe.absolute * half_size
    return screen._replace(means2d=screen.means2d + probe.mean2d * half_size, absolute=absolute)


def _usable(splats: Splats) -> Bool[Array, "n"]:
    """Slots in use whose numbers are finite; those of others must be masked before any arithmetic,
    lest NaN values or gradients spread."""
    usable: Array = jnp.asarray(splats.active)
    for value in splats.parameters.values():
        usable &= jnp.all(jnp.isfinite(value), axis=tuple(range(1, value.ndim)))
    return usable


def _radii(screen: ScreenSplats, width: int, height: int) -> Float[Array, "n"]:
    """Half extents of the splats whose support meets the image."""
    means2d = lax.stop_gradient(screen.means2d)
    size = jnp.array([width, height], means2d.dtype)
    inside = jnp.all((means2d + screen.extents > 0.0) & (means2d - screen.extents < size), axis=-1)
    return jnp.where(screen.visible & inside, jnp.max(screen.extents, axis=-1), 0.0)
