"""What training carries from one step to the next: one pytree, saved and restored whole."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Int, Key

from d4d_jax import pytree
from d4d_jax.typing import PyTree


@pytree.dataclass
class TrainState:
    """The state of a training run after `step` updates.

    Attributes:
        step: number of updates made so far.
        params: trained parameters, float32.
        ema: exponential moving average of `params`, same structure; what sampling uses.
        opt_state: state of the optax optimizer.
        key: the run's random key. It never changes: step n draws from `fold_in(key, n)`, so a
            restored run continues with the draws that it would have made.
        frozen: arrays that belong to the run and are not trained (the latent codec, a frozen
            3D-aware network). They travel in the checkpoint so that a run is complete by itself.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    key: Key[Array, ""]
    frozen: PyTree = dataclasses.field(default_factory=dict)


def create_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    frozen: PyTree | None = None,
) -> TrainState:
    """Returns the state before the first update; the average starts as a copy of `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # a copy: the step donates both buffers
        opt_state=optimizer.init(params),
        key=key,
        frozen={} if frozen is None else frozen,
    )


def parameter_table(params: PyTree) -> str:
    """One line for each part of a network, with its share of the parameters, and their sum."""
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        part = jax.tree_util.keystr(path[:1], simple=True)
        sizes[part] = sizes.get(part, 0) + leaf.size
    width = max((len(part) for part in sizes), default=0)
    total = sum(sizes.values())
    return "\n".join(
        f"  {part:<{width}} {size:>15,}" for part, size in [*sizes.items(), ("", total)]
    )


def count_parameters(params: PyTree) -> int:
    """Returns the number of scalars in a tree of arrays (or of shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
