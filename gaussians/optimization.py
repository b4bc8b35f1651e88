"""One optimization step of a reconstruction: render a view, compare, move the parameters.

Everything here is a pure function of arrays. The driver in `gaussians.reconstruct` decides which
view and which learning rate a step gets; one compilation serves all steps with equal `StepSettings`
and image size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from d4d_jax import pytree
from d4d_jax.cameras import Camera
from d4d_jax.clips import Color
from d4d_jax.typing import Alpha, AnyArray, Frames, PyTree
from gaussians import losses
from gaussians.deformation import Deformation
from gaussians.densify import AdaptiveDensity, GradientStatistics, move_moments
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
    """

    means: float = 5e-4
    log_scales: float = 5e-3
    quaternions: float = 2e-3
    opacity_logits: float = 3e-2
    sh: float = 1e-2
    planes: float = 3e-3
    network: float = 1e-3
    curves: float = 0.1


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is fixed at compile time.

    Attributes:
        deformation: the field; None renders the canonical splats whatever the timestamp.
        weights: of the losses.
        rates: of the parameter groups.
        background: colour behind the object, in [0, 1].
        pairs: capacity of the rasterizer's list of (tile, splat) pairs.
        blur: screen-space blur, px^2.
        implementation: of the rasterizer; None chooses.
    """

    deformation: Deformation | None
    weights: losses.LossWeights
    rates: LearningRates
    background: Color
    pairs: int | None = None
    blur: float = BLUR
    implementation: str | None = None


@pytree.dataclass
class Views:
    """Frames to fit, leading axis v.

    Attributes:
        rgb: (v, h, w, 3) in [0, 1].
        alpha: (v, h, w) in [0, 1], or None when unknown.
        camera: of every frame.
        timestamps: (v,) in [0, 1].
    """

    rgb: Frames
    alpha: Alpha | None
    camera: Camera
    timestamps: AnyArray


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
        loss: weighted sum.
        mse: mean squared colour error of the view.
        overflow: pairs that did not fit the rasterizer's list.
        radii: of the splats on the screen, pixels; 0 where not visible.
    """

    loss: Float[Array, ""]
    mse: Float[Array, ""]
    overflow: Int[Array, ""]
    radii: Float[Array, "n"]


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
        probe=probe,
    )
    target = views.rgb[index]
    terms = {"l1": losses.l1(render.rgb, target)}
    if weights.dssim > 0:
        terms["dssim"] = losses.dssim(render.rgb, target)
    if weights.alpha > 0 and views.alpha is not None:
        terms["alpha"] = losses.alpha_l1(render.alpha, views.alpha[index])
    if weights.depth > 0:
        terms["depth"] = losses.depth_smoothness(render.depth, render.alpha, target)
    if field is not None:
        terms |= field.regularization(params["deformation"])
    loss = losses.weighted_sum(terms, weights)
    mse = jnp.mean((render.rgb - target) ** 2)
    return loss, StepReport(loss=loss, mse=mse, overflow=render.overflow, radii=render.radii)


@functools.partial(jax.jit, static_argnames=("settings",), donate_argnames=("state",))
def step(
    state: TrainState,
    views: Views,
    index: Int[Array, ""],
    rate: Float[Array, ""],
    *,
    settings: StepSettings,
) -> tuple[TrainState, StepReport]:
    """One step of Adam on view `index`, with all learning rates multiplied by `rate`.

    The state is donated. When the rasterizer's pair list overflowed, or the loss is not finite, the
    returned state equals the given one and the report says so: the caller repeats the step with
    more capacity, or stops.
    """
    probe = Probe.zeros(state.active.shape[0])
    (_, report), (grads, pulls) = jax.value_and_grad(view_loss, argnums=(0, 1), has_aux=True)(
        state.params, probe, state.active, views, index, settings
    )
    updates, moments = optimizer(settings.rates).update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
    statistics = state.statistics.add(pulls.mean2d, report.radii > 0)
    proposed = dataclasses.replace(
        state,
        params=params,
        optimizer=moments,
        statistics=statistics,
    )
    good = (report.overflow == 0) & jnp.isfinite(report.loss)
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), proposed, state), report


def densify(
    state: TrainState, key: jax.Array, number: int, *, density: AdaptiveDensity, field: Deformation
) -> TrainState:
    """Clones, splits and prunes after step `number`; field and optimizer follow the splats."""
    refined = density.refine(key, state.splats, state.statistics.mean, jnp.asarray(number))
    rows = refined.rows

    def moved(moments: PyTree) -> PyTree:
        return {
            "splats": rows.gather_moments(moments["splats"]),
            "deformation": field.gather(moments["deformation"], rows.source),
        }

    field_params = field.gather(state.params["deformation"], rows.source)
    return TrainState(
        params={"splats": refined.splats.parameters, "deformation": field_params},
        active=refined.splats.active,
        optimizer=move_moments(state.optimizer, state.params, moved),
        statistics=GradientStatistics.create(len(refined.splats)),
    )


def reset_opacity(state: TrainState, *, density: AdaptiveDensity) -> TrainState:
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
    for group in ("planes", "curves"):
        if group in keys:
            return group
    return "network"
