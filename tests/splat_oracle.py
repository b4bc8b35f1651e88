"""What the rasterizers are measured against: the definition in numpy float64, and scenes for it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax.cameras import look_at
from gaussians import rasterize as package
from gaussians.rasterize import Composite, Probe, rasterize
from gaussians.types import Camera, Splats

#: So close to one of the two thresholds, relatively, float32 may decide otherwise than float64.
UNDECIDED = 3e-4
#: Likewise for the order of two depths.
TIE = 1e-6


#: All that run on CPU; `pallas` is interpreted. `cpu` is missing where no compiler built it.
IMPLEMENTATIONS = ("reference", "pallas", *(n for n in package.available() if n != "reference"))


class Oracle:
    """Blends one splat after the other; its gradient goes from the last splat to the first.

    Attributes:
        undecided: (h, w) pixels of the last image where float32 may rightly differ.
    """

    undecided: np.ndarray

    def composite(
        self, screen, *, width, height, tile_size=None, capacity=None, alpha_max=0.99
    ) -> Composite:
        """A `CompositeFn`."""
        del tile_size, capacity
        n, f = screen.features.shape
        absolute = jnp.zeros((n, 2)) if screen.absolute is None else screen.absolute
        inputs = (screen.means2d, screen.factors, screen.opacities, screen.features, absolute)
        order = (screen.depths, screen.extents, screen.visible)
        shape = jax.ShapeDtypeStruct((height, width, f + 1), jnp.float64)

        @jax.custom_vjp
        def blend(inputs, order):
            return jax.pure_callback(
                lambda *a: self._blend(alpha_max, shape.shape, *a)[0], shape, inputs, order
            )

        def backward(saved, cotangent):
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in saved[0]]
            run = functools.partial(self._gradients, alpha_max)
            return tuple(jax.pure_callback(run, shapes, *saved, cotangent)), None

        blend.defvjp(lambda inputs, order: (blend(inputs, order), (inputs, order)), backward)
        image = blend(inputs, jax.lax.stop_gradient(order))
        return Composite(image[..., :-1], image[..., -1], jnp.zeros((), jnp.int32))

    def _blend(self, alpha_max: float, shape: tuple, inputs, order) -> tuple[np.ndarray, list]:
        means, factors, opacities, features, _ = (np.asarray(leaf, float) for leaf in inputs)
        depths, extents, visible = (np.asarray(leaf) for leaf in order)
        height, width, _ = shape
        image, transmittance = np.zeros(shape), np.ones(shape[:2])
        alive, undecided = np.ones(shape[:2], bool), np.zeros(shape[:2], bool)
        latest = np.zeros(shape[:2])  # depth of the splat in front
        steps = []
        for k in np.argsort(np.where(visible, depths, np.inf), kind="stable")[: visible.sum()]:
            low = np.floor(means[k] - extents[k] - 1).clip(0, [width, height]).astype(int)
            high = np.ceil(means[k] + extents[k] + 1).clip(0, [width, height]).astype(int)
            if np.any(low >= high):
                continue
            box = (slice(low[1], high[1]), slice(low[0], high[0]))
            dy, dx = np.mgrid[box] + 0.5 - means[k, ::-1, None, None]
            p, s, r = factors[k]
            peak = opacities[k] * np.exp(-0.5 * (p * (dx + s * dy) ** 2 + r * dy**2))
            alpha = np.minimum(peak, alpha_max)
            remaining = transmittance[box] * (1 - alpha)
            meets = (alpha >= 1 / 255) & alive[box]
            stops = meets & (remaining < 1e-4)
            blends = meets & ~stops
            weight = np.where(blends, alpha * transmittance[box], 0.0)
            undecided[box] |= alive[box] & (
                (np.abs(255 * alpha - 1) < UNDECIDED)
                | (meets & (np.abs(1e4 * remaining - 1) < UNDECIDED))
                | (meets & (depths[k] - latest[box] < TIE * depths[k]))
            )
            steps.append((k, box, dx, dy, peak, weight, np.where(blends, transmittance[box], 0.0)))
            image[box] += weight[..., None] * np.append(features[k], 1.0)
            transmittance[box] = np.where(blends, remaining, transmittance[box])
            latest[box] = np.where(meets, depths[k], latest[box])
            alive[box] &= ~stops
        self.undecided = undecided
        return image, steps

    def _gradients(self, alpha_max: float, inputs, order, cotangent) -> list[np.ndarray]:
        _, factors, opacities, features, _ = (np.asarray(leaf, float) for leaf in inputs)
        cotangent = np.asarray(cotangent)
        _, steps = self._blend(alpha_max, cotangent.shape, inputs, order)
        results = [np.zeros(leaf.shape) for leaf in inputs]
        to_means, to_factors, to_opacities, to_features, absolute = results
        behind = np.zeros(cotangent.shape[:2])  # of cotangent . output
        for k, box, dx, dy, peak, weight, transmittance in reversed(steps):
            p, s, r = factors[k]
            gain = cotangent[box] @ np.append(features[k], 1.0)
            alpha = np.minimum(peak, alpha_max)
            to_alpha = transmittance * gain - behind[box] / (1 - alpha)
            to_peak = np.where((weight > 0) & (peak <= alpha_max), to_alpha, 0.0)
            energy = to_peak * peak
            conic = np.array([[p, p * s], [p * s, p * s * s + r]])
            pulls = energy[..., None] * (np.stack([dx, dy], -1) @ conic)
            to_means[k], absolute[k] = pulls.sum((0, 1)), np.abs(pulls).sum((0, 1))
            u = dx + s * dy
            moments = [-0.5 * u**2, -p * u * dy, -0.5 * dy**2]
            to_factors[k] = [np.sum(energy * moment) for moment in moments]
            to_opacities[k] = np.sum(to_peak * peak / opacities[k])
            to_features[k] = np.tensordot(weight, cotangent[box][..., :-1], 2)
            behind[box] += weight * gain
        return results


@dataclasses.dataclass(frozen=True)
class Scene:
    """Splats, one camera, and options of `rasterize`."""

    parameters: dict[str, np.ndarray]
    camera: Camera
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    background: tuple[float, float, float] = (0.2, 0.5, 0.8)
    blur: float = 0.3


def make_scene(
    n: int,
    *,
    sigma: tuple[float, float] = (0.02, 0.08),
    logits: tuple[float, float] = (-2.0, 2.0),
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0),
    shell: bool = False,
    degree: int = 0,
    size: tuple[int, int] = (53, 38),
    blur: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> Scene:
    """Splats in the unit ball, or on its surface, two units before an off-centre camera.

    Args:
        n: how many.
        sigma: range of standard deviations, world units.
        logits: range of the opacity logits.
        stretch: factors on the three standard deviations.
        shell: all on the sphere, flat on it.
        degree: of the spherical harmonics.
        size: width and height, pixels.
        blur: of `rasterize`, which is differentiated by it.
        seed: of everything.
        **options: of `rasterize`.
    """
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    radius = 0.8 if shell else rng.uniform(size=(n, 1)) ** (1 / 3)
    scales = np.exp(rng.uniform(*np.log(sigma), (n, 3))) * stretch
    quaternions = rng.normal(size=(n, 4))
    if shell:  # the third axis along the radius
        scales[:, 2] *= 0.02
        x, y, z = directions.T
        quaternions = np.stack([1 + z, -y, x, np.zeros(n)], axis=-1) + 1e-6
    coefficients = rng.normal(size=(n, (degree + 1) ** 2, 3))
    coefficients[:, 1:] *= 0.3
    parameters = {
        "means": directions * radius,
        "log_scales": np.log(scales),
        "quaternions": quaternions,
        "opacity_logits": rng.uniform(*logits, n),
        "sh": coefficients,
    }
    width, height = size
    focal = 1.2 * width
    intrinsics = [[focal, 0, 0.45 * width], [0, 1.05 * focal, 0.56 * height], [0, 0, 1]]
    pose = look_at(np.array([1.2, -1.5, 0.7]))
    return Scene(
        {name: np.asarray(value, np.float32) for name, value in parameters.items()},
        Camera(pose, np.asarray(intrinsics, np.float32), width, height),
        options,
        blur=blur,
    )


SCENES: dict[str, Callable[[], Scene]] = {
    "sparse": lambda: make_scene(60, degree=3),
    "dense": lambda: make_scene(2000, logits=(0.0, 6.0), alpha_max=0.999, antialiased=True),
    "needles": lambda: make_scene(300, sigma=(0.004, 0.006), stretch=(120, 1, 1), degree=1),
    "huge": lambda: make_scene(12, sigma=(0.5, 3.0), logits=(-3.0, 1.0)),
    "shells": lambda: make_scene(800, shell=True, logits=(-1.0, 4.0), near=1.4, far=2.6),
    "sharp": lambda: make_scene(300, sigma=(0.002, 0.006), blur=0.01),
    "one": lambda: make_scene(1, sigma=(0.2, 0.3)),
    "none": lambda: make_scene(0),
    "culled": lambda: make_scene(30, near=5.0),
    "10k": lambda: make_scene(10_000, sigma=(0.008, 0.024), size=(96, 96), degree=1),
    "50k": lambda: make_scene(50_000, sigma=(0.003, 0.012), size=(36, 28)),
}


def differentiable(scene: Scene, dtype: Any) -> dict[str, Any]:
    """Every float input that has a gradient, the probe included."""
    n = len(scene.parameters["means"])
    cast = functools.partial(jnp.asarray, dtype=dtype)
    inputs = {name: cast(value) for name, value in scene.parameters.items()}
    inputs |= {
        "world_to_camera": cast(scene.camera.world_to_camera),
        "intrinsics": cast(scene.camera.intrinsics),
        "background": cast(scene.background),
        "blur": cast(scene.blur),
    }
    return inputs | {"mean2d": cast(np.zeros((n, 2))), "absolute": cast(np.zeros((n, 2)))}


#: Enough pairs for the scenes whose splats are wider than the default capacity foresees.
CAPACITY = {"needles": 2**14, "huge": 2**10}


def draw(scene: Scene, inputs: dict[str, Any], implementation: str, **options: Any):
    """The render of the inputs, which `differentiable` made of the scene."""
    names = ("means", "log_scales", "quaternions", "opacity_logits", "sh")
    active = jnp.ones(len(inputs["means"]), bool)
    return rasterize(
        Splats(**{name: inputs[name] for name in names}, active=active),
        dataclasses.replace(
            scene.camera,
            world_to_camera=inputs["world_to_camera"],
            intrinsics=inputs["intrinsics"],
        ),
        inputs["background"],
        implementation=implementation,
        blur=inputs["blur"],
        probe=Probe(inputs["mean2d"], inputs["absolute"]),
        **{**scene.options, **options},
    )


def weighted_sum(render, weights: dict[str, Any]):
    """A scalar that depends on all images of a render, for gradients."""
    return sum(jnp.sum(getattr(render, name) * weight) for name, weight in weights.items())


@functools.cache
def exact(name: str) -> tuple[dict, dict, dict, np.ndarray]:
    """Images, weights for `weighted_sum`, its gradients, undecided pixels; all in float64."""
    scene, oracle = SCENES[name](), Oracle()
    package._IMPLEMENTATIONS["oracle"] = package._Implementation(oracle.composite)
    # Not jax.enable_x64, which the threads that run callbacks do not see.
    jax.config.update("jax_enable_x64", True)
    try:
        inputs = differentiable(scene, np.float64)
        render = jax.jit(lambda inputs: draw(scene, inputs, "oracle"))(inputs)
        images = {
            image: np.asarray(getattr(render, image))
            for image in ("rgb", "alpha", "depth", "expected_depth")
        }
        undecided = oracle.undecided
        rng = np.random.default_rng(5)
        # Not centred at zero, where sums over all pixels and splats would nearly cancel.
        weights = {name: rng.normal(0.5, size=image.shape) for name, image in images.items()}
        for weight in weights.values():
            weight[undecided] = 0.0
        gradients = jax.jit(
            jax.grad(lambda inputs: weighted_sum(draw(scene, inputs, "oracle"), weights))
        )(inputs)
        return images, weights, jax.tree.map(np.asarray, gradients), undecided
    finally:
        jax.config.update("jax_enable_x64", False)
        del package._IMPLEMENTATIONS["oracle"]
