"""From an orbital clip to a moving object: coarse-to-fine fitting of deforming Gaussians.

Diffusion4D, section 3.4: a coarse stage on the dynamic orbit merged with a static orbit, then a
fine stage on the dynamic orbit. Ours has a warm-up before them (as 4DGS has), which fits the
canonical splats to the static orbit alone, and three additions that a single orbit needs, since
each instant is seen from one side only:

- Motion is that of control points which move as rigidly and smoothly as the images allow.
- Some static views stay in the fine stage (`Stage.static_fraction`); the paper has none there.
- A pose that the coarse stage could not find gets a body of its own (`gaussians.bodies`).
"""

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d4d_jax.clips import OrbitClip
from d4d_jax.metrics import Lpips
from gaussians import bodies, densify, initialize, preparation
from gaussians.asset import Asset, pair_capacity
from gaussians.captures import Capture, of_clip
from gaussians.deformation import Deformation, build
from gaussians.densify import AdaptiveDensity
from gaussians.losses import LossWeights
from gaussians.optimization import (
    LearningRates,
    StepReport,
    StepSettings,
    TrainState,
    create_state,
    refine,
    reset_opacity,
    step,
)
from gaussians.progress import Clock
from gaussians.projection import BLUR
from gaussians.rasterize import chosen
from gaussians.snapshot import Interrupted, Keeper, Snapshot, digest, flatten, restore
from gaussians.stages import Stage, view_order

_LOGGER = logging.getLogger(__name__)


_WARMUP = Stage(steps=300, static_fraction=1.0, low_steps=200)
_COARSE = Stage(
    steps=600,
    static_fraction=0.25,
    low_steps=600,
    end_rate=0.5,
    rates=LearningRates(nodes=8e-3),  # far, then fine
)
_FINE = Stage(steps=2000, static_fraction=0.2, low_steps=400, end_rate=0.05)


def _default_deformation() -> dict[str, Any]:
    base = {"name": "keyframes", "base": {"name": "control_points"}, "bodies": 2}
    return {"name": "lifespan", "base": base, "knots": 9}


def _default_density() -> AdaptiveDensity:
    return AdaptiveDensity(start=950, stop=2100, every=300, reset_every=0)


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """All choices of a reconstruction. The defaults are for 256 x 256 clips of 24 frames.

    Attributes:
        num_splats: created by the initialiser.
        body_splats: added for each pose that the coarse stage lost, if the deformation has `bodies`
            for more than one.
        capacity: slots for splats; densification fills those that initialization leaves.
        sh_degree: of the colours, 0 to 3.
        sh_interval: steps after which one more band of the colours is used, as in 3DGS (1000
            there); 0 uses all from the start.
        deformation: spec of the field, for `gaussians.deformation.build`.
        initializer: spec of the first splats, for `gaussians.initialize.build`; None takes the
            visual hull of the frames at rest, or a random cube where that is empty.
        warmup: static views only, field at rest; skipped without a static orbit.
        coarse: dynamic and static views (Diffusion4D's coarse stage).
        fine: dynamic views, and as many static ones as `fine.static_fraction` says.
        density: when and how splats multiply and vanish: a `gaussians.densify.DensityStrategy`, or
            its spec (`{"name": "mcmc", ...}`). Its steps count over the run.
        weights: of the losses.
        rates: learning rates.
        static_time: timestamp of the static orbit; None takes that of the dynamic frame which is
            most alike (the published static orbits are frozen at the second frame, not at 0).
        pairs_per_splat: initial capacity of the rasterizer's pair list; it doubles when a view
            does not fit.
        implementation: of the rasterizer, None chooses.
    """

    num_splats: int = 8000
    body_splats: int = 4000
    capacity: int = 12000
    sh_degree: int = 0
    sh_interval: int = 0
    deformation: Mapping[str, Any] = dataclasses.field(default_factory=_default_deformation)
    initializer: Mapping[str, Any] | None = None
    warmup: Stage = _WARMUP
    coarse: Stage = _COARSE
    fine: Stage = _FINE
    density: Any = dataclasses.field(default_factory=_default_density)
    weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    rates: LearningRates = dataclasses.field(default_factory=LearningRates)
    static_time: float | None = None
    pairs_per_splat: float = 8.0
    implementation: str | None = None

    def __post_init__(self):
        if self.num_splats > self.capacity:
            raise ValueError(
                f"A capacity of {self.capacity} cannot hold num_splats={self.num_splats}; raise it."
            )
        if self.num_splats < 1 or self.body_splats < 4 or self.pairs_per_splat <= 0:
            raise ValueError(
                f"num_splats={self.num_splats} must be at least 1, body_splats={self.body_splats}"
                f" at least 4 and pairs_per_splat={self.pairs_per_splat} above 0."
            )
        if self.static_time is not None and not 0 <= self.static_time <= 1:
            raise ValueError(f"static_time must lie in [0, 1]; got {self.static_time}.")
        if self.sh_degree not in range(4):
            raise ValueError(f"sh_degree must be 0, 1, 2 or 3; got {self.sh_degree}.")
        if self.sh_interval < 0:
            raise ValueError(f"sh_interval cannot be negative; got {self.sh_interval}.")
        if isinstance(self.density, Mapping):
            object.__setattr__(self, "density", densify.build(self.density))
        chosen(self.implementation)  # Raises for a name that there is not.
        build(self.deformation)  # Likewise.
        if self.initializer is not None:
            initialize.build(self.initializer)  # Likewise.


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a callback is told after every step.

    Attributes:
        stage: its name.
        step: within the whole run, from 1.
        total: steps of the whole run.
        loss: of this step.
        psnr: of this step's view, in dB.
        splats: active ones.
        eta: estimated seconds until the last step.
        asset: makes the asset as it is after this step. To be called within the callback: the next
            step takes the arrays for itself.
    """

    stage: str
    step: int
    total: int
    loss: float
    psnr: float
    splats: int
    eta: float
    asset: Callable[[], Asset]


def reconstruct(
    source: OrbitClip | Capture,
    config: ReconstructConfig,
    key: jax.Array,
    callback: Callable[[Progress], None] | None = None,
    *,
    keeper: Keeper | None = None,
    perceptual: Lpips | None = None,
) -> Asset:
    """Fits moving Gaussians to the dynamic and static orbit of a clip, or to another capture.

    Front frames and held-out views are never looked at. On one CPU platform the same arguments give
    the same asset, bit for bit, also when the run was interrupted and resumed.

    Args:
        source: of a clip `static` and the alphas may be missing. Without alphas a pixel belongs to
            the object where it differs from the background.
        config: the choices.
        key: places the first splats and orders the views.
        callback: called after every step.
        perceptual: the distance of the loss `lpips`, for configurations that give it a weight.
        keeper: takes snapshots of the run, may hold one to resume from, and may stop the run.

    Raises:
        ValueError: a clip has no dynamic frames, the configuration does not fit, or the snapshot is
            of another run.
        FloatingPointError: the loss became NaN or infinite; the keeper got the state before.
        Interrupted: the keeper stopped the run, and has its snapshot.
    """
    splat_key, field_key, view_key, densify_key = jax.random.split(key, 4)
    field = build(config.deformation)
    capture = _capture(source, config.static_time)
    first_key, body_key = jax.random.split(splat_key)
    splats = preparation.first_splats(
        capture,
        config.num_splats,
        config.capacity,
        config.sh_degree,
        first_key,
        config.initializer,
    )
    if outside := preparation.count_outside(splats, field):
        _LOGGER.warning(
            "%d of %d splats start outside the bound of the deformation field, where nothing tells"
            " them apart: scale the cameras down, or raise the field's `bound`.",
            outside,
            int(splats.active.sum()),
        )
    state = create_state(splats, jax.jit(field.init)(field_key, splats), config.rates)
    run = digest(capture, config, key, perceptual)
    fit = _Fit(capture, config, field, callback, keeper, perceptual, run)
    state = fit.resume(state)
    for number, (name, stage) in enumerate(fit.stages.items()):
        if name == "fine" and "coarse" in fit.stages and fit.begins(name):
            state = fit.with_bodies(state, body_key)
        keys = [jax.random.fold_in(k, number) for k in (view_key, densify_key)]
        state = fit.run(state, name, stage, *keys)
    meta = {
        "steps": fit.total,
        "splats": int(state.active.sum()),
        "static_time": None if capture.still is None else float(capture.still.timestamps[0]),
        "outside_bound": preparation.count_outside(state.splats, field),
        "implementation": chosen(config.implementation),
    }
    return Asset(
        splats=state.splats,
        deformation=field,
        params=state.params["deformation"],
        background=capture.background,
        meta=meta,
    )


def _capture(source: OrbitClip | Capture, static_time: float | None) -> Capture:
    if isinstance(source, Capture):
        return source
    if static_time is None:
        static_time = preparation.find_static_time(source)
    return of_clip(source, static_time)


class _Fit:
    """The host's side of a reconstruction: it feeds the compiled steps and reacts to them."""

    def __init__(
        self,
        capture: Capture,
        config: ReconstructConfig,
        field: Deformation,
        callback: Callable[[Progress], None] | None,
        keeper: Keeper | None,
        perceptual: Lpips | None,
        name: str,
    ):
        self.capture, self.config, self.field = capture, config, field
        self.callback, self.keeper, self.name = callback, keeper, name
        self.perceptual = perceptual
        stages = {"warmup": config.warmup, "coarse": config.coarse, "fine": config.fine}
        if capture.still is None:
            del stages["warmup"]
        self.stages = {name: stage for name, stage in stages.items() if stage.steps}
        weights = [stage.weights or config.weights for stage in self.stages.values()]
        if perceptual is None and any(w.lpips > 0 for w in weights):
            raise ValueError(
                "The loss lpips has a weight but no network: give `perceptual`, such as"
                " d4d_jax.metrics.load_stlpips()."
            )
        ends = list(itertools.accumulate(stage.steps for stage in self.stages.values()))
        self.starts = dict(zip(self.stages, [0, *ends], strict=False))
        self.total = ends[-1] if ends else 0
        self.pairs = pair_capacity(config.pairs_per_splat * config.capacity)
        self.done = 0
        self.clock = Clock(self.stages)
        self.views = functools.lru_cache(maxsize=2)(
            lambda scale: preparation.views_of(capture, scale)
        )
        self.instants, self.instant_of = np.unique(
            np.asarray(capture.moving.timestamps), return_inverse=True
        )

    def resume(self, state: TrainState) -> TrainState:
        """The state of the keeper's snapshot, if it has one."""
        snapshot = None if self.keeper is None else self.keeper.load()
        if snapshot is None:
            return state
        if snapshot.run != self.name:
            raise ValueError(
                "The snapshot is of a run with another clip, configuration or seed; go on with"
                " those, or start anew without it."
            )
        self.done, self.pairs = snapshot.steps, snapshot.pairs
        return restore(state, snapshot.arrays)

    def begins(self, name: str) -> bool:
        """Whether no step of a stage is done yet."""
        return self.done <= self.starts[name]

    def with_bodies(self, state: TrainState, key: jax.Array) -> TrainState:
        """Bodies for the poses that are lost, if the field can hold them."""
        more = getattr(self.field, "bodies", 1) - 1
        if not more:
            return state
        splats, params = bodies.add_bodies(
            self._asset(state),
            self.capture,
            count=more,
            num_splats=self.config.body_splats,
            key=key,
        )
        return create_state(splats, params, self.config.rates)

    def run(
        self, state: TrainState, name: str, stage: Stage, view_key: jax.Array, key: jax.Array
    ) -> TrainState:
        """All steps of one stage that are not done yet, with a fresh optimizer at its start."""
        still = 0 if self.capture.still is None else len(self.capture.still)
        order, opened = view_order(view_key, stage, self.instant_of, still)
        if self.begins(name):
            state = create_state(state.splats, state.params["deformation"], self.config.rates)
        decay = stage.end_rate / stage.start_rate
        key, shaking_key = jax.random.split(key)
        splats = int(state.active.sum())
        for i in range(self.done - self.starts[name], stage.steps):
            if i and opened[i] > opened[i - 1]:
                state = _hold(state, self.instants[opened[i - 1]], self.field)
            rate = stage.start_rate * decay ** (i / stage.steps)
            scale = stage.low_scale if i < stage.low_steps else 1.0
            begin = time.perf_counter()
            noise_key = jax.random.fold_in(shaking_key, self.done)
            state, report = self._step(state, name, i, order[i], rate, noise_key, scale)
            self.done += 1
            self.clock.note(self.done, time.perf_counter() - begin)
            if self.config.density.refines_at(self.done):
                state, report_of_splats = refine(
                    state,
                    jax.random.fold_in(key, self.done),
                    self.done,
                    density=self.config.density,
                    field=self.field,
                )
                splats = int(report_of_splats.active)
                _LOGGER.info("Step %d: %s.", self.done, report_of_splats)
            if self.config.density.resets_opacity_at(self.done):
                state = reset_opacity(state, density=self.config.density)
            if self.callback is not None:
                psnr = -10 * math.log10(max(float(report.mse), 1e-10))
                eta = self.clock.remaining(self.done)
                loss = float(report.loss)
                make = functools.partial(self._asset, state)
                self.callback(Progress(name, self.done, self.total, loss, psnr, splats, eta, make))
            self._keep(state)
        return state

    def _asset(self, state: TrainState) -> Asset:
        """A copy of the present asset, on the host."""
        splats, params = jax.tree.map(np.array, (state.splats, state.params["deformation"]))
        facts = {"steps": self.done, "splats": int(splats.active.sum())}
        return Asset(splats, self.field, params, self.capture.background, facts)

    def _keep(self, state: TrainState) -> None:
        """Takes a snapshot where one is due, and stops where the keeper says so."""
        if self.keeper is None:
            return
        stops = self.keeper.stops()
        if stops or self.done % self.keeper.every == 0 or self.done == self.total:
            self._save(state)
        if stops:
            raise Interrupted(f"Stopped after step {self.done} of {self.total}.")

    def _save(self, state: TrainState) -> None:
        if self.keeper is not None:
            self.keeper.save(Snapshot(self.name, self.done, self.pairs, flatten(state)))

    def _step(
        self,
        state: TrainState,
        name: str,
        i: int,
        indices: Int[np.ndarray, "b"],
        rate: float,
        key: jax.Array,
        scale: float,
    ) -> tuple[TrainState, StepReport]:
        """One step; repeated with twice the pair capacity as long as a view does not fit."""
        views = self.views(scale)
        while True:
            settings = self._settings(name, scale)
            state, report = step(
                state,
                views,
                jnp.asarray(indices),
                jnp.asarray(rate, jnp.float32),
                key,
                self.perceptual,
                settings=settings,
            )
            overflow = int(report.overflow)
            if not overflow:
                break
            self.pairs = pair_capacity(self.pairs + overflow)
        if not math.isfinite(float(report.loss)):
            self._save(state)
            raise FloatingPointError(
                f"The loss became {float(report.loss)} at step {i} of the {name} stage; lower the"
                " learning rates and start anew, or check the frames for numbers that are not"
                " finite."
            )
        return state, report

    def _settings(self, name: str, scale: float) -> StepSettings:
        config, stage = self.config, self.stages[name]
        bands = self.done // config.sh_interval if config.sh_interval else config.sh_degree
        return StepSettings(
            deformation=None if name == "warmup" else self.field,
            weights=stage.weights or config.weights,
            rates=stage.rates or config.rates,
            density=config.density,
            background=self.capture.background,
            pairs=self.pairs,
            blur=BLUR * scale**2 + (1 - scale**2) / 12,
            sh_degree=min(bands, config.sh_degree),
            implementation=config.implementation,
        )


@functools.partial(jax.jit, static_argnames=("field",), donate_argnames=("state",))
def _hold(state: TrainState, t: Float[Array, ""], field: Deformation) -> TrainState:
    held = field.hold(state.params["deformation"], t)
    return dataclasses.replace(state, params=state.params | {"deformation": held})
