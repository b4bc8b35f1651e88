"""The rasterizer for CPU: C++ kernels (folder `native`) behind XLA's foreign function interface.

Blending sorts splats and tiles itself, so that it needs no capacity and nothing can overflow, and
keeps a tile of 8 x 8 pixels in the registers of one core, with AVX-512, AVX2 or neither, whatever
the processor has. The kernels are built when the package is installed, if there is a C++ compiler.
"""

import ctypes
import functools
import importlib.machinery
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from d4d_jax.cameras import Camera
from d4d_jax.typing import AnyArray
from gaussians.projection import BLUR, NEAR, Projection
from gaussians.rasterize.screen import Composite, ScreenSplats

TILE_SIZE = 8
_NUM_FEATURES = 4
_INTERFACE = 1  # of the library that these calls are made for, see native/blend.cpp
_SYMBOLS = {
    "gaussians_project": "SplatsProject",
    "gaussians_unproject": "SplatsUnproject",
    "gaussians_blend": "SplatsBlend",
    "gaussians_unblend": "SplatsUnblend",
}


class _Differentiable(NamedTuple):
    """The inputs that have a gradient; its field names are those of `ScreenSplats`."""

    means2d: Float[Array, "n 2"]
    factors: Float[Array, "n 3"]
    opacities: Float[Array, "n"]
    features: Float[Array, "n f"]
    absolute: Float[Array, "a 2"]  # as many rows as splats, or none when it is not asked for


class _Fixed(NamedTuple):
    """The inputs that have none."""

    depths: Float[Array, "n"]
    extents: Float[Array, "n 2"]
    visible: Bool[Array, "n"]


class _View(NamedTuple):
    """What is known at compile time."""

    width: int
    height: int
    alpha_max: float


def obstacle(dtype: Any) -> str | None:
    """Why the kernels cannot run here on arrays of this type, or None."""
    if jax.default_backend() != "cpu":
        return f"JAX runs on {jax.default_backend()}, not on cpu"
    if dtype != jnp.float32:
        return f"it blends float32, not {dtype}"
    return _load()


def _require(dtype: Any) -> None:
    if (reason := obstacle(dtype)) is not None:
        raise ValueError(f'The rasterizer "cpu" cannot run: {reason}.')


@functools.cache
def _load() -> str | None:
    """Registers the kernels with JAX; why that fails, or None."""
    folder = pathlib.Path(__file__).parent
    files = [folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((file for file in files if file.exists()), None)
    if found is None:
        return "its C++ kernel was not built: install the package where there is a C++ compiler"
    try:
        library = ctypes.CDLL(str(found))
        if library.SplatsInterface() != _INTERFACE:
            return f"its C++ kernel {found.name} is of another version; install the package anew"
        for name, symbol in _SYMBOLS.items():
            capsule = jax.ffi.pycapsule(getattr(library, symbol))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except Exception as error:  # a library of another platform or version: whatever it is, say it
        return f"its C++ kernel {found.name} does not load ({error}); install the package anew"
    return None


def project(
    means: Float[AnyArray, "n 3"],
    log_scales: Float[AnyArray, "n 3"],
    quaternions: Float[AnyArray, "n 4"],
    camera: Camera,
    active: Bool[AnyArray, "n"] | bool = True,
    *,
    blur: float | Float[AnyArray, ""] = BLUR,
    near: float | Float[AnyArray, ""] = NEAR,
    far: float | Float[AnyArray, ""] = math.inf,
) -> Projection:
    """`gaussians.projection.project` in float32.

    Raises:
        ValueError: The kernels cannot run here (`obstacle`).
    """
    _require(jnp.float32)
    drawn = jnp.broadcast_to(active, means.shape[:1])
    arrays = (means, log_scales, quaternions, camera.world_to_camera, camera.intrinsics, blur)
    inputs = [jnp.asarray(value, jnp.float32) for value in (*arrays, near, far)]
    return _project((camera.width, camera.height), drawn, *inputs)


def composite(
    screen: ScreenSplats,
    *,
    width: int,
    height: int,
    tile_size: int | None = None,
    capacity: int | None = None,
    alpha_max: float = 0.99,
) -> Composite:
    """Blends splats into an image; four features.

    Raises:
        ValueError: The kernel cannot run here (`obstacle`), or does not do what is asked for.
    """
    del capacity
    _require(screen.features.dtype)
    if tile_size not in (None, TILE_SIZE):
        raise ValueError(f'The rasterizer "cpu" has tile_size={TILE_SIZE}; got {tile_size}.')
    n, num_features = screen.features.shape
    if num_features != _NUM_FEATURES:
        raise ValueError(f'"cpu" blends {_NUM_FEATURES} features, not {num_features}; use "tiled".')
    if n == 0 or width == 0 or height == 0:
        blended = jnp.zeros((height, width, num_features), jnp.float32)
        alpha = jnp.zeros((height, width), jnp.float32)
    else:
        nothing = jnp.zeros((0, 2), jnp.float32)
        absolute = nothing if screen.absolute is None else screen.absolute
        images: Any = _blend(
            _View(width, height, alpha_max),
            _Differentiable(
                screen.means2d, screen.factors, screen.opacities, screen.features, absolute
            ),
            jax.lax.stop_gradient(_Fixed(screen.depths, screen.extents, screen.visible)),
        )
        colours, depth, alpha = images
        blended = jnp.concatenate([colours, depth[..., None]], axis=-1)
    return Composite(blended, alpha, jnp.zeros((), jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(view: _View, splats: _Differentiable, fixed: _Fixed) -> Any:
    """The first three features (h w 3), the fourth and alpha, both (h w)."""
    return _blend_forward(view, splats, fixed)[0]


def _blend_forward(view: _View, splats: _Differentiable, fixed: _Fixed):
    call = jax.ffi.ffi_call(
        "gaussians_blend",
        [
            jax.ShapeDtypeStruct((view.height, view.width, *channels), jnp.float32)
            for channels in ((3,), (), ())
        ],
        vmap_method="expand_dims",
    )
    images = call(*splats[:-1], *fixed, alpha_max=np.float32(view.alpha_max))
    return tuple(images), (splats, fixed, tuple(images))


def _blend_backward(view: _View, residuals: tuple, cotangents: tuple):
    splats, fixed, images = residuals
    call = jax.ffi.ffi_call(
        "gaussians_unblend",
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in splats],
        vmap_method="expand_dims",
    )
    gradients = call(
        *splats[:-1], *fixed, *images, *cotangents, alpha_max=np.float32(view.alpha_max)
    )
    return _Differentiable(*gradients), None


_blend.defvjp(_blend_forward, _blend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(size: tuple[int, int], active: Array, *inputs: Array) -> Projection:
    return _project_forward(size, active, *inputs)[0]


def _project_forward(size: tuple[int, int], active: Array, *inputs: Array):
    n = active.shape[0]
    shapes = {"means2d": (n, 2), "factors": (n, 3), "variances": (n, 2), "depths": (n,)}
    shapes |= {"compensations": (n,), "visible": (n,)}
    call = jax.ffi.ffi_call(
        "gaussians_project",
        [
            jax.ShapeDtypeStruct(shape, bool if name == "visible" else jnp.float32)
            for name, shape in shapes.items()
        ],
        vmap_method="expand_dims",
    )
    outputs = call(active, *inputs, **_sides(size))
    return Projection(**dict(zip(shapes, outputs, strict=True))), (active, *inputs)


def _project_backward(size: tuple[int, int], inputs: tuple, cotangent: Projection):
    *differentiable, near, far = inputs[1:]
    call = jax.ffi.ffi_call(
        "gaussians_unproject",
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in differentiable],
        vmap_method="expand_dims",
    )
    received = [leaf for name, leaf in cotangent._asdict().items() if name != "visible"]
    gradients = call(*inputs, *received, **_sides(size))
    return (None, *gradients, jnp.zeros_like(near), jnp.zeros_like(far))


_project.defvjp(_project_forward, _project_backward)


def _sides(size: tuple[int, int]) -> dict[str, np.float32]:
    return {"width": np.float32(size[0]), "height": np.float32(size[1])}
