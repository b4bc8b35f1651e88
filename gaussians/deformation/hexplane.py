"""HexPlane: a space-time field factored into six planes of features (Cao & Johnson 2023; 4DGS).

The field looks up a splat's canonical position and the timestamp in three spatial planes (xy, xz,
yz) and three space-time planes (xt, yt, zt), multiplies the six feature vectors, concatenates the
scales, and decodes them with a small network into changes of position, log-scale, rotation and,
optionally, opacity and colour. Deliberate differences from the reference implementation of 4DGS
(hustvl/4DGaussians): the timestamp covers the whole of each time plane (there only half of it), the
heads start at zero, so that the field starts as the identity, and the spatial regulariser works
along both axes of a plane (there along one). `compat="4dgs"` makes the reference's choices.

All splats of a step share one timestamp. So every space-time plane is first interpolated to the
line at that timestamp, and the splats then look up six planes, three of which are lines.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import PyTree
from gaussians.deformation import Timestamp
from gaussians.deformation.planes import lookup_line, lookup_plane, sample, slice_at
from gaussians.types import Splats

__all__ = ["HexPlane", "lookup_line", "lookup_plane", "slice_at"]

_SPATIAL = ("xy", "xz", "yz")
_TEMPORAL = ("xt", "yt", "zt")


@register("deformation", "hexplane")
@dataclasses.dataclass(frozen=True)
class HexPlane:
    """Sizes of the field; its parameters are a dict of arrays.

    Attributes:
        bound: the planes cover [-bound, bound]^3 of canonical space; outside, the border holds.
        spatial_resolution: nodes along x, y and z at the first scale.
        time_resolution: nodes along t, at t = 0, 1/(n-1), ..., 1, the same at every scale.
        multires: factors on `spatial_resolution`, one per scale.
        channels: features per plane and scale.
        width: of the hidden layers.
        depth: number of hidden layers, which all heads share.
        opacity: whether a fourth head changes the opacity logit over time.
        sh: whether another head changes the spherical-harmonic coefficients over time, all that the
            splats have.
        detach_coordinates: treats the canonical position that addresses the planes as a constant in
            gradients. It saves a third of the backward pass, and the shape of the canonical object
            is then driven by the images alone, not by the slope of the field.
        compat: None, or "4dgs" for what the reference does and the sizes above cannot say:

            - t = 0 lies in the middle of each time plane: the first half of its nodes is idle.
            - Every head has a hidden layer of its own, of `width`, after the shared ones.
            - The last layers start like all others (Xavier), and biases uniform in
              +-1/sqrt(inputs): the field does not start as the identity.
            - `plane_tv` looks along the second axis of the spatial planes alone.

            For D-NeRF its sizes are `spatial_resolution=64, channels=32, width=64, depth=1`
            (`defor_depth` 0 or 1 there), `time_resolution` 25 to 100, `bound` the half side of the
            initial points (1.3 for the random cube), and `detach_coordinates=False`.

    Raises:
        ValueError: a size is out of its range, or `compat` unknown.
    """

    bound: float = 0.75
    spatial_resolution: int = 32
    time_resolution: int = 24
    multires: tuple[int, ...] = (1, 2)
    channels: int = 16
    width: int = 64
    depth: int = 2
    opacity: bool = False
    sh: bool = False
    detach_coordinates: bool = True
    compat: str | None = None

    def __post_init__(self):
        if min(self.spatial_resolution, self.time_resolution) < 2:
            raise ValueError(
                "A HexPlane needs at least 2 nodes per axis; got spatial_resolution="
                f"{self.spatial_resolution}, time_resolution={self.time_resolution}."
            )
        if not self.bound > 0:
            raise ValueError(f"The bound of a HexPlane must be positive; got {self.bound}.")
        if self.depth < 1:
            raise ValueError(f"A HexPlane needs at least 1 hidden layer; got depth={self.depth}.")
        if self.compat not in (None, "4dgs"):
            raise ValueError(f"compat={self.compat!r} is unknown to HexPlane; use None or '4dgs'.")
        object.__setattr__(self, "multires", tuple(self.multires))

    def init(self, key: jax.Array, splats: Splats | None = None) -> PyTree:
        """Spatial planes uniform in [0.1, 0.5], time planes 1, last layers of the heads 0.

        The field is then the identity; not so with `compat="4dgs"`.

        Args:
            key: of the random numbers.
            splats: tell the head `sh` how many coefficients there are; not needed without it.

        Raises:
            ValueError: `sh` without splats.
        """
        keys = (jax.random.fold_in(key, i) for i in itertools.count())
        planes = []
        for factor in self.multires:
            r = self.spatial_resolution * factor
            spatial = {
                name: jax.random.uniform(next(keys), (r, r, self.channels), minval=0.1, maxval=0.5)
                for name in _SPATIAL
            }
            temporal = {
                name: jnp.ones((self.time_resolution, r, self.channels)) for name in _TEMPORAL
            }
            planes.append(spatial | temporal)
        sizes = (self.channels * len(self.multires), *(self.width,) * self.depth)
        trunk = tuple(_dense(next(keys), *size) for size in itertools.pairwise(sizes))
        heads: dict[str, Any] = {
            name: {"kernel": jnp.zeros((self.width, size)), "bias": jnp.zeros(size)}
            for name, size in self._head_sizes(splats).items()
        }
        if self.compat:
            trunk = tuple(_with_biases(next(keys), layer) for layer in trunk)
            for name, head in heads.items():
                shapes = ((self.width, self.width), head["kernel"].shape)
                hidden, last = (
                    _with_biases(next(keys), _dense(next(keys), *shape)) for shape in shapes
                )
                heads[name] = last | {"hidden": hidden}
        return {"planes": tuple(planes), "trunk": trunk, "heads": heads}

    def _head_sizes(self, splats: Splats | None) -> dict[str, int]:
        """Name and output size of every head."""
        sizes = {"position": 3, "scale": 3, "rotation": 4}
        if self.opacity:
            sizes["opacity"] = 1
        if self.sh:
            if splats is None:
                raise ValueError(
                    "HexPlane.init needs the splats when sh=True: their degree is the head's size."
                )
            sizes["sh"] = 3 * splats.sh.shape[-2]
        return sizes

    def features(
        self, params: PyTree, positions: Float[Array, "n 3"], t: Timestamp
    ) -> Float[Array, "n f"]:
        """The concatenated products of the six planes, (n, channels * number of scales).

        With `detach_coordinates`, no gradient reaches the positions.
        """
        if self.detach_coordinates:
            positions = jax.lax.stop_gradient(positions)
        unit = jnp.clip((positions + self.bound) / (2 * self.bound), 0, 1)
        at = self._on_time_planes(t)
        spatial = tuple(tuple(planes[name] for name in _SPATIAL) for planes in params["planes"])
        lines = tuple(
            tuple(slice_at(planes[name], at) for name in _TEMPORAL) for planes in params["planes"]
        )
        return sample(spatial, lines, unit, not self.detach_coordinates)

    def _on_time_planes(self, t: Timestamp) -> Timestamp:
        """Where a timestamp lies on the time planes, from 0 at the first node to 1 at the last."""
        return (1 + t) / 2 if self.compat else t

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """Adds the heads' outputs to the raw (pre-activation) parameters of the splats.

        Raises:
            ValueError: the splats have not as many coefficients as the head `sh` was made for.
        """
        features = self.features(params, jnp.asarray(splats.means), t)
        change = _decode(params["trunk"], params["heads"], features)
        moved = splats.with_parameters({
            "means": splats.means + change["position"],
            "log_scales": splats.log_scales + change["scale"],
            "quaternions": splats.quaternions + change["rotation"],
        })  # fmt: skip
        if "opacity" in change:
            logits = splats.opacity_logits + change["opacity"][:, 0]
            moved = dataclasses.replace(moved, opacity_logits=logits)
        if "sh" in change:
            made_for, coefficients = change["sh"].shape[-1] // 3, splats.sh.shape[-2]
            if made_for != coefficients:
                raise ValueError(
                    f"The SH head of this HexPlane is for splats with {made_for} coefficients, "
                    f"these have {coefficients}: call init with splats of this degree."
                )
            coloured = splats.sh + change["sh"].reshape(splats.sh.shape)
            moved = dataclasses.replace(moved, sh=coloured)
        return moved

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Plane regularisers, each a mean over nodes and channels, summed over planes and scales.

        - `plane_tv`: squared second differences along both axes of the spatial planes, and along
          the space axis of the space-time planes; with `compat="4dgs"` along the second axis of
          the spatial planes alone (y, z and z of xy, xz and yz).
        - `time_smoothness`: squared second differences along the time axis.
        - `time_l1`: |1 - feature| of the space-time planes; 1 is "no change over time".
        """
        plane_tv = time_smoothness = time_l1 = jnp.zeros(())
        for planes in params["planes"]:
            for name in _SPATIAL:
                plane_tv += _roughness(planes[name], 1)
                if not self.compat:
                    plane_tv += _roughness(planes[name], 0)
            for name in _TEMPORAL:
                time_smoothness += _roughness(planes[name], 0)
                if not self.compat:
                    plane_tv += _roughness(planes[name], 1)
                time_l1 += jnp.mean(jnp.abs(1 - planes[name]))
        return {"plane_tv": plane_tv, "time_smoothness": time_smoothness, "time_l1": time_l1}

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Copies the first node of the time planes at or after `t` to all later nodes."""
        position = jnp.clip(self._on_time_planes(t), 0, 1) * (self.time_resolution - 1)
        last = jnp.ceil(position - 1e-4).astype(int)  # a node, whatever the rounding of t
        later = (jnp.arange(self.time_resolution) > last)[:, None, None]
        held = [
            planes
            | {name: jnp.where(later, planes[name][last], planes[name]) for name in _TEMPORAL}
            for planes in params["planes"]
        ]
        return params | {"planes": tuple(held)}

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"] | None:
        """The largest opacity at the nodes of the time planes; None without the opacity head."""
        if not self.opacity:
            return None
        start = -1 if self.compat else 0
        instants = np.unique(np.maximum(np.linspace(start, 1, self.time_resolution), 0))
        logits = jax.lax.map(
            lambda t: self.apply(params, splats, t).opacity_logits, jnp.asarray(instants)
        )
        return jax.nn.sigmoid(logits.max(axis=0))

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """The field has no parameters per splat."""
        del source
        return params


def _roughness(plane: Float[Array, "r s c"], axis: int) -> Float[Array, ""]:
    if plane.shape[axis] < 3:
        return jnp.zeros(())
    return jnp.mean(jnp.diff(plane, n=2, axis=axis) ** 2)


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, Float[Array, "..."]]:
    limit = (6 / (inputs + outputs)) ** 0.5
    kernel = jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _with_biases(
    key: jax.Array, layer: dict[str, Float[Array, "..."]]
) -> dict[str, Float[Array, "..."]]:
    """The layer with biases uniform in +-1/sqrt(inputs), as PyTorch starts them."""
    inputs, outputs = layer["kernel"].shape
    limit = inputs**-0.5
    return layer | {"bias": jax.random.uniform(key, (outputs,), minval=-limit, maxval=limit)}


def _decode(
    trunk: tuple[dict[str, Float[Array, "..."]], ...],
    heads: dict[str, dict[str, Any]],
    features: Float[Array, "n f"],
) -> dict[str, Float[Array, "n _"]]:
    """The outputs of all heads. One column per splat: on CPUs that suits the backward pass better.

    Heads without hidden layers of their own share one matrix product: there, what costs is the
    passes over `hidden`.
    """
    hidden = features.T
    for layer in trunk:
        hidden = jax.nn.relu(_apply_dense(layer, hidden))
    names = sorted(heads)
    if all("hidden" in heads[name] for name in names):
        own = {name: jax.nn.relu(_apply_dense(heads[name]["hidden"], hidden)) for name in names}
        return {name: _apply_dense(heads[name], own[name]).T for name in names}
    layer = {
        leaf: jnp.concatenate([heads[name][leaf] for name in names], axis=-1)
        for leaf in ("kernel", "bias")
    }
    stops = list(itertools.accumulate(heads[name]["bias"].shape[0] for name in names))
    outputs = jnp.split(_apply_dense(layer, hidden), stops[:-1])
    return {name: output.T for name, output in zip(names, outputs, strict=True)}


def _apply_dense(layer: dict[str, Any], inputs: Float[Array, "i n"]) -> Float[Array, "o n"]:
    return layer["kernel"].T @ inputs + layer["bias"][:, None]
