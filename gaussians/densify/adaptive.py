"""Density control of 3D Gaussian Splatting: multiply under strain, prune, reset opacities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from d4d_jax import pytree
from d4d_jax.registry import register
from gaussians.densify.rows import Refined, Rows, peaks
from gaussians.projection import rotation_matrices
from gaussians.types import Splats


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
        absolute: the gradients are `Probe.absolute`, which does not cancel where pixels pull a
            splat apart (AbsGS, Ye et al. 2024). It is larger than the plain one: gsplat recommends
            a threshold of 8e-4 with it.
        extent: size of the scene in world units. 3DGS takes 1.1 times the largest distance of a
            camera from the mean camera centre, which is 2.2 for the standard orbit.
        clone_scale: splats whose largest standard deviation is at most this fraction of the extent
            are cloned, larger ones are split.
        shrink: a split child's standard deviations are its parent's divided by this.
        opacity_threshold: splats that stay below are pruned.
        prune_scale: splats larger than this fraction of the extent are pruned unless they multiply.
        prune_scale_after: first step at which size counts for pruning.
        reset_every: steps between opacity resets; 0 for none.
        reset_opacity_to: largest opacity after a reset.
    """

    start: int = 500
    stop: int = 15_000
    every: int = 100
    gradient_threshold: float = 2e-4
    absolute: bool = False
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
        peak_opacities: Float[Array, "n"] | None = None,
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
            peak_opacities: the largest opacity each splat reaches over time, in [0, 1], where it
                changes; by default that of the splats themselves.
        """
        before = jnp.asarray(splats.active)
        size = jnp.exp(splats.log_scales).max(axis=-1)
        faint = peaks(splats, peak_opacities) < self.opacity_threshold
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

    def perturb(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        means_rate: float | Float[Array, ""],
        peak_opacities: Float[Array, "n"] | None = None,
    ) -> Splats:
        """The splats as they are."""
        del key, means_rate, peak_opacities
        return splats

    def regularization(self, splats: Splats) -> dict[str, Float[Array, ""]]:
        """No penalties."""
        del splats
        return {}

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
