"""Where the arrays of a run lie: a mesh with the axes `data` and `fsdp`, and rules that place them.

Batches are split over both axes by clips, or, for clips too large for a device, over `data` by
clips and over `fsdp` by frames. Parameters, their average and the optimizer's state are split over
`fsdp` (fully sharded data parallelism: Rajbhandari et al. 2020, ZeRO-3). Everything else follows:
XLA derives it, and the communication, from where the inputs and outputs of a step lie.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from d4d_jax.typing import PyTree

#: How leaves are placed whose path the regular expression occurs in: "replicated" (a copy on every
#: device), "largest" (the largest axis that can be is split over `fsdp`, in leaves of at least
#: `MIN_SPLIT` elements), or mesh axes for the leading array axes, as in `jax.P(*axes)`.
Rule: TypeAlias = tuple[str, str | tuple[str | tuple[str, ...] | None, ...]]

#: Of a TrainState, whose paths are such as "params/conv_in/kernel"; the first that occurs counts.
STATE_RULES: Sequence[Rule] = (
    (r"^(step|key|frozen)(/|$)", "replicated"),
    (r"^(params|ema|opt_state)/", "largest"),
)

#: Of a batch. By clips:
BATCH_RULES: Sequence[Rule] = ((r"", (("data", "fsdp"),)),)
#: By clips, and by frames:
FRAME_RULES: Sequence[Rule] = (
    (r"^(dynamic|static)(_latents)?$", ("data", "fsdp")),
    (r"^camera$", ("data", "fsdp")),
    (r"", ("data",)),
)

#: Leaves with fewer elements are not worth the communication.
MIN_SPLIT = 2**12


def make_mesh(data: int | None = None, fsdp: int = 1) -> Mesh:
    """Returns the mesh ("data", "fsdp") over the visible devices of all processes.

    Args:
        data: devices along the batch axis; None takes all that `fsdp` leaves.
        fsdp: devices along the parameter axis.

    Raises:
        ValueError: data * fsdp is not the number of devices.
    """
    count = jax.device_count()
    if data is None:
        data = count // max(fsdp, 1)
    if data * fsdp != count or fsdp < 1:
        raise ValueError(
            f"The mesh data={data} x fsdp={fsdp} does not cover the {count} visible devices: "
            "choose sizes whose product is that number."
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays of which every device holds a whole copy."""
    return NamedSharding(mesh, jax.P())


def check_batch(
    batch_size: int,
    mesh: Mesh | AbstractMesh,
    *,
    num_frames: int | None = None,
    by_frames: bool = False,
    accumulate: int = 1,
) -> None:
    """Passes when batches can be split over the devices of the mesh.

    Args:
        batch_size: clips of all processes together.
        mesh: from `make_mesh`.
        num_frames: of a clip; for `by_frames`.
        by_frames: whether the axis `fsdp` splits frames (`FRAME_RULES`).
        accumulate: parts that a batch is computed in, one after the other.

    Raises:
        ValueError: the clips or frames cannot be split evenly.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}.")
    devices = mesh.shape["data"] if by_frames else mesh.size
    parts = math.lcm(devices * accumulate, jax.process_count())
    if batch_size % parts:
        steps = f" in {accumulate} steps" if accumulate > 1 else ""
        raise ValueError(
            f"A batch of {batch_size} clips cannot be split over {devices} devices{steps}: choose a"
            f" batch size that is a multiple of {parts}."
        )
    if by_frames and num_frames is not None and num_frames % mesh.shape["fsdp"]:
        raise ValueError(
            f"Clips of {num_frames} frames cannot be split over fsdp={mesh.shape['fsdp']} devices:"
            " choose a divisor of the number of frames, or split batches by clips."
        )


def shardings(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Sequence[Rule]) -> PyTree:
    """Returns the sharding of every leaf, by the first rule whose expression occurs in its path.

    Args:
        tree: of arrays, or of their shapes.
        mesh: from `make_mesh`.
        rules: an ordered table.

    Raises:
        ValueError: no rule matches a leaf, or one asks for an axis that cannot be split so; the
            message names the leaf.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = next((rule for pattern, rule in rules if re.search(pattern, name)), None)
        if rule is None:
            raise ValueError(f"No sharding rule matches {name!r}; add one, or a last ('', ...).")
        if rule == "replicated":
            return replicated(mesh)
        shape = tuple(leaf.shape)
        if rule == "largest":
            return NamedSharding(mesh, _largest(shape, mesh))
        if isinstance(rule, str):
            raise ValueError(f"A sharding rule is 'replicated', 'largest' or axes, not {rule!r}.")
        for size, axes in zip(shape, rule, strict=False):
            names = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh.shape[axis] for axis in names)
            if size % parts:
                raise ValueError(
                    f"{name!r} of shape {shape} cannot be split into {parts} parts along"
                    f" {' x '.join(names)}: an axis has {size} elements."
                )
        return NamedSharding(mesh, jax.P(*rule[: len(shape)]))

    return jax.tree_util.tree_map_with_path(place, tree)


def _largest(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> jax.P:
    parts = mesh.shape["fsdp"]
    axes = [i for i, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < MIN_SPLIT:
        return jax.P()
    largest = max(axes, key=lambda i: (shape[i], i))  # of equal ones the last: output channels
    return jax.P(*(None,) * largest, "fsdp")


def place_state(state: PyTree, mesh: Mesh, rules: Sequence[Rule] = STATE_RULES) -> PyTree:
    """Returns the state with its leaves where the rules put them.

    Raises:
        ValueError: as `shardings`.
    """
    return jax.device_put(state, shardings(state, mesh, rules))


def place_batch(batch: PyTree, mesh: Mesh, rules: Sequence[Rule] = BATCH_RULES) -> PyTree:
    """Returns the batch, of which every process has its part of the clips, split by the rules.

    Raises:
        ValueError: as `shardings`.
    """
    count = jax.process_count()
    whole = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] * count, *leaf.shape[1:]), leaf.dtype),
        batch,
    )
    return jax.tree.map(
        lambda leaf, place, shape: jax.make_array_from_process_local_data(place, leaf, shape.shape),
        batch,
        shardings(whole, mesh, rules),
        whole,
    )


def local_copy(tree: PyTree) -> PyTree:
    """Returns whole copies of the arrays on a device of this process; all processes must ask."""

    def gather(leaf: jax.Array) -> jax.Array:
        if not leaf.is_fully_replicated and isinstance(leaf.sharding, NamedSharding):
            everywhere = NamedSharding(leaf.sharding.mesh, jax.P())
            leaf = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
        return leaf.addressable_data(0)

    return jax.tree.map(gather, tree)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """The array, split over mesh axes as `jax.P(*axes)`; as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(*axes))


def path_name(path: tuple) -> str:
    """A tree path as "params/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def bytes_per_device(tree: PyTree) -> int:
    """The largest number of bytes that a device of this process holds of a tree of arrays."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
