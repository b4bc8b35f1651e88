"""One optimization step of a reconstruction: render a view, compare, move the parameters.

Everything here is a pure function of arrays. The driver in `gaussians.reconstruct` decides which
view and which learning rate a step gets; one compilation serves all steps with equal `StepSettings`
and image size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from d4d_jax import pytree
from d4d_jax.clips import Color
from d4d_jax.metrics import Lpips
from d4d_jax.typing import PyTree
from gaussians import losses
from gaussians.captures import Views
from gaussians.deformation import Deformation
from gaussians.densify import DensityStrategy, GradientStatistics, move_moments
from gaussians.projection import BLUR
from gaussians.rasterize import Probe, rasterize
from gaussians.types import Splats


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Adam's step size per group of parameters, before the decay of the stage.

    The first five are those of 3DGS, scaled to an object in a unit cube and to a few thousand
    steps instead of tens of thousands. `network` also serves the parameters of other fields.

    Attributes:
        means: world units.
        log_scales, quaternions, opacity_logits, sh: in the units of the raw parameters.
        planes: features of a HexPlane.
        network: kernels and biases of its decoder.
        curves: opacity logits of `lifespan`.
        nodes: where control points are, how far they reach, and how they move.
    """

    means: float = 5e-4
    log_scales: float = 5e-3
    quaternions: float = 2e-3
    opacity_logits: float = 3e-2
    sh: float = 1e-2
    planes: float = 3e-3
    network: float = 1e-3
    curves: float = 0.1
    nodes: float = 1.5e-3


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is fixed at compile time.

    Attributes:
        deformation: the field; None renders the canonical splats whatever the timestamp.
        weights: of the losses.
        rates: of the parameter groups.
        density: its penalties are part of the loss, its noise part of the step.
        background: colour behind the object, in [0, 1].
        pairs: capacity of the rasterizer's list of (tile, splat) pairs.
        blur: screen-space blur, px^2.
        sh_degree: bands of the colour that are used; None uses all that the splats have.
        implementation: of the rasterizer; None chooses.
    """

    deformation: Deformation | None
    weights: losses.LossWeights
    rates: LearningRates
    density: DensityStrategy
    background: Color
    pairs: int | None = None
    blur: float = BLUR
    sh_degree: int | None = None
    implementation: str | None = None


@pytree.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
        params: {"splats": the float fields of Splats, "deformation": the field's parameters}.
        active: which slots hold a splat.
        optimizer: optax state, shaped like `params`.
        statistics: what densification will look at.
    """

    params: PyTree
    active: Bool[Array, "n"]
    optimizer: PyTree
    statistics: GradientStatistics

    @property
    def splats(self) -> Splats:
        """The canonical splats."""
        return Splats(**self.params["splats"], active=self.active)


@pytree.dataclass
class StepReport:
    """How a step went.

    Attributes:
        loss: weighted sum, mean over the views.
        mse: mean squared colour error, likewise.
        overflow: pairs that did not fit the rasterizer's list, of the worst view.
        radii: of the splats on the screen, pixels; 0 where not visible.
    """

    loss: Float[Array, ""]
    mse: Float[Array, ""]
    overflow: Int[Array, ""]
    radii: Float[Array, "*b n"]


def optimizer(rates: LearningRates) -> optax.GradientTransformation:
    """Adam with 3DGS's epsilon and a rate per group; the caller multiplies by the decay."""

    def scale(updates: PyTree, params: PyTree | None = None) -> PyTree:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update: -getattr(rates, _group(path)) * update, updates
        )

    return optax.chain(optax.scale_by_adam(eps=1e-15), optax.stateless(scale))


def create_state(splats: Splats, field_params: PyTree, rates: LearningRates) -> TrainState:
    """A fresh state; nothing in it shares memory with the arguments, so it can be donated."""
    params = jax.tree.map(jnp.array, {"splats": splats.parameters, "deformation": field_params})
    return TrainState(
        params=params,
        active=jnp.array(splats.active),
        optimizer=optimizer(rates).init(params),
        statistics=GradientStatistics.create(len(splats)),
    )


def view_loss(
    params: PyTree,
    probe: Probe,
    active: Bool[Array, "n"],
    views: Views,
    index: int | Int[Array, ""],
    settings: StepSettings,
    perceptual: Lpips | None = None,
) -> tuple[Float[Array, ""], StepReport]:
    """The weighted loss of one view, and what to report about it."""
    splats = Splats(**params["splats"], active=active)
    field, weights = settings.deformation, settings.weights
    if field is not None:
        splats = field.apply(params["deformation"], splats, views.timestamps[index])
    render = rasterize(
        splats,
        views.camera[index],
        jnp.asarray(settings.background, jnp.float32),
        implementation=settings.implementation,
        capacity=settings.pairs,
        blur=settings.blur,
        sh_degree=settings.sh_degree,
        probe=probe,
    )
    target = views.rgb[index]
    terms = {"l1": losses.l1(render.rgb, target)}
    if weights.dssim > 0:
        terms["dssim"] = losses.dssim(render.rgb, target)
    if perceptual is not None and weights.lpips > 0:
        terms["lpips"] = perceptual(render.rgb, target)
    if weights.alpha > 0 and views.alpha is not None:
        terms["alpha"] = losses.alpha_l1(render.alpha, views.alpha[index])
    if weights.depth > 0:
        terms["depth"] = losses.depth_smoothness(render.depth, render.alpha, target)
    if field is not None:
        terms |= field.regularization(params["deformation"])
    penalties = settings.density.regularization(splats).values()
    loss = losses.weighted_sum(terms, weights) + sum(penalties, jnp.zeros(()))
    mse = jnp.mean((render.rgb - target) ** 2)
    return loss, StepReport(loss=loss, mse=mse, overflow=render.overflow, radii=render.radii)


def batch_loss(
    params: PyTree,
    probes: Probe,
    active: Bool[Array, "n"],
    views: Views,
    indices: Int[Array, "b"],
    settings: StepSettings,
    perceptual: Lpips | None = None,
) -> tuple[Float[Array, ""], StepReport]:
    """The mean of `view_loss` over several views, which have a probe each (leading axis b)."""

    def one(index: Int[Array, ""], probe: Probe) -> tuple[Float[Array, ""], StepReport]:
        return view_loss(params, probe, active, views, index, settings, perceptual)

    if indices.shape[0] == 1:  # spares a single view the batching of everything
        batched = jax.tree.map(
            lambda leaf: leaf[None], one(indices[0], jax.tree.map(lambda leaf: leaf[0], probes))
        )
    else:
        batched = jax.vmap(one)(indices, probes)
    loss, report = batched
    merged = StepReport(
        loss=report.loss.mean(),
        mse=report.mse.mean(),
        overflow=report.overflow.max(),
        radii=report.radii,
    )
    return loss.mean(), merged


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def step(
    state: TrainState,
    views: Views,
    indices: Int[Array, "b"],
    rate: Float[Array, ""],
    key: PRNGKeyArray,
    perceptual: Lpips | None = None,
    *,
    settings: StepSettings,
) -> tuple[TrainState, StepReport]:
    """One step of Adam on the views `indices`, with all learning rates multiplied by `rate`.

    The density strategy then shakes the splats, by `key`.

    The state is donated. When the rasterizer's pair list overflowed, or the loss is not finite, the
    returned state equals the given one and the report says so: the caller repeats the step with
    more capacity, or stops.
    """
    batch = indices.shape[0]
    density = settings.density
    probe = Probe.zeros(state.active.shape[0], absolute=density.absolute)
    probes = jax.tree.map(lambda zeros: jnp.broadcast_to(zeros, (batch, *zeros.shape)), probe)
    (_, report), (grads, pulls) = jax.value_and_grad(batch_loss, argnums=(0, 1), has_aux=True)(
        state.params, probes, state.active, views, indices, settings, perceptual
    )
    updates, moments = optimizer(settings.rates).update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
    splats = Splats(**params["splats"], active=state.active)
    peaks = _peak_opacities(settings.deformation, params["deformation"], splats)
    splats = density.perturb(key, splats, rate * settings.rates.means, peaks)
    params = params | {"splats": splats.parameters}
    pull = pulls.absolute if density.absolute else pulls.mean2d
    statistics = state.statistics.add(batch * pull, report.radii > 0)
    proposed = dataclasses.replace(
        state,
        params=params,
        optimizer=moments,
        statistics=statistics,
    )
    good = (report.overflow == 0) & jnp.isfinite(report.loss)
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), proposed, state), report


def refine(
    state: TrainState, key: jax.Array, number: int, *, density: DensityStrategy, field: Deformation
) -> tuple[TrainState, Any]:
    """Refines after step `number`; field and optimizer follow the splats. Also gives the report."""
    peaks = _peak_opacities(field, state.params["deformation"], state.splats)
    mean = state.statistics.mean
    refined = density.refine(key, state.splats, mean, jnp.asarray(number), peaks)
    rows = refined.rows

    def moved(moments: PyTree) -> PyTree:
        return {
            "splats": rows.gather_moments(moments["splats"]),
            "deformation": field.gather(moments["deformation"], rows.source),
        }

    field_params = field.gather(state.params["deformation"], rows.source)
    refined_state = TrainState(
        params={"splats": refined.splats.parameters, "deformation": field_params},
        active=jnp.asarray(refined.splats.active),
        optimizer=move_moments(state.optimizer, state.params, moved),
        statistics=GradientStatistics.create(len(refined.splats)),
    )
    return refined_state, refined.report


def _peak_opacities(
    field: Deformation | None, params: PyTree, splats: Splats
) -> Float[Array, "n"] | None:
    return None if field is None else field.peak_opacities(params, splats)


def reset_opacity(state: TrainState, *, density: DensityStrategy) -> TrainState:
    """Cuts all opacities down; their moments start anew, those of everything else go on."""
    splats = density.reset_opacity(state.splats)

    def without(moments: PyTree) -> PyTree:
        zeros = jnp.zeros_like(moments["splats"]["opacity_logits"])
        return moments | {"splats": moments["splats"] | {"opacity_logits": zeros}}

    return dataclasses.replace(
        state,
        params=state.params | {"splats": splats.parameters},
        optimizer=move_moments(state.optimizer, state.params, without),
    )


def _group(path: tuple) -> str:
    """The learning-rate group of a leaf of `TrainState.params`."""
    keys = [str(getattr(entry, "key", "")) for entry in path]
    if keys[0] == "splats":
        return keys[1]
    for group in ("planes", "curves", "nodes"):
        if group in keys:
            return group
    return "nodes" if "poses" in keys else "network"
