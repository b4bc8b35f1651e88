"""The values that pass between the parts of `gaussians`: splats, and the camera that sees them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from d4d_jax import pytree
from d4d_jax.cameras import Camera
from d4d_jax.typing import AnyArray
from gaussians import sh as spherical_harmonics

__all__ = ["Camera", "Splats"]

_FLOAT_FIELDS = ("means", "log_scales", "quaternions", "opacity_logits", "sh")


@pytree.dataclass
class Splats:
    """A fixed number of slots for Gaussians; a slot counts only where `active`.

    The fields are the raw, unconstrained numbers an optimizer moves (3D Gaussian Splatting,
    Kerbl et al. 2023): the renderer takes exp(log_scales), quaternions / |quaternions| and
    sigmoid(opacity_logits). The number of slots `n` never changes during an optimization, so that
    every step has the same shapes and compiles once; densification switches slots on and off.

    `active` is boolean, so a gradient is taken with respect to `parameters`, a plain dict:

        def loss(parameters):
            return render_loss(splats.with_parameters(parameters))
        gradients = jax.grad(loss)(splats.parameters)

    Attributes:
        means: World positions, (n, 3).
        log_scales: Natural logarithms of the standard deviations along the three axes, (n, 3).
        quaternions: Rotation of the axes into the world, order w x y z, any norm above 0, (n, 4).
        opacity_logits: Inverse sigmoid of the peak opacity, (n,).
        sh: Spherical-harmonic colour coefficients, (n, k, 3) with k = 1, 4, 9 or 16 (degree 0-3).
        active: Which slots hold a Gaussian, (n,).

    Raises:
        ValueError: When two fields disagree on the number of slots or a shape is wrong.
    """

    means: Float[AnyArray, "*b n 3"]
    log_scales: Float[AnyArray, "*b n 3"]
    quaternions: Float[AnyArray, "*b n 4"]
    opacity_logits: Float[AnyArray, "*b n"]
    sh: Float[AnyArray, "*b n k 3"]
    active: Bool[AnyArray, "*b n"]

    def __post_init__(self) -> None:
        slots = np.shape(self.means)[:-1]
        coefficients = np.shape(self.sh)[-2] if np.ndim(self.sh) > 1 else 0
        spherical_harmonics.degree_of(coefficients)
        expected = {
            "means": (*slots, 3),
            "log_scales": (*slots, 3),
            "quaternions": (*slots, 4),
            "opacity_logits": slots,
            "sh": (*slots, coefficients, 3),
            "active": slots,
        }
        for name, shape in expected.items():
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(
                    f"Splats.{name} has shape {np.shape(getattr(self, name))}, but means of shape "
                    f"{np.shape(self.means)} ask for {shape}."
                )

    def __len__(self) -> int:
        """The number of slots, active or not."""
        return self.means.shape[-2]

    @property
    def sh_degree(self) -> int:
        """The degree the coefficients reach: 0, 1, 2 or 3."""
        return spherical_harmonics.degree_of(self.sh.shape[-2])

    @property
    def parameters(self) -> dict[str, Any]:
        """The five float fields by name: what an optimizer sees."""
        return {name: getattr(self, name) for name in _FLOAT_FIELDS}

    def with_parameters(self, parameters: dict[str, Any]) -> "Splats":
        """The same active mask with other float fields; names not given stay as they are."""
        unknown = sorted(set(parameters) - set(_FLOAT_FIELDS))
        if unknown:
            raise ValueError(
                f"Splats has no parameters {unknown}; it has {', '.join(_FLOAT_FIELDS)}."
            )
        return dataclasses.replace(self, **parameters)

    @classmethod
    def from_points(
        cls,
        points: Float[AnyArray, "n 3"],
        colours: Float[AnyArray, "n 3"],
        *,
        scale: float | Float[AnyArray, "n"],
        opacity: float = 0.1,
        capacity: int | None = None,
        sh_degree: int = 0,
    ) -> "Splats":
        """Round splats at points, the rest of the capacity inactive.

        Args:
            points: World positions.
            colours: RGB in [0, 1], the same from every side.
            scale: Standard deviation in world units, one for all or one per point.
            opacity: Peak opacity in (0, 1).
            capacity: Number of slots; default as many as points.
            sh_degree: Degree of the coefficients kept (those above 0 start at 0).

        Raises:
            ValueError: When the points exceed the capacity or a number is out of its range.
        """
        points, colours = jnp.asarray(points, jnp.float32), jnp.asarray(colours, jnp.float32)
        n = points.shape[0]
        capacity = n if capacity is None else capacity
        if n > capacity:
            raise ValueError(f"{n} points do not fit a capacity of {capacity} splats; raise it.")
        if not 0.0 < opacity < 1.0:
            raise ValueError(f"opacity {opacity} is outside (0, 1).")
        if not np.all(np.asarray(scale) > 0.0):
            raise ValueError("scale must be above 0: it is the standard deviation of a splat.")
        coefficients = jnp.zeros((n, (sh_degree + 1) ** 2, 3))
        coefficients = coefficients.at[:, 0].set(spherical_harmonics.from_rgb(colours))
        log_scales = jnp.log(jnp.asarray(scale, jnp.float32)).reshape(-1, 1)
        logit = float(np.log(opacity / (1.0 - opacity)))

        def pad(values: Any, fill: float) -> Any:
            widths = [(0, capacity - n)] + [(0, 0)] * (values.ndim - 1)
            return jnp.pad(values, widths, constant_values=fill)

        identity = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (capacity, 4))
        return cls(
            means=pad(points, 0.0),
            log_scales=pad(jnp.broadcast_to(log_scales, (n, 3)), -5.0),
            quaternions=identity,
            opacity_logits=pad(jnp.full((n,), logit, jnp.float32), -5.0),
            sh=pad(coefficients, 0.0),
            active=jnp.arange(capacity) < n,
        )
