"""Differentiable rendering of Gaussian splats: one signature, several implementations.

    render = rasterize(splats, camera, background)  # .rgb .alpha .depth .overflow .radii
    renders = jax.vmap(lambda c: rasterize(splats, c, background))(cameras)

`reference` blends every splat into every pixel and is the oracle of the tests; `tiled` is exact
too, sorts splats into tiles first, and is what `implementation=None` picks. Both follow the
conventions of 3D Gaussian Splatting: support where alpha >= 1/255, alpha at most `alpha_max`, a
pixel stops before its transmittance would fall below 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from d4d_jax import pytree
from d4d_jax.typing import AnyArray
from gaussians import sh as spherical_harmonics
from gaussians.projection import BLUR, NEAR, project
from gaussians.rasterize import reference, tiled
from gaussians.rasterize.screen import ALPHA_MIN, Composite, CompositeFn, ScreenSplats
from gaussians.types import Camera, Splats

__all__ = ["Composite", "CompositeFn", "Render", "ScreenSplats", "chosen", "rasterize"]

_IMPLEMENTATIONS: dict[str, CompositeFn] = {
    "reference": reference.composite,
    "tiled": tiled.composite,
}


@pytree.dataclass
class Render:
    """A rendered view.

    Attributes:
        rgb: Colour over the background; 0 or above, not clipped at 1.
        alpha: Opacity in [0, 1]: sum_k a_k T_k.
        depth: Accumulated camera z, sum_k a_k T_k z_k, *not* divided by alpha, with a gradient.
        overflow: Splat-tile pairs that did not fit `capacity`. When above 0 some splats are missing
            in some tiles: render again with a larger capacity.
        radii: Largest half extent in pixels of each splat's support; 0 where nothing of it falls
            inside the image. No gradient.
    """

    rgb: Float[Array, "*b h w 3"]
    alpha: Float[Array, "*b h w"]
    depth: Float[Array, "*b h w"]
    overflow: Int[Array, "*b"]
    radii: Float[Array, "*b n"]


def chosen(implementation: str | None = None) -> str:
    """The name of the implementation that `rasterize` runs.

    Raises:
        ValueError: When there is none of that name.
    """
    if implementation is None:
        return "tiled"
    if implementation not in _IMPLEMENTATIONS:
        names = ", ".join(sorted(_IMPLEMENTATIONS))
        raise ValueError(f"There is no rasterizer {implementation!r}; choose one of {names}.")
    return implementation


def rasterize(
    splats: Splats,
    camera: Camera,
    background: Float[AnyArray, "3"],
    *,
    implementation: str | None = None,
    capacity: int | None = None,
    alpha_max: float = 0.99,
    blur: float | Float[AnyArray, ""] = BLUR,
    near: float = NEAR,
    sh_degree: int | None = None,
    mean2d_offset: Float[AnyArray, "n 2"] | None = None,
) -> Render:
    """Renders splats as one camera sees them.

    Differentiable with respect to every float argument, camera included (the depth *order* is a
    constant). Slots that are inactive, hold a number that is not finite, or lie outside the view
    change nothing and receive gradient 0. For many cameras use `jax.vmap` over a batched `Camera`.

    Args:
        splats: The Gaussians.
        camera: One camera, no leading axes.
        background: Colour behind everything.
        implementation: "tiled", "reference", or None for the fastest here (see `chosen`).
        capacity: Most (splat, tile) pairs `tiled` keeps; None picks a size from the number of
            splats and pixels. Time and memory grow with it; a change compiles anew.
        alpha_max: Alphas above are cut to this, without gradient there. 0.99 in the original.
        blur: Variance in px^2 added to each splat's footprint (`gaussians.projection.project`).
        near: Splats with camera z at or below are not drawn.
        sh_degree: Degree of spherical harmonics to evaluate; None takes all coefficients.
        mean2d_offset: Zeros, added to the projected centres. Its gradient is the one densification
            looks at, d loss / d centre in loss per *pixel*, out of the same backward pass. The
            original's threshold of 0.0002 is in normalised device coordinates: multiply x by
            width / 2 and y by height / 2 first.

    Raises:
        ValueError: When the camera or the splats are batched, the implementation has no such name,
            or the capacity is below 1.
    """
    _check(splats, camera, capacity)
    composite = _IMPLEMENTATIONS[chosen(implementation)]
    screen = _to_screen(splats, camera, blur, near, sh_degree, mean2d_offset)
    blended = composite(
        screen,
        width=camera.width,
        height=camera.height,
        capacity=capacity,
        alpha_max=alpha_max,
    )
    behind = (1.0 - blended.alpha)[..., None] * jnp.asarray(background, blended.alpha.dtype)
    return Render(
        rgb=blended.features[..., :3] + behind,
        alpha=blended.alpha,
        depth=blended.features[..., 3],
        overflow=blended.overflow,
        radii=_radii(screen, camera.width, camera.height),
    )


def _check(splats: Splats, camera: Camera, capacity: int | None) -> None:
    if np.ndim(camera.world_to_camera) != 2 or np.ndim(camera.intrinsics) != 2:
        raise ValueError(
            f"rasterize takes one camera, but world_to_camera has shape "
            f"{np.shape(camera.world_to_camera)}; map over the cameras with jax.vmap."
        )
    if np.ndim(splats.means) != 2:
        raise ValueError(
            f"rasterize takes one set of splats, but means have shape {np.shape(splats.means)}; "
            "map over the sets with jax.vmap."
        )
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity {capacity} leaves no room for a single pair; use at least 1.")


def _to_screen(
    splats: Splats,
    camera: Camera,
    blur: float | Float[AnyArray, ""],
    near: float,
    sh_degree: int | None,
    mean2d_offset: Float[AnyArray, "n 2"] | None,
) -> ScreenSplats:
    """Projects, colours and masks."""
    clean, usable = _without_bad_numbers(splats)
    projection = project(
        clean.means, clean.log_scales, clean.quaternions, camera, blur=blur, near=near
    )
    offsets = clean.means - camera.position
    squared = jnp.sum(offsets * offsets, axis=-1, keepdims=True)
    directions = offsets * lax.rsqrt(jnp.maximum(squared, 1e-20))
    colours = spherical_harmonics.to_rgb(clean.sh, directions, sh_degree)
    opacities = jax.nn.sigmoid(clean.opacity_logits)

    log_ratio = jnp.log(jnp.maximum(lax.stop_gradient(opacities) / ALPHA_MIN, 1.0))
    extents = jnp.sqrt(2.0 * log_ratio[:, None] * lax.stop_gradient(projection.variances))
    means2d = projection.means2d if mean2d_offset is None else projection.means2d + mean2d_offset
    return ScreenSplats(
        means2d=means2d,
        conics=projection.conics,
        opacities=opacities,
        features=jnp.concatenate([colours, projection.depths[:, None]], axis=-1),
        depths=lax.stop_gradient(projection.depths),
        extents=extents,
        visible=projection.visible & usable & (opacities >= ALPHA_MIN),
    )


def _without_bad_numbers(splats: Splats) -> tuple[Splats, Bool[Array, "n"]]:
    """Zeros in place of slots that are unused or hold NaN or Inf, so that nothing spreads."""
    usable = jnp.asarray(splats.active)
    for value in splats.parameters.values():
        usable &= jnp.all(jnp.isfinite(value), axis=tuple(range(1, value.ndim)))

    def keep(value: Array) -> Array:
        return jnp.where(usable.reshape(-1, *(1,) * (value.ndim - 1)), value, 0.0)

    kept = {name: keep(value) for name, value in splats.parameters.items()}
    return splats.with_parameters(kept), usable


def _radii(screen: ScreenSplats, width: int, height: int) -> Float[Array, "n"]:
    """Half extents of the splats whose support meets the image."""
    means2d = lax.stop_gradient(screen.means2d)
    size = jnp.array([width, height], means2d.dtype)
    inside = jnp.all((means2d + screen.extents > 0.0) & (means2d - screen.extents < size), axis=-1)
    return jnp.where(screen.visible & inside, jnp.max(screen.extents, axis=-1), 0.0)
