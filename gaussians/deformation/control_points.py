"""Control points: a few hundred nodes move, and the splats follow (SC-GS, Huang et al. 2024).

Every node has a place in canonical space, and a rotation and a translation that change over time.
A splat is carried by its nearest nodes, as a skin by its bones (linear blend skinning). Compared
with a dense field such as HexPlane this has few degrees of freedom, and the motion of the nodes can
be asked to be as rigid as possible, which decides what a single orbit leaves open.

Deliberate differences from the reference implementation (yihua7/SC-GS):

- By default the nodes' poses are stored in a table over the instants of the clip, instead of being
  computed by a network of position and time. On short clips that is faster, each frame can be
  tracked from its neighbour's pose, and `hold` is exact. `motion="mlp"` has the network.
- Nodes turn the splats that they carry: positions by blended rigid motions (there only with
  `local_frame`), orientations by composing rotations (there by adding quaternions). So a rigid
  motion of all nodes is exactly a rigid motion of the splats.
- Weights have no floor of 1e-7: a splat far from all nodes follows the nearest, not the mean.
- Nodes have no hyper coordinates.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import AnyArray, PyTree
from gaussians.deformation import Timestamp, rigidity
from gaussians.deformation.hexplane import slice_at
from gaussians.projection import rotation_matrices
from gaussians.types import Splats

_TINY = 1e-8  # of sums of opacities, and of squared world units
_OPAQUE = 2.2  # opacity logit of a node that is shown itself: 0.9


@register("deformation", "control_points")
@dataclasses.dataclass(frozen=True)
class ControlPoints:
    """Sizes of the field; its parameters are a dict of arrays.

    `{"nodes": {"positions", "log_radii", "weight_logits"}}`, leading axis m, and the motion:
    `{"poses": {"translations", "rotations"}}`, leading axes (time_resolution, m) and 0 at rest, or
    `{"network": ...}`.

    Attributes:
        num_nodes: m. With fewer active splats than nodes, the nodes left over coincide with
            others. SC-GS takes 512.
        neighbours: nodes that carry a splat.
        graph_neighbours: links per node that `arap` keeps rigid.
        tolerance: stretch of a link beyond which `arap` grows no longer with its square.
        motion: "table", poses at `time_resolution` instants with linear interpolation between them,
            or "mlp", SC-GS's network of a node's position and the time.
        time_resolution: instants 0, 1/(n-1), ..., 1 of the table. With "mlp" the regularisers look
            at these.
        radius: width of a node's Gaussian weight at the start, over the mean distance to its
            nearest nodes. SC-GS starts from a tenth of the scene for all.
        scales: whether nodes also change the scales of the splats, as SC-GS's do. Off by default:
            from one side, growing and coming closer look alike.
        detach_coordinates: treats the canonical position of a splat as a constant in its weights,
            as SC-GS does. Its motion with the nodes keeps its gradient.
        depth: hidden layers of the network, the input joining again in the middle; SC-GS has 8.
        width: of the hidden layers; SC-GS has 256.
        position_frequencies: octaves of the position's encoding, from 1 radian per world unit.
        time_frequencies: octaves of the time's encoding, from 1 radian per clip.
    """

    num_nodes: int = 200
    neighbours: int = 3
    graph_neighbours: int = 8
    tolerance: float = 0.1
    motion: str = "table"
    time_resolution: int = 24
    radius: float = 0.8
    scales: bool = False
    detach_coordinates: bool = True
    depth: int = 4
    width: int = 128
    position_frequencies: int = 10
    time_frequencies: int = 6

    def __post_init__(self):
        for name in ("neighbours", "graph_neighbours"):
            if not 0 < getattr(self, name) < self.num_nodes:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1 and below"
                    f" num_nodes={self.num_nodes}."
                )
        if self.motion not in ("table", "mlp"):
            raise ValueError(f"motion must be 'table' or 'mlp'; got {self.motion!r}.")
        if self.time_resolution < 2:
            raise ValueError(
                f"Control points need at least 2 instants; got time_resolution="
                f"{self.time_resolution}."
            )
        if not self.radius > 0:
            raise ValueError(f"The radius of control points must be positive; got {self.radius}.")
        if min(self.depth, self.width) < 1:
            raise ValueError(
                f"The network of control points needs at least one layer of width 1; got depth="
                f"{self.depth}, width={self.width}."
            )
        if min(self.position_frequencies, self.time_frequencies) < 0:
            raise ValueError(
                "Numbers of frequencies cannot be negative; got position_frequencies="
                f"{self.position_frequencies}, time_frequencies={self.time_frequencies}."
            )

    @property
    def heads(self) -> dict[str, int]:
        """Name and size of what a node's pose consists of."""
        heads = {"translations": 3, "rotations": 4}
        return heads | {"log_scales": 3} if self.scales else heads

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        """Nodes at the farthest points of the active splats, at rest; no randomness in a table."""
        means = jnp.asarray(splats.means)
        places = farthest_points(means, self.num_nodes, jnp.asarray(splats.active))
        positions = means[places]
        others = positions[rigidity.neighbour_graph(positions, self.neighbours)[0]]
        spacing = jnp.linalg.norm(others - positions[:, None], axis=-1).mean(axis=-1)
        # A node that coincides with others gets a narrow weight of its own, not an infinite one.
        spacing = jnp.maximum(spacing, 1e-3 * spacing.max() + 1e-6)
        nodes = {
            "positions": positions,
            "log_radii": jnp.log(self.radius * spacing),
            "weight_logits": jnp.zeros(self.num_nodes),
        }
        if self.motion == "mlp":
            return {"nodes": nodes, "network": self._init_network(key)}
        shape = (self.time_resolution, self.num_nodes)
        return {
            "nodes": nodes,
            "poses": {name: jnp.zeros((*shape, size)) for name, size in self.heads.items()},
        }

    def poses(self, params: PyTree, t: Timestamp) -> dict[str, Float[Array, "m _"]]:
        """What the nodes do at `t`.

        Returns:
            `translations` (m, 3) of the nodes themselves; `rotations` (m, 4), unit quaternions
            w x y z, about the nodes; with `scales`, `log_scales` (m, 3) to add.
        """
        if self.motion == "mlp":
            stops = list(itertools.accumulate(self.heads.values()))
            outputs = jnp.split(self._network(params, t), stops[:-1], axis=-1)
            poses = dict(zip(self.heads, outputs, strict=True))
        else:
            poses = {name: slice_at(params["poses"][name], t) for name in self.heads}
        return poses | {"rotations": _unit(poses["rotations"].at[:, 0].add(1.0))}

    def weights(
        self, params: PyTree, positions: Float[AnyArray, "n 3"]
    ) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
        """Which nodes carry which splat.

        Returns:
            The nearest nodes of every canonical position, nearest first, and their shares,
            proportional to sigmoid(weight_logit) exp(-d^2 / (2 radius^2)), which sum to 1.
        """
        if self.detach_coordinates:
            positions = jax.lax.stop_gradient(positions)
        nodes = params["nodes"]
        index = rigidity.nearest(positions, nodes["positions"], self.neighbours)
        precision = 0.5 * jnp.exp(-2 * nodes["log_radii"])
        share = jax.nn.log_sigmoid(nodes["weight_logits"])
        near = jnp.column_stack([nodes["positions"], precision, share])[index]
        squared = jnp.sum((positions[:, None] - near[..., :3]) ** 2, axis=-1)
        return index, jax.nn.softmax(near[..., 4] - near[..., 3] * squared, axis=-1)

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """Moves the splats by sum_k w_k (R_k (x - n_k) + n_k + t_k), and turns them likewise.

        Their colours stay fixed to the world: spherical harmonics above degree 0 do not turn.
        """
        poses = self.poses(params, t)
        # Changes instead of motions, R - I and so on, so that rest is exactly the identity.
        turn = rotation_matrices(poses["rotations"]) - jnp.eye(3, dtype=poses["rotations"].dtype)
        offset = poses["translations"] - _transform(turn, params["nodes"]["positions"])
        extra = [poses["log_scales"]] if self.scales else []
        table = jnp.column_stack([turn.reshape(-1, 9), offset, *extra, poses["rotations"]])

        means, active = jnp.asarray(splats.means), jnp.asarray(splats.active)
        positions = jnp.where(active[:, None], means, 0.0)  # unused slots hold any numbers
        index, weights = self.weights(params, positions)
        rows = table[index]
        blended = jnp.einsum("nk,nkc->nc", weights, rows[..., :-4])
        change = _transform(blended[:, :9].reshape(-1, 3, 3), positions) + blended[:, 9:12]
        moved = dataclasses.replace(
            splats,
            means=means + change,
            quaternions=_compose(_blend(weights, rows[..., -4:]), splats.quaternions),
        )
        if self.scales:
            moved = dataclasses.replace(moved, log_scales=splats.log_scales + blended[:, 12:])
        return moved

    def skeleton(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The nodes themselves as splats, for SC-GS's first stage, which fits only them.

        A node is an opaque ball as large, and of the mean colour, as the splats that it carries.
        Only its motion, and where it sits, get a gradient.

        Returns:
            As many slots as `splats` has, of which the first m are nodes. Nodes that carry nothing
            are not active.

        Raises:
            ValueError: fewer slots than nodes.
        """
        slots, nodes = len(splats), self.num_nodes
        if slots < nodes:
            raise ValueError(
                f"{nodes} nodes do not fit in {slots} slots: raise the capacity of the splats."
            )
        poses = self.poses(params, t)
        moved = params["nodes"]["positions"] + poses["translations"]
        params, splats = jax.lax.stop_gradient((params, splats))
        active = jnp.asarray(splats.active)
        positions = jnp.where(active[:, None], splats.means, 0.0)
        colours = jnp.where(active[:, None, None], splats.sh, 0.0)
        index, shares = self.weights(params, positions)
        shares = shares * jnp.where(active, jax.nn.sigmoid(splats.opacity_logits), 0.0)[:, None]
        table = jnp.column_stack([positions, positions**2, colours.reshape(slots, -1)])
        carried = jnp.zeros(nodes).at[index].add(shares)
        sums = jnp.zeros((nodes, table.shape[1])).at[index].add(shares[..., None] * table[:, None])
        mean, square, colour = jnp.split(sums / (carried[:, None] + _TINY), (3, 6), axis=1)
        variance = jnp.maximum(jnp.mean(square - mean**2, axis=1, keepdims=True), _TINY)

        def padded(rows: Array) -> Array:
            return jnp.zeros((slots, *rows.shape[1:]), rows.dtype).at[:nodes].set(rows)

        return Splats(
            means=padded(moved),
            log_scales=padded(jnp.broadcast_to(0.5 * jnp.log(variance), (nodes, 3))),
            quaternions=padded(poses["rotations"]).at[nodes:, 0].set(1.0),
            opacity_logits=padded(jnp.full(nodes, _OPAQUE)),
            sh=padded(colour.reshape(nodes, -1, 3)),
            active=padded(carried > _TINY),
        )

    def trajectories(self, params: PyTree) -> tuple[Float[Array, "t m 3"], Float[Array, "t m 3 3"]]:
        """Positions and rotations of the nodes at the `time_resolution` instants."""
        instants = jnp.linspace(0, 1, self.time_resolution)
        poses = jax.vmap(functools.partial(self.poses, params))(instants)
        rotations = jax.vmap(rotation_matrices)(poses["rotations"])
        return params["nodes"]["positions"] + poses["translations"], rotations

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """`arap` and `acceleration` of the nodes, see `gaussians.deformation.rigidity`.

        The links of `arap` are those of the nodes' canonical positions, at all instants alike. No
        gradient reaches the nodes themselves: only their motion can be wrong, not where they sit.
        """
        params = params | {"nodes": jax.lax.stop_gradient(params["nodes"])}
        rest = params["nodes"]["positions"]
        moved, rotations = self.trajectories(params)
        graph = rigidity.neighbour_graph(rest, self.graph_neighbours)
        return {
            "arap": rigidity.arap(rest, moved, rotations, *graph, self.tolerance),
            "acceleration": rigidity.acceleration(moved),
        }

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Copies the poses of the first instant at or after `t` to all later ones.

        A network cannot be held: it is returned unchanged.
        """
        if self.motion == "mlp":
            return params
        position = jnp.clip(jnp.asarray(t), 0, 1) * (self.time_resolution - 1)
        last = jnp.ceil(position - 1e-4).astype(int)  # an instant, whatever the rounding of t
        source = jnp.minimum(jnp.arange(self.time_resolution), last)
        return params | {"poses": jax.tree.map(lambda pose: pose[source], params["poses"])}

    def peak_opacities(self, params: PyTree, splats: Splats) -> None:
        """Opacity does not change over time."""
        del params, splats

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """The field has no parameters per splat: a new splat finds its nodes by where it is."""
        del source
        return params

    def _init_network(self, key: jax.Array) -> PyTree:
        """Glorot-uniform layers, and a last one of zeros."""
        inputs = 3 * (1 + 2 * self.position_frequencies) + 1 + 2 * self.time_frequencies
        glorot = jax.nn.initializers.glorot_uniform()
        layers = []
        for number, layer_key in enumerate(jax.random.split(key, self.depth)):
            size = self.width if number else 0
            size += inputs if number in (0, self._joint) else 0
            kernel = glorot(layer_key, (size, self.width))
            layers.append({"kernel": kernel, "bias": jnp.zeros(self.width)})
        outputs = sum(self.heads.values())
        head = {"kernel": jnp.zeros((self.width, outputs)), "bias": jnp.zeros(outputs)}
        return {"trunk": tuple(layers), "head": head}

    @property
    def _joint(self) -> int:
        """The layer that sees the input again."""
        return self.depth // 2 + 1

    def _network(self, params: PyTree, t: Timestamp) -> Float[Array, "m _"]:
        """The heads' outputs, side by side; the nodes' positions are constants to the network."""
        positions = jax.lax.stop_gradient(params["nodes"]["positions"])
        time = jnp.broadcast_to(jnp.asarray(t, positions.dtype), (self.num_nodes, 1))
        inputs = jnp.concatenate(
            [_encode(positions, self.position_frequencies), _encode(time, self.time_frequencies)],
            axis=-1,
        )
        network, hidden = params["network"], inputs
        for number, layer in enumerate(network["trunk"]):
            if number == self._joint:
                hidden = jnp.concatenate([hidden, inputs], axis=-1)
            hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"])
        return hidden @ network["head"]["kernel"] + network["head"]["bias"]


def farthest_points(
    points: Float[AnyArray, "n 3"], count: int, active: Bool[AnyArray, "n"]
) -> Int[Array, "{count}"]:
    """Farthest point sampling (Eldar et al. 1997): each pick is farthest from those before it.

    The first pick is the point farthest from the mean, so that the result does not depend on the
    order of the points. With fewer active points than picks, the last picks repeat earlier ones.

    Args:
        points: any finite numbers where not active.
        count: number of picks.
        active: the points to choose from, at least one.

    Returns:
        Indices into `points`, in the order of the picks.
    """
    points = jnp.where(active[:, None], points, 0.0)
    centre = jnp.sum(points, axis=0) / jnp.maximum(jnp.sum(active), 1)

    def squared_distance(origin: Array) -> Array:
        return jnp.where(active, jnp.sum((points - origin) ** 2, axis=-1), -1.0)

    def pick(distance: Array, _: None) -> tuple[Array, Array]:
        chosen = jnp.argmax(distance)
        return jnp.minimum(distance, squared_distance(points[chosen])), chosen

    first = jnp.argmax(squared_distance(centre))
    start = squared_distance(points[first])
    _, others = jax.lax.scan(pick, start, length=count - 1)
    return jnp.concatenate([first[None], others])


def _encode(values: Float[Array, "m d"], octaves: int) -> Float[Array, "m _"]:
    """The values, and their sines and cosines at frequencies 1, 2, 4, ..."""
    angles = values[:, None] * 2.0 ** jnp.arange(octaves)[:, None]
    angles = angles.reshape(values.shape[0], -1)
    return jnp.concatenate([values, jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _transform(
    matrices: Float[Array, "n 3 3"], vectors: Float[AnyArray, "n 3"]
) -> Float[Array, "n 3"]:
    return jnp.einsum("nij,nj->ni", matrices, vectors)


def _unit(quaternions: Float[Array, "n 4"]) -> Float[Array, "n 4"]:
    squared = jnp.sum(quaternions**2, axis=-1, keepdims=True)
    return quaternions * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))


def _blend(weights: Float[Array, "n k"], quaternions: Float[Array, "n k 4"]) -> Float[Array, "n 4"]:
    """The normalised mean of unit quaternions, after giving each the sign nearest to the first."""
    first = quaternions[:, :1]
    facing = jnp.sum(first * quaternions, axis=-1, keepdims=True)
    aligned = jnp.where(facing < 0, -quaternions, quaternions)
    return _unit(first[:, 0] + jnp.einsum("nk,nkc->nc", weights, aligned - first))


def _compose(second: Float[Array, "n 4"], first: Float[AnyArray, "n 4"]) -> Float[Array, "n 4"]:
    """The rotation `first` followed by `second`: the Hamilton product."""
    a, b, c, d = second.T
    w, x, y, z = first.T
    product = (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )
    return jnp.stack(product, axis=-1)
