"""Density control on a fixed number of slots: where to add splats, and which to take away.

The slots never grow or move in memory, so the optimization keeps its shapes and its one
compilation: a strategy says from which slot each slot descends (`Rows`), and everything that is
kept per splat follows.

    strategy = build({"name": "mcmc"})
    loss += sum(strategy.regularization(splats).values())  # every step
    ...
    splats = strategy.perturb(step_key, splats, means_rate)  # after the optimizer's update
    pull = gradient.absolute if strategy.absolute else gradient.mean2d  # of the rasterizer's probe
    statistics = statistics.add(pull, render.radii > 0)
    if strategy.refines_at(step):
        refined = strategy.refine(refine_key, splats, statistics.mean, step)
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

A strategy of your own needs the methods of `DensityStrategy` and either
`@register("densify", "my_strategy")` or the name `"my.module:MyStrategy"`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray

from d4d_jax import registry
from gaussians.densify.adaptive import AdaptiveDensity, GradientStatistics, Report
from gaussians.densify.mcmc import MCMCDensity, RelocationReport
from gaussians.densify.rows import Refined, Rows, move_moments
from gaussians.types import Splats

__all__ = [
    "AdaptiveDensity",
    "DensityStrategy",
    "GradientStatistics",
    "MCMCDensity",
    "Refined",
    "RelocationReport",
    "Report",
    "Rows",
    "build",
    "move_moments",
]


@runtime_checkable
class DensityStrategy(Protocol):
    """What an optimization loop asks of density control; a frozen dataclass of thresholds.

    Where a field gives splats an opacity that changes over time, `peak_opacities` are the largest
    that each reaches, in [0, 1]; None takes the opacities of the splats themselves.
    """

    @property
    def absolute(self) -> bool:
        """Whether `refine` wants the gradients of `Probe.absolute` instead of `Probe.mean2d`."""
        ...

    def refines_at(self, step: int) -> bool:
        """Whether to call `refine` after this step, counted from 1."""
        ...

    def resets_opacity_at(self, step: int) -> bool:
        """Whether to call `reset_opacity` after this step, counted from 1."""
        ...

    def refine(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        mean_gradient: Float[Array, "n"],
        step: int | Int[Array, ""],
        peak_opacities: Float[Array, "n"] | None = None,
    ) -> Refined:
        """Adds, moves and takes away splats within their slots; compiled once per shape."""
        ...

    def reset_opacity(self, splats: Splats) -> Splats:
        """Lowers opacities, all at once."""
        ...

    def perturb(
        self,
        key: PRNGKeyArray,
        splats: Splats,
        means_rate: float | Float[Array, ""],
        peak_opacities: Float[Array, "n"] | None = None,
    ) -> Splats:
        """The splats shaken a little, after every step of the optimizer.

        Args:
            key: a new one every step.
            splats: with the step's update.
            means_rate: the step's learning rate of the means, in world units.
            peak_opacities: see above.
        """
        ...

    def regularization(self, splats: Splats) -> dict[str, Float[Array, ""]]:
        """Named penalties, each a scalar that already has its weight, to be added to the loss."""
        ...


def build(spec: Mapping[str, Any]) -> DensityStrategy:
    """Builds a strategy from `{"name": "adaptive" | "mcmc" | ..., **thresholds}`.

    Raises:
        ValueError: unknown name, an argument that the strategy does not take, or a threshold that
            makes no sense.
    """
    return registry.build("densify", spec)
