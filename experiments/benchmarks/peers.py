"""Other implementations of Gaussian splatting, run where they are installed; none is required."""

import dataclasses
import importlib.util
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import measure
from experiments.benchmarks.scenes import Scene
from gaussians.rasterize.screen import ALPHA_MIN, TRANSMITTANCE_MIN
from gaussians.types import Camera, Splats

_BAND = 16  # image rows whose pairs are listed at a time
_BYTES_PER_PAIR = 320  # that torch needs for a gradient, rounded up


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to draw one scene. Both functions return when their work is done.

    forward: Draws the image, (size, size, 3).
    forward_backward: sum(image * cotangent) and its gradients for means, log_scales, quaternions,
        opacity_logits and sh.
    compile_s: Seconds that `forward_backward` took to trace and compile; None: it is not compiled.
    on_host: Whether its arrays are in the host's memory.
    """

    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    compile_s: float | None
    on_host: bool


def compiled(draw: Callable[[Splats, Camera], Any], scene: Scene) -> Candidate:
    """The candidate of a JAX function that returns the image."""
    cotangent = jnp.asarray(scene.cotangent)
    parameters, camera = scene.splats.parameters, jax.tree.map(jnp.asarray, scene.camera)

    def image(parameters: dict[str, jax.Array], camera: Camera) -> jax.Array:
        return draw(scene.splats.with_parameters(parameters), camera)

    def loss(parameters: dict[str, jax.Array], camera: Camera, cotangent: jax.Array) -> jax.Array:
        return jnp.sum(image(parameters, camera) * cotangent)

    forward = jax.jit(image)
    jax.block_until_ready((cotangent, parameters, camera))
    start = time.perf_counter()
    gradient = jax.jit(jax.value_and_grad(loss)).lower(parameters, camera, cotangent).compile()
    return Candidate(
        forward=lambda: jax.block_until_ready(forward(parameters, camera)),
        forward_backward=lambda: jax.block_until_ready(gradient(parameters, camera, cotangent)),
        compile_s=time.perf_counter() - start,
        on_host=jax.default_backend() == "cpu",
    )


def splax(scene: Scene) -> Candidate:
    """splax: NVIDIA Warp kernels behind JAX."""
    os.environ.setdefault(
        "SCIPY_ARRAY_API", "1"
    )  # It refuses to be imported after scipy otherwise.
    import splax as library

    focal = float(scene.camera.intrinsics[0, 0])
    size = scene.camera.width

    def draw(splats: Splats, camera: Camera) -> jax.Array:
        return library.render(
            splats.means,
            splats.log_scales,
            splats.quaternions,
            splats.sh,
            splats.opacity_logits,
            viewmat=camera.world_to_camera,
            background=jnp.asarray(scene.background),
            img_shape=(size, size),
            f=(focal, focal),
        )[0]

    return compiled(draw, scene)


def gsplat_torch(scene: Scene) -> Candidate:
    """gsplat's pure torch maths, on CPU.

    Two things that it lacks are supplied. The (splat, pixel) pairs, which it finds in CUDA, are
    listed beforehand and not timed, and neither is where each ray's pairs lie among them. The
    transmittance along the rays, which nerfacc computes in CUDA, is a segmented scan in torch.

    Raises:
        ImportError: torch or gsplat is not installed.
        MemoryError: the pairs of this scene are too many.
    """
    import torch

    gsplat = _gsplat_maths()
    torch.set_num_threads(measure.threads())
    camera, size = scene.camera, scene.camera.width
    poses = torch.tensor(np.asarray(camera.world_to_camera))[None]
    intrinsics = torch.tensor(np.asarray(camera.intrinsics))[None]
    position = torch.tensor(np.asarray(camera.position))
    background = torch.tensor(scene.background)
    cotangent = torch.tensor(scene.cotangent)
    leaves = [
        torch.tensor(np.asarray(value)).requires_grad_()
        for value in scene.splats.parameters.values()
    ]

    def project() -> tuple[Any, ...]:
        means, log_scales, quaternions, *_ = leaves
        covariances, _ = gsplat._quat_scale_to_covar_preci(
            quaternions, torch.exp(log_scales), compute_preci=False
        )
        return gsplat._fully_fused_projection(means, covariances, poses, intrinsics, size, size)

    with torch.no_grad():
        radii, means2d, depths, conics, _ = (x if x is None else x[0].numpy() for x in project())
        opacities = torch.sigmoid(leaves[3]).numpy()
    splats, pixels = map(torch.tensor, _pairs(means2d, conics, opacities, depths, radii, size))
    if len(splats) * _BYTES_PER_PAIR > measure.free_memory():
        raise MemoryError(f"{len(splats) / 1e6:.0f} million (splat, pixel) pairs do not fit")
    images = torch.zeros_like(pixels)
    sys.modules["nerfacc"] = _nerfacc(pixels)

    def draw() -> Any:
        means, _, _, logits, coefficients = leaves
        _, means2d, _, conics, _ = project()
        bands = gsplat._spherical_harmonics(0, means - position, coefficients)
        colours = torch.clamp_min(bands + 0.5, 0.0)[None]
        opacities = torch.sigmoid(logits)[None]
        image, alpha = gsplat.accumulate(
            means2d, conics, opacities, colours, splats, pixels, images, size, size
        )
        return image[0] + (1.0 - alpha[0]) * background

    def forward() -> np.ndarray:
        with torch.no_grad():
            return draw().numpy()

    def forward_backward() -> tuple[Any, ...]:
        value = (draw() * cotangent).sum()
        return value, *torch.autograd.grad(value, leaves)

    return Candidate(forward, forward_backward, compile_s=None, on_host=True)


#: Peers by the name of their rows.
PEERS: dict[str, Callable[[Scene], Candidate]] = {"gsplat_torch": gsplat_torch, "splax": splax}


def _gsplat_maths() -> types.ModuleType:
    """gsplat/cuda/_torch_impl.py by its path: importing the package asks for CUDA."""
    package = importlib.util.find_spec("gsplat")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'gsplat'")
    path = pathlib.Path(package.submodule_search_locations[0]) / "cuda" / "_torch_impl.py"
    spec = importlib.util.spec_from_file_location("gsplat_torch_impl", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _nerfacc(rays: Any) -> types.ModuleType:
    """The two functions of nerfacc that gsplat calls, for pairs that lie ray after ray.

    Args:
        rays: Ray of each pair, ascending, (m,).
    """
    import torch

    _, lengths = torch.unique_consecutive(rays, return_counts=True)
    ends = torch.cumsum(lengths, 0)
    last = torch.repeat_interleave(ends - 1, lengths)
    first = torch.repeat_interleave(ends - lengths, lengths)

    class Transmittance(torch.autograd.Function):
        """prod (1 - alpha) over the pairs in front on the same ray."""

        @staticmethod
        def forward(context: Any, alphas: Any) -> Any:
            logs = torch.log1p(-alphas.double())
            before = torch.cumsum(logs, 0) - logs
            transmittances = torch.exp(before - before[first]).to(alphas.dtype)
            context.save_for_backward(alphas, transmittances)
            return transmittances

        @staticmethod
        def backward(context: Any, cotangent: Any) -> Any:
            alphas, transmittances = context.saved_tensors
            sums = torch.cumsum((cotangent * transmittances).double(), 0)
            return (sums - sums[last]).to(alphas.dtype) / (1.0 - alphas)

    def render_weight_from_alpha(alphas: Any, ray_indices: Any, n_rays: int) -> tuple[Any, Any]:
        transmittances = Transmittance.apply(alphas)
        return alphas * transmittances, transmittances

    def accumulate_along_rays(weights: Any, values: Any, ray_indices: Any, n_rays: int) -> Any:
        values = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, values.shape[1]).index_add(0, ray_indices, values)

    module = types.ModuleType("nerfacc")
    module.render_weight_from_alpha = render_weight_from_alpha
    module.accumulate_along_rays = accumulate_along_rays
    return module


def _pairs(
    means2d: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    depths: np.ndarray,
    radii: np.ndarray,
    size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Splat and pixel of everything that is blended, pixel after pixel, nearest first."""
    order = np.argsort(depths, kind="stable")
    order = order[(radii[order] > 0).all(axis=1)]
    means2d, conics, opacities = (x[order].astype(float) for x in (means2d, conics, opacities))
    lowest = np.clip(np.floor(means2d - radii[order]).astype(int), 0, size)
    highest = np.clip(np.ceil(means2d + radii[order]).astype(int), 0, size)
    found = []
    for begin in range(0, size, _BAND):
        low, high = lowest.copy(), highest.copy()
        low[:, 1], high[:, 1] = np.maximum(low[:, 1], begin), np.minimum(high[:, 1], begin + _BAND)
        columns, rows = np.maximum(high - low, 0).T
        k = np.repeat(np.arange(len(order)), columns * rows)
        ends = np.cumsum(columns * rows)
        row, column = np.divmod(np.arange(len(k)) - (ends - columns * rows)[k], columns[k])
        column, row = column + low[k, 0], row + low[k, 1]
        dx, dy = np.stack([column, row]) + 0.5 - means2d[k].T
        xx, xy, yy = conics[k].T
        alpha = opacities[k] * np.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)
        reached = np.flatnonzero(alpha >= ALPHA_MIN)
        by_pixel = np.argsort((row * size + column)[reached], kind="stable")
        kept = reached[by_pixel]
        pixel, logs = (row * size + column)[kept], np.log1p(-np.minimum(alpha[kept], 0.999))
        through = np.cumsum(logs)
        first = np.searchsorted(pixel, pixel)
        shown = through - (through - logs)[first] >= np.log(TRANSMITTANCE_MIN)
        found.append((order[k[kept[shown]]], pixel[shown]))
    splats, pixels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return splats, pixels
