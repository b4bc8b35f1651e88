"""Placement of a run on its devices: batches split over `data`, the state replicated.

The mesh already has the second axis, `fsdp`, on which large parameters can be split: pass a
function that gives every leaf its sharding instead of `replicated` where the state is placed.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from d4d_jax.typing import PyTree


def make_mesh(data: int | None = None, fsdp: int = 1) -> Mesh:
    """Returns the mesh ("data", "fsdp") over the visible devices.

    Args:
        data: devices along the batch axis; None takes all that `fsdp` leaves.
        fsdp: devices along the parameter axis.

    Raises:
        ValueError: data * fsdp is not the number of devices.
    """
    count = jax.device_count()
    if data is None:
        data = count // fsdp
    if data * fsdp != count:
        raise ValueError(
            f"The mesh data={data} x fsdp={fsdp} does not cover the {count} visible devices: "
            "choose sizes whose product is that number."
        )
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays of which every device holds a whole copy."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: the leading axis split over `data` and `fsdp`."""
    return NamedSharding(mesh, jax.P(("data", "fsdp")))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Passes when batches of that many clips can be split over the devices of the mesh.

    Raises:
        ValueError: it is not a multiple of the number of devices.
    """
    if batch_size % mesh.size:
        raise ValueError(
            f"A batch of {batch_size} clips cannot be split over {mesh.size} devices: choose a "
            "batch size that is a multiple of that."
        )


def place_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Returns the state with a copy of every leaf on each device of the mesh."""
    return jax.device_put(state, replicated(mesh))


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Returns the batch with its leading axis split over the devices of the mesh.

    Raises:
        ValueError: as `check_batch_size`.
    """
    for leaf in jax.tree.leaves(batch):
        check_batch_size(leaf.shape[0], mesh)
    return jax.device_put(batch, batch_sharding(mesh))
