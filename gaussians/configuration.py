"""All choices of a reconstruction, and their defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gaussians import densify, initialize
from gaussians.deformation import build
from gaussians.deformation.skeleton import Skeleton
from gaussians.densify import AdaptiveDensity
from gaussians.losses import LossWeights
from gaussians.optimization import LearningRates
from gaussians.rasterize import chosen
from gaussians.stages import Stage
from gaussians.tracking import Tracking

_WARMUP = Stage(steps=300, static_fraction=1.0, low_steps=200)
_NODES = Stage(
    steps=0,
    static_fraction=0.25,
    low_steps=400,
    end_rate=0.5,
    rates=LearningRates(nodes=8e-3),
)
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
        nodes: the control points are fitted as if they were the splats (SC-GS's first stage); no
            steps by default, since the held-out views do not gain by it.
        coarse: dynamic and static views (Diffusion4D's coarse stage). Which poses need bodies of
            their own is judged at its end, so it should be long enough to follow the motion, and
            too short to contort one body into every silhouette.
        tracking: how the coarse stage of a clip that returns to rest is done by control points
            (`gaussians.tracking`), instead of its own steps on all frames at once; a `Tracking` or
            its fields. With 0 steps, or a stage `nodes`, all clips have the latter.
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
    nodes: Stage = _NODES
    coarse: Stage = _COARSE
    tracking: Any = dataclasses.field(default_factory=Tracking)
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
        if isinstance(self.tracking, Mapping):
            object.__setattr__(self, "tracking", Tracking(**self.tracking))
        chosen(self.implementation)  # Raises for a name that there is not.
        field = build(self.deformation)  # Likewise.
        if self.nodes.steps and not Skeleton.carries(field):
            raise ValueError(
                f"The stage nodes has {self.nodes.steps} steps, but the deformation"
                f" {self.deformation['name']!r} has no control points: set nodes.steps to 0."
            )
        if self.initializer is not None:
            initialize.build(self.initializer)  # Likewise.
