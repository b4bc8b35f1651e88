"""HexPlane: a space-time field factored into six planes of features (Cao & Johnson 2023; 4DGS).

The field looks up a splat's canonical position and the timestamp in three spatial planes (xy, xz,
yz) and three space-time planes (xt, yt, zt), multiplies the six feature vectors, concatenates the
scales, and decodes them with a small network into changes of position, log-scale, rotation and,
optionally, opacity. Deliberate differences from the reference implementation of 4DGS
(hustvl/4DGaussians): the timestamp covers the whole of each time plane (there only half of it), the
heads start at zero, so that the field starts as the identity, and the spatial regulariser works
along both axes of a plane (there along one).

All splats of a step share one timestamp. So every space-time plane is first interpolated to the
line at that timestamp, and the splats then look up six planes, three of which are lines.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import PyTree
from gaussians.deformation import Timestamp
from gaussians.types import Splats

_SPATIAL = (("xy", 0, 1), ("xz", 0, 2), ("yz", 1, 2))
_TEMPORAL = (("xt", 0), ("yt", 1), ("zt", 2))


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
        detach_coordinates: treats the canonical position that addresses the planes as a constant in
            gradients. It saves a third of the backward pass, and the shape of the canonical object
            is then driven by the images alone, not by the slope of the field.
    """

    bound: float = 0.75
    spatial_resolution: int = 32
    time_resolution: int = 24
    multires: tuple[int, ...] = (1, 2)
    channels: int = 16
    width: int = 64
    depth: int = 2
    opacity: bool = False
    detach_coordinates: bool = True

    def __post_init__(self):
        if min(self.spatial_resolution, self.time_resolution) < 2:
            raise ValueError(
                "A HexPlane needs at least 2 nodes per axis; got spatial_resolution="
                f"{self.spatial_resolution}, time_resolution={self.time_resolution}."
            )
        if not self.bound > 0:
            raise ValueError(f"The bound of a HexPlane must be positive; got {self.bound}.")
        object.__setattr__(self, "multires", tuple(self.multires))

    @property
    def heads(self) -> dict[str, int]:
        """Name and output size of every head."""
        heads = {"position": 3, "scale": 3, "rotation": 4}
        return heads | {"opacity": 1} if self.opacity else heads

    def init(self, key: jax.Array, splats: Splats | None = None) -> PyTree:
        """Spatial planes uniform in [0.1, 0.5], time planes 1, last layers of the heads 0."""
        del splats
        keys = (jax.random.fold_in(key, i) for i in itertools.count())
        planes = []
        for factor in self.multires:
            r = self.spatial_resolution * factor
            spatial = {
                name: jax.random.uniform(next(keys), (r, r, self.channels), minval=0.1, maxval=0.5)
                for name, _, _ in _SPATIAL
            }
            temporal = {
                name: jnp.ones((self.time_resolution, r, self.channels)) for name, _ in _TEMPORAL
            }
            planes.append(spatial | temporal)
        sizes = (self.channels * len(self.multires), *(self.width,) * self.depth)
        trunk = tuple(_dense(next(keys), *size) for size in itertools.pairwise(sizes))
        heads = {
            name: {"kernel": jnp.zeros((self.width, size)), "bias": jnp.zeros(size)}
            for name, size in self.heads.items()
        }
        return {"planes": tuple(planes), "trunk": trunk, "heads": heads}

    def features(
        self, params: PyTree, positions: Float[Array, "n 3"], t: Timestamp
    ) -> Float[Array, "n f"]:
        """The concatenated products of the six planes, (n, channels * number of scales)."""
        unit = jnp.clip((positions + self.bound) / (2 * self.bound), 0, 1)
        scales = []
        for planes in params["planes"]:
            lines = {name: slice_at(planes[name], t) for name, _ in _TEMPORAL}
            looked_up = [lookup_plane(planes[name], unit[:, (a, b)]) for name, a, b in _SPATIAL]
            looked_up += [lookup_line(lines[name], unit[:, a]) for name, a in _TEMPORAL]
            scales.append(_product(tuple(looked_up)))
        return jnp.concatenate(scales, axis=-1)

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """Adds the heads' outputs to the raw (pre-activation) parameters of the splats."""
        positions = jnp.asarray(splats.means)
        if self.detach_coordinates:
            positions = jax.lax.stop_gradient(positions)
        hidden = self.features(params, positions, t)
        for layer in params["trunk"]:
            hidden = jax.nn.relu(_apply_dense(layer, hidden))
        change = _apply_heads(params["heads"], hidden)
        moved = dataclasses.replace(
            splats,
            means=splats.means + change["position"],
            log_scales=splats.log_scales + change["scale"],
            quaternions=splats.quaternions + change["rotation"],
        )
        if "opacity" in change:
            logits = splats.opacity_logits + change["opacity"][:, 0]
            moved = dataclasses.replace(moved, opacity_logits=logits)
        return moved

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Plane regularisers, each a mean over nodes and channels, summed over planes and scales.

        - `plane_tv`: squared second differences along both axes of the spatial planes, and along
          the space axis of the space-time planes.
        - `time_smoothness`: squared second differences along the time axis.
        - `time_l1`: |1 - feature| of the space-time planes; 1 is "no change over time".
        """
        plane_tv = time_smoothness = time_l1 = jnp.zeros(())
        for planes in params["planes"]:
            for name, _, _ in _SPATIAL:
                plane_tv += _roughness(planes[name], 0) + _roughness(planes[name], 1)
            for name, _ in _TEMPORAL:
                time_smoothness += _roughness(planes[name], 0)
                plane_tv += _roughness(planes[name], 1)
                time_l1 += jnp.mean(jnp.abs(1 - planes[name]))
        return {"plane_tv": plane_tv, "time_smoothness": time_smoothness, "time_l1": time_l1}

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Copies the first node of the time planes at or after `t` to all later nodes."""
        position = jnp.clip(jnp.asarray(t), 0, 1) * (self.time_resolution - 1)
        last = jnp.ceil(position - 1e-4).astype(int)  # a node, whatever the rounding of t
        later = (jnp.arange(self.time_resolution) > last)[:, None, None]
        held = [
            planes
            | {name: jnp.where(later, planes[name][last], planes[name]) for name, _ in _TEMPORAL}
            for planes in params["planes"]
        ]
        return params | {"planes": tuple(held)}

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"] | None:
        """The largest opacity at the nodes of the time planes; None without the opacity head."""
        if not self.opacity:
            return None
        instants = jnp.linspace(0, 1, self.time_resolution)
        logits = jax.lax.map(lambda t: self.apply(params, splats, t).opacity_logits, instants)
        return jax.nn.sigmoid(logits.max(axis=0))

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """The field has no parameters per splat."""
        del source
        return params


def slice_at(plane: Float[Array, "s *r"], at: Timestamp) -> Float[Array, "*r"]:
    """Linear interpolation of an array along its first axis at one scalar in [0, 1]."""
    nodes = plane.shape[0]
    weights = jnp.maximum(0, 1 - jnp.abs(jnp.clip(at, 0, 1) * (nodes - 1) - jnp.arange(nodes)))
    return jnp.tensordot(weights, plane, axes=1)


def lookup_line(line: Float[Array, "r c"], at: Float[Array, "n"]) -> Float[Array, "n c"]:
    """Linear interpolation of a line of features at points in [0, 1]."""
    cell, fraction = _cell(at, line.shape[0])
    weights = jnp.stack([1 - fraction, fraction], axis=-1)
    corners = line[jnp.stack([cell, cell + 1], axis=-1)]
    return jnp.einsum("nk,nkc->nc", weights, corners)


def lookup_plane(plane: Float[Array, "r s c"], at: Float[Array, "n 2"]) -> Float[Array, "n c"]:
    """Bilinear interpolation of a plane of features at points in [0, 1]^2."""
    rows, columns, channels = plane.shape
    row, down = _cell(at[:, 0], rows)
    column, right = _cell(at[:, 1], columns)
    first = row * columns + column
    index = jnp.stack([first, first + 1, first + columns, first + columns + 1], axis=-1)
    weights = jnp.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1
    )
    corners = plane.reshape(rows * columns, channels)[index]
    return jnp.einsum("nk,nkc->nc", weights, corners)


@jax.custom_vjp
def _product(factors: tuple[Float[Array, "n c"], ...]) -> Float[Array, "n c"]:
    """The product of all factors; see `_product_backward` for why it has a rule of its own."""
    return functools.reduce(jnp.multiply, factors)


def _product_forward(factors: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    return _product(factors), factors


def _product_backward(factors: tuple[Array, ...], cotangent: Array) -> tuple[tuple[Array, ...]]:
    """The product of all other factors, for each, by running products from both ends.

    Left alone, XLA:CPU fuses these products into the scatters that follow and computes them once
    per corner of a cell; the barrier keeps them apart.
    """
    before = list(itertools.accumulate(factors[:-1], jnp.multiply, initial=cotangent))
    after = list(itertools.accumulate(factors[:0:-1], jnp.multiply))[::-1]
    gradients = (*map(jnp.multiply, before, after), before[-1])
    return (jax.lax.optimization_barrier(gradients),)


_product.defvjp(_product_forward, _product_backward)


def _cell(at: Float[Array, "n"], nodes: int) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
    """The cell that holds each point of [0, 1], and how far into it the point lies."""
    scaled = at * (nodes - 1)
    cell = jnp.clip(jnp.floor(scaled), 0, nodes - 2)
    return cell.astype(jnp.int32), scaled - cell


def _roughness(plane: Float[Array, "r s c"], axis: int) -> Float[Array, ""]:
    if plane.shape[axis] < 3:
        return jnp.zeros(())
    return jnp.mean(jnp.diff(plane, n=2, axis=axis) ** 2)


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, Float[Array, "..."]]:
    limit = (6 / (inputs + outputs)) ** 0.5
    kernel = jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _apply_dense(
    layer: dict[str, Float[Array, "..."]], inputs: Float[Array, "n i"]
) -> Float[Array, "n o"]:
    return inputs @ layer["kernel"] + layer["bias"]


def _apply_heads(
    heads: dict[str, dict[str, Float[Array, "..."]]], hidden: Float[Array, "n w"]
) -> dict[str, Float[Array, "n _"]]:
    """All heads in one matrix product: on CPUs the passes over `hidden` are what costs."""
    names = sorted(heads)
    layer = {
        leaf: jnp.concatenate([heads[name][leaf] for name in names], axis=-1)
        for leaf in ("kernel", "bias")
    }
    stops = list(itertools.accumulate(heads[name]["bias"].shape[0] for name in names))
    outputs = jnp.split(_apply_dense(layer, hidden), stops[:-1], axis=-1)
    return dict(zip(names, outputs, strict=True))
