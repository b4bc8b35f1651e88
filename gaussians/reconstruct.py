"""From an orbital clip to a moving object: coarse-to-fine fitting of deforming Gaussians.

Diffusion4D, section 3.4: a coarse stage on the dynamic orbit merged with a static orbit, then a
fine stage on the dynamic orbit. Ours has a warm-up before them (as 4DGS has), which fits the
canonical splats to the static orbit alone, and three additions that a single orbit needs, since
each instant is seen from one side only:

- The coarse stage opens the clip frame by frame; a newly opened frame starts from its neighbour's
  pose (`curriculum`).
- Some static views stay in the fine stage (`Stage.static_fraction`); the paper has none there.
- Where the object strays far from its static pose, splats of their own are added, carved from the
  silhouettes of a window of frames and alive around that window only (`window_splats`).
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from d4d_jax.clips import OrbitClip
from gaussians import preparation
from gaussians.asset import Asset, pair_capacity
from gaussians.deformation import Deformation, build
from gaussians.deformation.lifespan import Lifespan
from gaussians.densify import AdaptiveDensity
from gaussians.losses import LossWeights
from gaussians.optimization import (
    LearningRates,
    StepReport,
    StepSettings,
    TrainState,
    create_state,
    densify,
    reset_opacity,
    step,
)
from gaussians.projection import BLUR
from gaussians.rasterize import chosen


@dataclasses.dataclass(frozen=True)
class Stage:
    """How many steps on which views.

    Attributes:
        steps: number of steps, one view each; 0 leaves the stage out.
        static_fraction: share of the steps on static views, in [0, 1]. Without a static orbit all
            steps take dynamic views.
        low_steps: how many of the steps, the first ones, are at low resolution.
        low_scale: the low resolution over the full one.
        start_rate: factor on all learning rates at the first step.
        end_rate: the same at the last step; exponential in between.
        curriculum: opens the frames of the clip one after the other over this share of the stage.
    """

    steps: int
    static_fraction: float = 0.0
    low_steps: int = 0
    low_scale: float = 0.5
    start_rate: float = 1.0
    end_rate: float = 0.1
    curriculum: float = 0.0

    def __post_init__(self):
        if self.steps < 0 or self.low_steps < 0:
            raise ValueError(f"The numbers of steps of a stage cannot be negative; got {self}.")
        for name in ("static_fraction", "curriculum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}.")
        if not 0 < self.low_scale <= 1:
            raise ValueError(f"low_scale must lie in (0, 1]; got {self.low_scale}.")
        if not (self.start_rate > 0 and self.end_rate > 0):
            raise ValueError(
                f"start_rate={self.start_rate} and end_rate={self.end_rate} must be above 0."
            )


def _default_deformation() -> dict[str, Any]:
    return {"name": "lifespan", "base": {"name": "hexplane"}, "knots": 9}


def _default_density() -> AdaptiveDensity:
    return AdaptiveDensity(start=950, stop=2100, every=300, reset_every=0)


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """All choices of a reconstruction. The defaults are for 256 x 256 clips of 24 frames.

    Attributes:
        num_splats: created from the static orbit's silhouettes (or at random without them).
        window_splats: added for the windows of frames that differ from the static pose; they need
            the `lifespan` deformation.
        num_windows: equal windows the clip is cut into for that.
        capacity: slots for splats; densification fills those that initialization leaves.
        sh_degree: of the colours, 0 to 3.
        deformation: spec of the field, for `gaussians.deformation.build`.
        warmup: static views only, field at rest; skipped without a static orbit.
        coarse: dynamic and static views (Diffusion4D's coarse stage).
        fine: dynamic views, and as many static ones as `fine.static_fraction` says.
        density: when and how splats are cloned, split and pruned; its steps count over the run.
        weights: of the losses.
        rates: learning rates.
        static_time: timestamp of the static orbit; None takes that of the dynamic frame which is
            most alike (the published static orbits are frozen at the second frame, not at 0).
        pairs_per_splat: initial capacity of the rasterizer's pair list; it doubles when a view
            does not fit.
        implementation: of the rasterizer, None chooses.
    """

    num_splats: int = 8000
    window_splats: int = 3000
    num_windows: int = 4
    capacity: int = 12000
    sh_degree: int = 0
    deformation: Mapping[str, Any] = dataclasses.field(default_factory=_default_deformation)
    warmup: Stage = Stage(steps=300, static_fraction=1.0, low_steps=200)
    coarse: Stage = Stage(
        steps=600, static_fraction=0.25, low_steps=600, curriculum=0.8, end_rate=0.5
    )
    fine: Stage = Stage(steps=2000, static_fraction=0.2, low_steps=400, end_rate=0.05)
    density: AdaptiveDensity = dataclasses.field(default_factory=_default_density)
    weights: LossWeights = dataclasses.field(default_factory=LossWeights)
    rates: LearningRates = dataclasses.field(default_factory=LearningRates)
    static_time: float | None = None
    pairs_per_splat: float = 8.0
    implementation: str | None = None

    def __post_init__(self):
        if self.num_splats + self.window_splats > self.capacity:
            raise ValueError(
                f"A capacity of {self.capacity} cannot hold num_splats={self.num_splats} and"
                f" window_splats={self.window_splats}; raise the capacity."
            )
        if self.num_splats < 1 or self.window_splats < 0 or self.pairs_per_splat <= 0:
            raise ValueError(
                f"num_splats={self.num_splats} must be at least 1,"
                f" window_splats={self.window_splats} at least 0 and"
                f" pairs_per_splat={self.pairs_per_splat} above 0."
            )
        if self.static_time is not None and not 0 <= self.static_time <= 1:
            raise ValueError(f"static_time must lie in [0, 1]; got {self.static_time}.")
        if self.sh_degree not in range(4):
            raise ValueError(f"sh_degree must be 0, 1, 2 or 3; got {self.sh_degree}.")
        chosen(self.implementation)  # Raises for a name that there is not.
        build(self.deformation)  # Likewise.


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
    """

    stage: str
    step: int
    total: int
    loss: float
    psnr: float
    splats: int
    eta: float


def reconstruct(
    clip: OrbitClip,
    config: ReconstructConfig,
    key: jax.Array,
    callback: Callable[[Progress], None] | None = None,
) -> Asset:
    """Fits moving Gaussians to the dynamic and static orbit of a clip.

    Front frames are never looked at. On one CPU platform the same arguments give the same asset,
    bit for bit.

    Args:
        clip: needs `dynamic`; `static` and the alphas may be missing. Without alphas a pixel
            belongs to the object where it differs from the background.
        config: the choices.
        key: places the first splats and orders the views.
        callback: called after every step.

    Raises:
        ValueError: the clip has no dynamic frames, or the configuration does not fit it.
        FloatingPointError: the loss became NaN or infinite.
    """
    if clip.dynamic is None:
        raise ValueError("The clip has no dynamic orbit (multi_frame0.png, ...) to reconstruct.")
    splat_key, field_key, view_key, densify_key = jax.random.split(key, 4)
    field = build(config.deformation)
    static_time = (
        preparation.find_static_time(clip) if config.static_time is None else config.static_time
    )
    first_key, window_key = jax.random.split(splat_key)
    splats = preparation.first_splats(
        clip, config.num_splats, config.capacity, config.sh_degree, first_key
    )
    state = create_state(splats, jax.jit(field.init)(field_key, splats), config.rates)
    fit = _Fit(clip, config, field, static_time, callback)
    for number, (name, stage) in enumerate(fit.stages.items()):
        if name == "coarse":
            state = _with_window_splats(state, clip, config, field, window_key)
        keys = [jax.random.fold_in(k, number) for k in (view_key, densify_key)]
        state = fit.run(state, name, stage, *keys)
    meta = {
        "steps": fit.total,
        "splats": int(state.active.sum()),
        "static_time": static_time,
        "implementation": chosen(config.implementation),
    }
    return Asset(
        splats=state.splats,
        deformation=field,
        params=state.params["deformation"],
        background=clip.background,
        meta=meta,
    )


def _with_window_splats(
    state: TrainState,
    clip: OrbitClip,
    config: ReconstructConfig,
    field: Deformation,
    key: jax.Array,
) -> TrainState:
    if not config.window_splats or not isinstance(field, Lifespan):
        return state
    splats, params = preparation.add_window_splats(
        clip,
        state.splats,
        field,
        state.params["deformation"],
        budget=config.window_splats,
        num_windows=config.num_windows,
        key=key,
    )
    return create_state(splats, params, config.rates)


class _Fit:
    """The host's side of a reconstruction: it feeds the compiled steps and reacts to them."""

    def __init__(
        self,
        clip: OrbitClip,
        config: ReconstructConfig,
        field: Deformation,
        static_time: float,
        callback: Callable[[Progress], None] | None,
    ):
        self.clip, self.config, self.field, self.static_time = clip, config, field, static_time
        self.callback = callback
        stages = {"warmup": config.warmup, "coarse": config.coarse, "fine": config.fine}
        if clip.static is None:
            del stages["warmup"]
        self.stages = {name: stage for name, stage in stages.items() if stage.steps}
        self.total = sum(stage.steps for stage in self.stages.values())
        self.pairs = pair_capacity(config.pairs_per_splat * config.capacity)
        self.done = 0
        self.seconds: collections.deque[float] = collections.deque(maxlen=50)
        self.views = functools.lru_cache(maxsize=2)(
            lambda scale: preparation.views_of(clip, static_time, scale)
        )

    def run(
        self, state: TrainState, name: str, stage: Stage, view_key: jax.Array, key: jax.Array
    ) -> TrainState:
        """All steps of one stage, with a fresh optimizer."""
        order, opened = view_order(
            view_key, stage, self.clip.num_frames, self.clip.static is not None
        )
        state = create_state(state.splats, state.params["deformation"], self.config.rates)
        decay = stage.end_rate / stage.start_rate
        splats = int(state.active.sum())
        for i in range(stage.steps):
            if i and opened[i] > opened[i - 1]:
                state = _hold(state, self.clip.timestamps[opened[i - 1]], self.field)
            rate = stage.start_rate * decay ** (i / stage.steps)
            scale = stage.low_scale if i < stage.low_steps else 1.0
            begin = time.perf_counter()
            state, report = self._step(state, name, i, int(order[i]), rate, scale)
            self.seconds.append(time.perf_counter() - begin)
            self.done += 1
            if self.config.density.refines_at(self.done):
                state = densify(
                    state,
                    jax.random.fold_in(key, self.done),
                    self.done,
                    density=self.config.density,
                    field=self.field,
                )
                splats = int(state.active.sum())
            if self.config.density.resets_opacity_at(self.done):
                state = reset_opacity(state, density=self.config.density)
            if self.callback is not None:
                psnr = -10 * math.log10(max(float(report.mse), 1e-10))
                eta = float(np.median(self.seconds)) * (self.total - self.done)
                loss = float(report.loss)
                self.callback(Progress(name, self.done, self.total, loss, psnr, splats, eta))
        return state

    def _step(
        self, state: TrainState, name: str, i: int, index: int, rate: float, scale: float
    ) -> tuple[TrainState, StepReport]:
        """One step; repeated with twice the pair capacity as long as the view does not fit."""
        views = self.views(scale)
        while True:
            settings = self._settings(name, scale)
            state, report = step(
                state, views, jnp.asarray(index), jnp.asarray(rate, jnp.float32), settings=settings
            )
            overflow = int(report.overflow)
            if not overflow:
                break
            self.pairs = pair_capacity(self.pairs + overflow)
        if not math.isfinite(float(report.loss)):
            raise FloatingPointError(
                f"The loss became {float(report.loss)} at step {i} of the {name} stage; lower the"
                " learning rates, or check the clip for frames that are not finite."
            )
        return state, report

    def _settings(self, name: str, scale: float) -> StepSettings:
        config = self.config
        return StepSettings(
            deformation=None if name == "warmup" else self.field,
            weights=config.weights,
            rates=config.rates,
            background=self.clip.background,
            pairs=self.pairs,
            blur=BLUR * scale**2 + (1 - scale**2) / 12,
            implementation=config.implementation,
        )


def view_order(
    key: jax.Array, stage: Stage, num_frames: int, has_static: bool
) -> tuple[Int[np.ndarray, "steps"], Int[np.ndarray, "steps"]]:
    """Which view every step of a stage takes, and how many frames are open by then.

    Dynamic views are drawn like cards, each once before any comes twice. During the curriculum,
    half of them are drawn from the three frames opened last and half from all open frames.

    Returns:
        The indices into `preparation.views_of` (dynamic frames first, then static ones), and the
        index of the last open frame.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    opening = stage.curriculum * stage.steps
    progress = np.arange(stage.steps) / opening if opening else np.ones(stage.steps)
    last = np.minimum(1 + progress * (num_frames - 2), num_frames - 1).astype(int)
    static = rng.random(stage.steps) < (stage.static_fraction if has_static else 0.0)
    recent = rng.random(stage.steps) < 0.5
    order = np.zeros(stage.steps, int)
    cards: list[int] = []
    for i in range(stage.steps):
        if static[i]:
            order[i] = num_frames + rng.integers(num_frames)
        elif last[i] < num_frames - 1:
            first = max(0, last[i] - 2) if recent[i] else 0
            order[i] = rng.integers(first, last[i] + 1)
        else:
            cards = cards or list(rng.permutation(num_frames))
            order[i] = cards.pop()
    return order, last


@functools.partial(jax.jit, static_argnames=("field",), donate_argnames=("state",))
def _hold(state: TrainState, t: Float[Array, ""], field: Deformation) -> TrainState:
    held = field.hold(state.params["deformation"], t)
    return dataclasses.replace(state, params=state.params | {"deformation": held})
