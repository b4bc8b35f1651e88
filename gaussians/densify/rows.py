"""What a refinement does to the slots, and how everything kept per splat follows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from d4d_jax import pytree
from d4d_jax.typing import AnyArray, PyTree
from gaussians.types import Splats


@pytree.dataclass
class Rows:
    """Where the content of every slot comes from.

    Attributes:
        source: slot i descends from slot `source[i]`; most from themselves.
        fresh: the slot holds a new splat, which has no history in the optimizer.
    """

    source: Int[Array, "n"]
    fresh: Bool[Array, "n"]

    def gather(self, tree: PyTree) -> PyTree:
        """Values that descendants inherit; every leaf has the slots as its leading axis."""
        return jax.tree.map(lambda leaf: leaf[self.source], tree)

    def gather_moments(self, tree: PyTree) -> PyTree:
        """Like `gather`, but zero for new splats: what an optimizer remembers of each."""

        def move(leaf: AnyArray) -> Array:
            fresh = self.fresh.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(fresh, jnp.zeros_like(leaf), leaf[self.source])

        return jax.tree.map(move, tree)


@pytree.dataclass
class Refined:
    """The outcome of a refinement.

    Attributes:
        splats: as they are now.
        rows: how everything else that is kept per splat follows.
        report: scalar counts, `active` among them; its `str` is for people.
    """

    splats: Splats
    rows: Rows
    report: PyTree


def peaks(splats: Splats, peak_opacities: Float[Array, "n"] | None) -> Float[Array, "n"]:
    """The largest opacity that each splat reaches: as given, or its own where time is no matter."""
    return jax.nn.sigmoid(splats.opacity_logits) if peak_opacities is None else peak_opacities


def move_moments(
    optimizer_state: PyTree, params: PyTree, move: Callable[[PyTree], PyTree]
) -> PyTree:
    """Applies `move` to every part of an optax state that mirrors the parameters.

    Adam's two moments, a momentum and a running mean are such parts: they have the tree structure
    of `params`. Step counters and the like stay. Parts of `optax.masked` and
    `optax.multi_transform`, which lack some of the parameters, are handled too.

    Args:
        optimizer_state: of an optimizer initialised with `params`, or with a tree like it.
        params: the parameters, at least one level deep.
        move: takes and returns a tree like `params`, such as `Rows.gather_moments`.

    Raises:
        ValueError: the state holds arrays but nothing in it mirrors the parameters.
    """
    structure = jax.tree.structure(params)

    def masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    def completed(part: PyTree) -> PyTree:
        """The part with parameters in its gaps, or None where it does not mirror them."""
        try:
            filled = jax.tree.map(
                lambda leaf, param: param if masked(leaf) else leaf, part, params, is_leaf=masked
            )
        except (ValueError, TypeError):
            return None
        return filled if jax.tree.structure(filled) == structure else None

    found = False

    def replace(part: PyTree) -> PyTree:
        nonlocal found
        filled = completed(part)
        if filled is None or masked(part):
            return part
        found = True
        return jax.tree.map(
            lambda old, new: old if masked(old) else new, part, move(filled), is_leaf=masked
        )

    moved = jax.tree.map(replace, optimizer_state, is_leaf=lambda part: completed(part) is not None)
    if not found and any(jnp.ndim(leaf) for leaf in jax.tree.leaves(optimizer_state)):
        raise ValueError(
            f"Nothing in the optimizer state has the structure of the parameters, {structure}; pass"
            " the tree that the optimizer was initialised with."
        )
    return moved
