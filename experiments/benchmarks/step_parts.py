"""A training step of a reconstruction taken apart: each part compiled by itself, to be timed.

One after the other the parts do what `gaussians.optimization.step` does; a test holds them to it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from d4d_jax.typing import PyTree
from gaussians import losses
from gaussians.captures import Views
from gaussians.deformation import Deformation
from gaussians.densify import DensityStrategy
from gaussians.optimization import LearningRates, StepSettings, TrainState, optimizer
from gaussians.rasterize import Probe, rasterize
from gaussians.types import Camera, Splats

#: The parts, in the order of a step; one that renders splats at rest has no field.
PARTS = ("field", "rasterizer", "losses", "regularisers", "optimizer")


class Parts(NamedTuple):
    """The parts of one step on one view.

    Attributes:
        calls: by their names in `PARTS`; each returns when its work is done.
        state: after the step, as the parts make it.
        loss: of the step.
        overflow: pairs that did not fit the rasterizer's list; above 0 the rest means nothing.
    """

    calls: dict[str, Callable[[], Any]]
    state: TrainState
    loss: jax.Array
    overflow: int


class _View(NamedTuple):
    """One of `Views`, without their leading axis."""

    rgb: jax.Array
    alpha: jax.Array | None
    camera: Camera
    timestamp: jax.Array


class Repeated:
    """Calls a program that replaces a state, which may be donated, with the state it left."""

    def __init__(self, program: Callable[[TrainState], tuple[TrainState, Any]], state: TrainState):
        self._program, self.state = program, state

    def __call__(self) -> Any:
        """One more call; returns what the program returns beside the state, when it is done."""
        self.state, beside = jax.block_until_ready(self._program(self.state))
        return beside


def take_apart(
    state: TrainState,
    views: Views,
    index: int,
    rate: jax.Array,
    key: jax.Array,
    settings: StepSettings,
) -> Parts:
    """The parts of `step(state, views, [index], rate, key, settings=settings)`, all run once.

    Field, rasterizer, losses and regularisers are forward and backward passes; what one hands to
    the next, either way, is what it hands on in the step. The optimizer is what follows: Adam over
    all groups, the density strategy's noise and statistics, the choice of the new or the old state.

    Args:
        state: stays as it is; the optimizer works on a copy.
        views: to train on.
        index: of the view.
        rate: factor on the learning rates.
        key: of the noise.
        settings: of the step.
    """
    field, weights, density = settings.deformation, settings.weights, settings.density
    active = state.active
    alpha = None if views.alpha is None else views.alpha[index]
    view = _View(views.rgb[index], alpha, views.camera[index], views.timestamps[index])
    calls: dict[str, Callable[[], Any]] = {}
    moved = canonical = state.splats.parameters
    if field is not None:
        calls["field"] = deform = _Pass(_deform, field, state.params, active, view.timestamp)
        moved, *_ = deform.back(canonical)
    probe = Probe.zeros(len(state.splats), absolute=density.absolute)
    calls["rasterizer"] = draw = _Pass(_draw, settings, (moved, probe), active, view)
    image, _, (radii, overflow) = draw.back(_blank(view, weights))
    calls["losses"] = compare = _Pass(_compare, weights, image, view)
    loss, image_gradient, _ = compare.back(jnp.ones(()))
    _, (gradient, pull), _ = draw.back(image_gradient)
    judged = state.params["deformation"], moved
    calls["regularisers"] = judge = _Pass(_judge, (field, density, weights), judged, active)
    penalty, (direct, further), _ = judge.back(jnp.ones(()))

    gradients = {"splats": _sum(gradient, further), "deformation": direct}
    if field is not None:
        _, through, _ = deform.back(gradients["splats"])
        gradients = through | {"deformation": _sum(through["deformation"], direct)}
    loss = loss + penalty
    good = (overflow == 0) & jnp.isfinite(loss)
    given = gradients, pull, radii, good, rate, key
    advance = _advance(settings.rates, density, field)
    calls["optimizer"] = update = Repeated(lambda s: (advance(s, *given), None), _copy(state))
    update()
    ordered = {name: calls[name] for name in PARTS if name in calls}
    return Parts(ordered, _copy(update.state), loss, int(overflow))


class _Pass:
    """The forward and backward pass of one part, to be repeated."""

    def __init__(self, function: Callable[..., Any], choices: Any, inputs: PyTree, *constants: Any):
        self._program = functools.partial(_forward_backward(function, choices), inputs, constants)

    def back(self, cotangents: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Runs with these cotangents, from now on: outputs, gradients of the inputs, and others."""
        self._cotangents = cotangents
        return self()

    def __call__(self) -> tuple[PyTree, PyTree, PyTree]:
        return jax.block_until_ready(self._program(self._cotangents))


@functools.cache
def _forward_backward(function: Callable[..., Any], choices: Any) -> Callable[..., Any]:
    """The compiled pass; `choices` are no more than the function needs, so that equal ones meet."""

    @jax.jit
    def program(
        inputs: PyTree, constants: tuple[Any, ...], cotangents: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        outputs, pull, others = jax.vjp(
            lambda given: function(choices, given, *constants), inputs, has_aux=True
        )
        return outputs, pull(cotangents)[0], others

    return program


def _deform(field: Any, params: PyTree, active: jax.Array, t: jax.Array) -> tuple[PyTree, None]:
    splats = Splats(**params["splats"], active=active)
    return field.apply(params["deformation"], splats, t).parameters, None


def _draw(
    settings: StepSettings, inputs: PyTree, active: jax.Array, view: _View
) -> tuple[PyTree, PyTree]:
    parameters, probe = inputs
    render = rasterize(
        Splats(**parameters, active=active),
        view.camera,
        jnp.asarray(settings.background, jnp.float32),
        implementation=settings.implementation,
        capacity=settings.pairs,
        blur=settings.blur,
        sh_degree=settings.sh_degree,
        probe=probe,
    )
    image = {name: getattr(render, name) for name in _blank(view, settings.weights)}
    return image, (render.radii, render.overflow)


def _compare(weights: losses.LossWeights, image: PyTree, view: _View) -> tuple[jax.Array, None]:
    terms = {"l1": losses.l1(image["rgb"], view.rgb)}
    if weights.dssim > 0:
        terms["dssim"] = losses.dssim(image["rgb"], view.rgb)
    if weights.alpha > 0 and view.alpha is not None:
        terms["alpha"] = losses.alpha_l1(image["alpha"], view.alpha)
    if weights.depth > 0:
        terms["depth"] = losses.depth_smoothness(image["depth"], image["alpha"], view.rgb)
    return losses.weighted_sum(terms, weights), None


def _judge(choices: Any, inputs: PyTree, active: jax.Array) -> tuple[jax.Array, None]:
    field, density, weights = choices
    params, moved = inputs
    terms = {} if field is None else field.regularization(params)
    penalties = density.regularization(Splats(**moved, active=active)).values()
    return losses.weighted_sum(terms, weights) + sum(penalties, jnp.zeros(())), None


@functools.cache
def _advance(
    rates: LearningRates, density: DensityStrategy, field: Deformation | None
) -> Callable[..., TrainState]:
    """What a step does with its gradients, compiled; the state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        state: TrainState,
        gradients: PyTree,
        pull: Probe,
        radii: jax.Array,
        good: jax.Array,
        rate: jax.Array,
        key: jax.Array,
    ) -> TrainState:
        updates, moments = optimizer(rates).update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        splats = Splats(**params["splats"], active=state.active)
        peaks = None if field is None else field.peak_opacities(params["deformation"], splats)
        splats = density.perturb(key, splats, rate * rates.means, peaks)
        strain = pull.absolute if density.absolute else pull.mean2d
        proposed = dataclasses.replace(
            state,
            params=params | {"splats": splats.parameters},
            optimizer=moments,
            statistics=state.statistics.add(strain, radii > 0),
        )
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), proposed, state)

    return advance


def _blank(view: _View, weights: losses.LossWeights) -> dict[str, jax.Array]:
    """Zeros in place of those images of a render that the losses look at."""
    height, width = view.rgb.shape[:2]
    images = {"rgb": jnp.zeros((height, width, 3))}
    if weights.depth > 0 or (weights.alpha > 0 and view.alpha is not None):
        images["alpha"] = jnp.zeros((height, width))
    if weights.depth > 0:
        images["depth"] = jnp.zeros((height, width))
    return images


def _sum(first: PyTree, second: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, first, second)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.array, tree)
