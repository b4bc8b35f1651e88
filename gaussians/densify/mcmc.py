"""Density control by sampling: splats of no use relocate to where opacity is, and all wander.

"3D Gaussian Splatting as Markov Chain Monte Carlo" (Kheradmand et al. 2024) takes splats for
samples of a distribution. Instead of rules for cloning, splitting and pruning there is one move
that leaves the rendered image almost as it was, relocation, and a noise on the positions that lets
splats of low opacity explore.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from d4d_jax import pytree
from d4d_jax.registry import register
from gaussians.densify.rows import Refined, Rows, peaks
from gaussians.projection import rotation_matrices
from gaussians.types import Splats

#: Nodes of a trapezoidal rule from 0, in units of sqrt(2) standard deviations.
_SPACING = 0.25
_NODES = _SPACING * np.arange(20)


@pytree.dataclass
class RelocationReport:
    """What one refinement did: scalar counts of splats.

    Attributes:
        relocated: splats without opacity that became copies of others.
        added: copies in slots that were free.
        active: splats afterwards.
    """

    relocated: Int[Array, ""]
    added: Int[Array, ""]
    active: Int[Array, ""]

    def __str__(self) -> str:
        return f"{self.active} splats: {self.relocated} relocated, {self.added} added"


@register("densify", "mcmc")
@dataclasses.dataclass(frozen=True)
class MCMCDensity:
    """Relocation, noise and regularisers of 3DGS-MCMC (Kheradmand et al. 2024).

    The defaults are the authors' and gsplat's, for 30 000 steps. The cap on the number of splats is
    the capacity.

    Attributes:
        start: no refinement up to this step.
        stop: none from this step on; the noise goes on to the end.
        every: steps between refinements.
        opacity_threshold: splats that stay at or below relocate. Copies get at least this opacity.
        growth: the number of splats grows by this factor per refinement, rounded down.
        noise_scale: size of the noise; times the learning rate of the means it is the standard
            deviation of a step, in units of a splat's covariance. The product is 80 where the
            authors' rate is 1.6e-4: with the larger rates of a short optimization lower the scale.
        noise_sharpness: how sharply the noise ends with growing opacity.
        noise_opacity: the opacity at which the noise is at half its size.
        opacity_weight: of the mean opacity as a penalty; splats of no use fade under it.
        scale_weight: of the mean standard deviation, in world units, as a penalty.
    """

    start: int = 500
    stop: int = 25_000
    every: int = 100
    opacity_threshold: float = 0.005
    growth: float = 1.05
    noise_scale: float = 5e5
    noise_sharpness: float = 100.0
    noise_opacity: float = 0.005
    opacity_weight: float = 0.01
    scale_weight: float = 0.01

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1 step.")
        if not 0 <= self.opacity_threshold < 1:
            raise ValueError(
                f"opacity_threshold={self.opacity_threshold} is an opacity: at least 0, below 1."
            )
        if not 1 <= self.growth < np.inf:
            raise ValueError(
                f"growth={self.growth} must be a factor of at least 1, which adds no splats."
            )
        for name in ("noise_scale", "noise_sharpness", "opacity_weight", "scale_weight"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be 0, which switches it off, or above."
                )

    @property
    def absolute(self) -> bool:
        """No gradient is looked at."""
        return False

    def refines_at(self, step: int) -> bool:
        """Whether to refine after this step, counted from 1."""
        return self.start < step < self.stop and step % self.every == 0

    def resets_opacity_at(self, step: int) -> bool:
        """Never."""
        del step
        return False

    @functools.partial(jax.jit, static_argnums=0)
    def refine(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        mean_gradient: Float[Array, "n"],
        step: int | Int[Array, ""],
        peak_opacities: Float[Array, "n"] | None = None,
    ) -> Refined:
        """Relocates dead splats and adds new ones: both become copies of splats that are alive.

        Each takes a place drawn in proportion to opacity, with replacement. A splat of opacity o
        and its N - 1 copies then all have opacity 1 - (1 - o)^(1/N) and are shrunk such that
        together they look as the one did (Eq. 9). Splats and copies alike start anew in the
        optimizer. The authors relocate and add one after the other; here one draw serves both.

        Where opacity changes over time, Eq. 9 holds at the peak, and the copies share the change in
        logits. Without a single splat alive nothing happens.

        Args:
            key: draws the places.
            splats: any capacity.
            mean_gradient: not looked at.
            step: not looked at.
            peak_opacities: the largest opacity each splat reaches over time, in [0, 1], where it
                changes; by default that of the splats themselves.
        """
        del mean_gradient, step
        before = jnp.asarray(splats.active)
        opacities = peaks(splats, peak_opacities)
        alive = before & (opacities > self.opacity_threshold)
        added = self._slots_to_grow_into(before) & alive.any()
        relocated = before & ~alive & alive.any()

        rows, counts = _copies(key, jnp.where(alive, opacities, 0.0), added | relocated)
        shared = counts > 1
        own = jnp.asarray(splats.opacity_logits)
        if peak_opacities is None:
            logits = own
        else:
            below_one = jnp.minimum(peak_opacities, 1 - jnp.finfo(own.dtype).eps)
            logits = jax.scipy.special.logit(below_one)
        thinned, shrinkage = _divided(logits, counts)
        thinned = jnp.maximum(thinned, jax.scipy.special.logit(self.opacity_threshold))
        divided = dataclasses.replace(
            splats,
            opacity_logits=jnp.where(shared, own + (thinned - logits), own),
            log_scales=jnp.where(
                shared[:, None], splats.log_scales + shrinkage[:, None], splats.log_scales
            ),
        )
        active = before | added
        report = RelocationReport(
            relocated=jnp.sum(relocated), added=jnp.sum(added), active=jnp.sum(active)
        )
        return Refined(dataclasses.replace(rows.gather(divided), active=active), rows, report)

    def reset_opacity(self, splats: Splats) -> Splats:
        """The splats as they are."""
        return splats

    def perturb(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        means_rate: float | Float[Array, ""],
        peak_opacities: Float[Array, "n"] | None = None,
    ) -> Splats:
        """Moves the splats by noise: covariance times a standard normal vector, times its size.

        The size is `noise_scale * means_rate * sigmoid(noise_sharpness * (noise_opacity - o))`:
        splats of low opacity o wander, opaque ones stay.

        Args:
            key: a new one every step.
            splats: with the step's update.
            means_rate: the step's learning rate of the means, in world units.
            peak_opacities: as in `refine`.
        """
        excess = self.noise_opacity - peaks(splats, peak_opacities)
        size = self.noise_scale * means_rate * jax.nn.sigmoid(self.noise_sharpness * excess)
        rotations = rotation_matrices(jnp.asarray(splats.quaternions))
        normal = jax.random.normal(key, splats.means.shape, splats.means.dtype)
        within = jnp.einsum("nji,nj->ni", rotations, normal) * jnp.exp(2 * splats.log_scales)
        noise = size[:, None] * jnp.einsum("nij,nj->ni", rotations, within)
        moved = jnp.asarray(splats.active)[:, None]
        return dataclasses.replace(splats, means=splats.means + jnp.where(moved, noise, 0.0))

    def regularization(self, splats: Splats) -> dict[str, Float[Array, ""]]:
        """`opacity` and `scale`: means over the active splats, times their weights, unless 0."""
        active = jnp.asarray(splats.active)
        count = jnp.maximum(jnp.sum(active), 1)
        penalties = {}
        if self.opacity_weight > 0:
            opacities = jax.nn.sigmoid(jnp.where(active, splats.opacity_logits, -jnp.inf))
            penalties["opacity"] = self.opacity_weight * jnp.sum(opacities) / count
        if self.scale_weight > 0:
            scales = jnp.exp(jnp.where(active[:, None], splats.log_scales, -jnp.inf))
            penalties["scale"] = self.scale_weight * jnp.sum(scales) / (3 * count)
        return penalties

    def _slots_to_grow_into(self, active: Bool[Array, "n"]) -> Bool[Array, "n"]:
        """The first free slots, as many as the growth asks for and the capacity has."""
        # A table in float64: float32 falls short of whole numbers such as 1.05 * 60.
        sizes = np.arange(active.shape[0] + 1)
        wanted = np.minimum(np.floor(self.growth * sizes), sizes[-1]) - sizes
        free = ~active
        return free & (jnp.cumsum(free) <= jnp.asarray(wanted, jnp.int32)[jnp.sum(active)])


def _copies(
    key: PRNGKeyArray, weights: Float[Array, "n"], targets: Bool[Array, "n"]
) -> tuple[Rows, Int[Array, "n"]]:
    """Fills every target with a copy of a slot drawn in proportion to its weight.

    Returns:
        The rows, fresh in targets and in slots that got copies, and by how many each slot's splat
        is held now: itself and its copies.
    """
    slots = jnp.arange(weights.shape[0])
    shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    drawn = jax.random.choice(key, slots, slots.shape, p=shares)
    # The rounded cumulative sum may give a slot without weight a sliver of probability.
    drawn = jnp.where(weights[drawn] > 0, drawn, jnp.argmax(weights))
    counts = jnp.ones_like(slots).at[drawn].add(targets.astype(slots.dtype))
    return Rows(jnp.where(targets, drawn, slots), targets | (counts > 1)), counts


def _divided(
    opacity_logits: Float[Array, "n"], counts: Int[Array, "n"]
) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """Eq. 9 of Kheradmand et al. 2024: what becomes of a splat that `counts` splats share.

    The denominator of the equation, a double sum over binomial coefficients of alternating sign,
    equals 2 / sqrt(pi) times the integral over t > 0 of 1 - (1 - p exp(-t^2))^N, which is the
    opacity that N splats of peak p add up to along a line through their centre. The integrand is
    even and smooth, so the trapezoidal rule converges exponentially: to 1e-6 in float32, for any N,
    where the sum loses its digits and needs a table.

    Returns:
        The opacity logits, and what is added to the log scales.
    """
    remaining = jax.nn.log_sigmoid(-opacity_logits) / counts  # log(1 - p)
    peak = -jnp.expm1(remaining)
    profile = peak * jnp.exp(-(_NODES[:, None] ** 2))
    alphas = -jnp.expm1(counts * jnp.log1p(-profile))
    integral = 2 / np.sqrt(np.pi) * _SPACING * (jnp.sum(alphas, axis=0) - alphas[0] / 2)
    shrinkage = jax.nn.log_sigmoid(opacity_logits) - jnp.log(integral)
    return jnp.log(peak) - remaining, shrinkage
