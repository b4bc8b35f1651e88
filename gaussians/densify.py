"""Density control on a fixed number of slots: where to add splats, and which to take away.

The slots never grow or move in memory, so the optimization keeps its shapes and its one
compilation: a strategy says from which slot each slot descends (`Rows`), and everything that is
kept per splat follows.

    statistics = statistics.add(probe_gradient, render.radii > 0)  # every step
    if strategy.refines_at(step):
        refined = strategy.refine(key, splats, statistics.mean, step)
        splats, rows = refined.splats, refined.rows
        optimizer_state = move_moments(optimizer_state, parameters, rows.gather_moments)
        statistics = GradientStatistics.create(len(splats))
    if strategy.resets_opacity_at(step):
        splats = strategy.reset_opacity(splats)
        optimizer_state = move_moments(
            optimizer_state,
            parameters,
            lambda moments: moments | {"opacity_logits": jnp.zeros(len(splats))},
        )
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from d4d_jax import pytree
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray, PyTree
from gaussians.projection import rotation_matrices
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
class Report:
    """What one refinement did: scalar counts of splats.

    Attributes:
        cloned: splats that got a copy.
        split: splats that were replaced by two children.
        pruned: splats that were taken away.
        refused: splats that should have been cloned or split, but no slot was free.
        active: splats afterwards.
    """

    cloned: Int[Array, ""]
    split: Int[Array, ""]
    pruned: Int[Array, ""]
    refused: Int[Array, ""]
    active: Int[Array, ""]

    def __str__(self) -> str:
        text = f"{self.active} splats: {self.cloned} cloned, {self.split} split"
        text += f", {self.pruned} pruned"
        if int(self.refused):
            text += f"; {self.refused} found no free slot (a larger capacity would hold them)"
        return text


@pytree.dataclass
class Refined:
    """The splats after a refinement, how to make the rest follow, and a report."""

    splats: Splats
    rows: Rows
    report: Report


@pytree.dataclass
class GradientStatistics:
    """How hard the images pull each splat across the screen, over the steps since a refinement.

    Attributes:
        total: sum over views of the norm of the screen-space gradient, in the unit of 3DGS.
        visits: number of views in which the splat was visible.
    """

    total: Float[Array, "n"]
    visits: Int[Array, "n"]

    @classmethod
    def create(cls, capacity: int) -> "GradientStatistics":
        """Nothing seen yet."""
        return cls(jnp.zeros(capacity), jnp.zeros(capacity, jnp.int32))

    def add(
        self,
        mean2d_gradient: Float[Array, "*views n 2"],
        visible: Bool[Array, "*views n"],
    ) -> "GradientStatistics":
        """Adds one view, or several.

        Args:
            mean2d_gradient: the gradient of one of the fields of `gaussians.rasterize.Probe`.
            visible: which splats touch the view (`Render.radii > 0`).
        """
        norms = jnp.where(visible, jnp.linalg.norm(mean2d_gradient, axis=-1), 0.0)
        views = tuple(range(norms.ndim - 1))
        visits = jnp.sum(visible, axis=views, dtype=jnp.int32)
        return GradientStatistics(self.total + norms.sum(axis=views), self.visits + visits)

    @property
    def mean(self) -> Float[Array, "n"]:
        """Mean gradient norm over the views that saw the splat; 0 where none did."""
        return self.total / jnp.maximum(self.visits, 1)


@runtime_checkable
class DensityStrategy(Protocol):
    """What an optimization loop asks of density control; a frozen dataclass of thresholds."""

    def refines_at(self, step: int) -> bool: ...

    def resets_opacity_at(self, step: int) -> bool: ...

    def refine(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        mean_gradient: Float[Array, "n"],
        step: int | Int[Array, ""],
    ) -> Refined: ...

    def reset_opacity(self, splats: Splats) -> Splats: ...


@register("densify", "adaptive")
@dataclasses.dataclass(frozen=True)
class AdaptiveDensity:
    """Clone, split, prune and opacity reset of 3D Gaussian Splatting (Kerbl et al. 2023, sec. 5).

    The defaults are 4DGaussians' for D-NeRF, with one repair: splats are pruned at every
    refinement, where the reference prunes only beyond 200 000 splats. A limit on screen size is
    left out.

    Attributes:
        start: no refinement up to this step.
        stop: none from this step on.
        every: steps between refinements.
        gradient_threshold: splats with a larger mean screen-space gradient multiply.
        extent: size of the scene in world units. 3DGS takes 1.1 times the largest distance of a
            camera from the mean camera centre, which is 2.2 for the standard orbit.
        clone_scale: splats whose largest standard deviation is at most this fraction of the extent
            are cloned, larger ones are split.
        shrink: a split child's standard deviations are its parent's divided by this.
        opacity_threshold: splats below are pruned.
        prune_scale: splats larger than this fraction of the extent are pruned unless they multiply.
        prune_scale_after: first step at which size counts for pruning.
        reset_every: steps between opacity resets; 0 for none.
        reset_opacity_to: largest opacity after a reset.
    """

    start: int = 500
    stop: int = 15_000
    every: int = 100
    gradient_threshold: float = 2e-4
    extent: float = 2.2
    clone_scale: float = 0.01
    shrink: float = 1.6
    opacity_threshold: float = 0.005
    prune_scale: float = 0.1
    prune_scale_after: int = 3000
    reset_every: int = 3000
    reset_opacity_to: float = 0.01

    def __post_init__(self):
        if self.every < 1 or self.reset_every < 0:
            raise ValueError(
                f"every={self.every} must be at least 1 and reset_every={self.reset_every} at"
                " least 0 steps."
            )
        if not 0 < self.reset_opacity_to < 1 or not 0 <= self.opacity_threshold < 1:
            raise ValueError(
                f"reset_opacity_to={self.reset_opacity_to} and"
                f" opacity_threshold={self.opacity_threshold} are opacities between 0 and 1."
            )
        if self.reset_opacity_to <= self.opacity_threshold:
            raise ValueError(
                f"reset_opacity_to={self.reset_opacity_to} must exceed"
                f" opacity_threshold={self.opacity_threshold}, or a reset prunes every splat."
            )

    def refines_at(self, step: int) -> bool:
        """Whether to refine after this step, counted from 1."""
        return self.start < step < self.stop and step % self.every == 0

    def resets_opacity_at(self, step: int) -> bool:
        """Whether to reset opacities after this step, counted from 1."""
        return self.reset_every > 0 and 0 < step < self.stop and step % self.reset_every == 0

    @functools.partial(jax.jit, static_argnums=0)
    def refine(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        mean_gradient: Float[Array, "n"],
        step: int | Int[Array, ""],
    ) -> Refined:
        """Multiplies splats under strain and prunes the useless, within the slots there are.

        Pruned slots are free at once. When fewer slots are free than splats want to multiply, those
        with the largest gradients do; the others stay as they are and count as `refused`. A clone
        is an exact copy and its original keeps its optimizer history, so that the two part ways; of
        a split, one child takes the parent's slot and both are new.

        Args:
            key: draws the positions of split children, from the parent's Gaussian.
            splats: any capacity.
            mean_gradient: `GradientStatistics.mean`.
            step: counted from 1.
        """
        before = jnp.asarray(splats.active)
        size = jnp.exp(splats.log_scales).max(axis=-1)
        faint = jax.nn.sigmoid(splats.opacity_logits) < self.opacity_threshold
        wanted = before & (mean_gradient > self.gradient_threshold) & ~faint
        oversized = (size > self.prune_scale * self.extent) & (step >= self.prune_scale_after)
        pruned = before & (faint | (oversized & ~wanted))

        rows, multiplied = _fill_free_slots(before & ~pruned, wanted, mean_gradient)
        splitting = size > self.clone_scale * self.extent
        children = splitting & multiplied
        rows = dataclasses.replace(rows, fresh=rows.fresh | children)
        born = rows.fresh & splitting[rows.source]
        grown = self._with_children(key, rows.gather(splats), born)
        active = (before & ~pruned) | rows.fresh
        report = Report(
            cloned=jnp.sum(multiplied & ~splitting),
            split=jnp.sum(children),
            pruned=jnp.sum(pruned),
            refused=jnp.sum(wanted & ~multiplied),
            active=jnp.sum(active),
        )
        return Refined(dataclasses.replace(grown, active=active), rows, report)

    def reset_opacity(self, splats: Splats) -> Splats:
        """Cuts all opacities to at most `reset_opacity_to`; those of use recover, floaters fade."""
        ceiling = jax.scipy.special.logit(self.reset_opacity_to)
        return dataclasses.replace(
            splats, opacity_logits=jnp.minimum(splats.opacity_logits, ceiling)
        )

    def _with_children(self, key: PRNGKeyArray, splats: Splats, born: Bool[Array, "n"]) -> Splats:
        """Turns copies of split parents, where `born`, into smaller children around them."""
        normal = jax.random.normal(key, splats.means.shape)
        within = jnp.exp(splats.log_scales) * normal
        rotations = rotation_matrices(jnp.asarray(splats.quaternions))
        offset = jnp.einsum("nij,nj->ni", rotations, within)
        born = born[:, None]
        return dataclasses.replace(
            splats,
            means=splats.means + jnp.where(born, offset, 0.0),
            log_scales=splats.log_scales - jnp.where(born, jnp.log(self.shrink), 0.0),
        )


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


def _fill_free_slots(
    kept: Bool[Array, "n"], wanted: Bool[Array, "n"], priority: Float[Array, "n"]
) -> tuple[Rows, Bool[Array, "n"]]:
    """Gives free slots to the wanted splats of highest priority.

    Returns:
        The rows, fresh where a free slot was filled, and which of the wanted splats got one.
    """
    slots = jnp.arange(kept.shape[0])
    free = jnp.argsort(kept, stable=True)  # free slots first
    ranked = jnp.argsort(jnp.where(wanted, -priority, jnp.inf), stable=True)
    granted = slots < jnp.minimum(jnp.sum(~kept), jnp.sum(wanted))
    target = jnp.where(granted, free, kept.shape[0])
    source = slots.at[target].set(ranked, mode="drop")
    fresh = jnp.zeros_like(kept).at[target].set(True, mode="drop")
    multiplied = (
        jnp.zeros_like(kept).at[jnp.where(granted, ranked, kept.shape[0])].set(True, mode="drop")
    )
    return Rows(source, fresh), multiplied
