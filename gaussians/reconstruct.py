"""From an orbital clip to a moving object: coarse-to-fine fitting of deforming Gaussians.

Diffusion4D, section 3.4: a coarse stage on the dynamic orbit merged with a static orbit, then a
fine stage on the dynamic orbit. Ours has a warm-up before them (as 4DGS has), which fits the
canonical splats to the static orbit alone, and three additions that a single orbit needs, since
each instant is seen from one side only:

- Motion is that of control points which move as rigidly and smoothly as the images allow. In a
  clip that returns to rest they are tracked from both ends (`gaussians.tracking`), which then is
  the coarse stage.
- Some static views stay in the fine stage (`Stage.static_fraction`); the paper has none there.
- A pose that the coarse stage could not find gets a body of its own (`gaussians.bodies`).
"""

import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d4d_jax.clips import OrbitClip
from d4d_jax.metrics import Lpips
from d4d_jax.typing import PyTree
from gaussians import bodies, preparation, tracking
from gaussians.asset import Asset, pair_capacity
from gaussians.captures import Capture, of_clip
from gaussians.configuration import ReconstructConfig
from gaussians.deformation import Deformation, build
from gaussians.deformation.skeleton import Skeleton
from gaussians.optimization import (
    StepReport,
    StepSettings,
    TrainState,
    create_state,
    refine,
    reset_opacity,
    step,
)
from gaussians.progress import Clock, Progress
from gaussians.projection import scaled_blur
from gaussians.rasterize import chosen
from gaussians.snapshot import Interrupted, Keeper, Snapshot, digest, flatten, restore
from gaussians.stages import Stage, view_order

__all__ = ["Progress", "ReconstructConfig", "reconstruct", "tracks"]

_LOGGER = logging.getLogger(__name__)


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
        keys = [jax.random.fold_in(k, number) for k in (view_key, densify_key)]
        if name == "coarse" and fit.tracks:
            if fit.begins("coarse"):
                state = fit.track(state, stage, keys[0])
            continue
        if name == "fine" and "coarse" in fit.stages and not fit.tracks and fit.begins(name):
            state = fit.with_bodies(state, body_key)
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


def tracks(config: ReconstructConfig, capture: Capture) -> bool:
    """Whether the coarse stage of a reconstruction is tracking (`gaussians.tracking`)."""
    return (
        config.coarse.steps > 0
        and config.nodes.steps == 0
        and config.tracking.steps > 0
        and tracking.can_track(build(config.deformation), capture)
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
        names = ["warmup"] * (capture.still is not None) + ["nodes", "coarse", "fine"]
        stages = {name: getattr(config, name) for name in names}
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
        self.tracks = tracks(config, capture)
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

    def track(self, state: TrainState, stage: Stage, key: jax.Array) -> TrainState:
        """The coarse stage by tracking: the poses of the control points, and nothing else."""
        _LOGGER.info("The clip returns to rest: its motion is tracked from both ends.")
        steps = self.config.tracking.starts * self.config.tracking.steps
        start, done = self.done, 0
        begin = time.perf_counter()
        field, _ = tracking.bottom(self.field, state.params["deformation"])

        def tell(tracked: int, loss: float, mse: float, params: PyTree) -> None:
            nonlocal begin, done
            if self.keeper is not None and self.keeper.stops():
                self._save(state)  # as it was before: tracking then starts over
                raise Interrupted(f"Stopped after step {self.done} of {self.total}.")
            now = stage.steps * tracked // steps
            if now > done:
                self.clock.note(start + now, (time.perf_counter() - begin) / (now - done))
                begin, done = time.perf_counter(), now
                self._tell(self._tracked(state, params), "coarse", start + now, loss, mse)

        params = tracking.track(
            field,  # pyright: ignore[reportArgumentType]: `can_track` has looked at it
            state.splats,
            self.capture,
            self.config.tracking,
            key,
            implementation=self.config.implementation,
            callback=tell,
        )
        self.done = start + stage.steps
        state = self._tracked(state, params)
        self._save(state)
        return state

    def _tracked(self, state: TrainState, params: PyTree) -> TrainState:
        """The state with other parameters of the control points, and a fresh optimizer."""
        deformation = tracking.with_bottom(self.field, state.params["deformation"], params)
        return create_state(state.splats, deformation, self.config.rates)

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
                _LOGGER.info("Step %d: %s.", self.done, report_of_splats)
            if self.config.density.resets_opacity_at(self.done):
                state = reset_opacity(state, density=self.config.density)
            self._tell(state, name, self.done, report.loss, report.mse)
            self._keep(state)
        return state

    def _tell(
        self,
        state: TrainState,
        name: str,
        done: int,
        loss: float | Float[Array, ""],
        mse: float | Float[Array, ""],
    ) -> None:
        if self.callback is not None:
            psnr = -10 * math.log10(max(float(mse), 1e-10))
            eta, splats = self.clock.remaining(done), int(state.active.sum())
            make = functools.partial(self._asset, state)
            self.callback(Progress(name, done, self.total, float(loss), psnr, splats, eta, make))

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
        rates = stage.rates or config.rates
        if self.tracks and name == "fine":
            rates = dataclasses.replace(rates, nodes=config.tracking.settled * rates.nodes)
        bands = self.done // config.sh_interval if config.sh_interval else config.sh_degree
        shown = {"warmup": None, "nodes": Skeleton(self.field)}
        return StepSettings(
            deformation=shown.get(name, self.field),
            weights=stage.weights or config.weights,
            rates=rates,
            density=config.density,
            background=self.capture.background,
            pairs=self.pairs,
            blur=scaled_blur(scale),
            sh_degree=min(bands, config.sh_degree),
            implementation=config.implementation,
        )


@functools.partial(jax.jit, static_argnames=("field",), donate_argnames=("state",))
def _hold(state: TrainState, t: Float[Array, ""], field: Deformation) -> TrainState:
    held = field.hold(state.params["deformation"], t)
    return dataclasses.replace(state, params=state.params | {"deformation": held})
