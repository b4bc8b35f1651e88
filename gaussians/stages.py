"""The stages of a reconstruction: how many steps each has, on which views and at which rates."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from gaussians.losses import LossWeights
from gaussians.optimization import LearningRates


@dataclasses.dataclass(frozen=True)
class Stage:
    """How many steps on which views.

    Attributes:
        steps: number of steps; 0 leaves the stage out.
        views: per step, at least 1; the loss is their mean.
        static_fraction: share of the steps on static views, in [0, 1]. Without a static orbit all
            steps take dynamic views.
        low_steps: how many of the steps, the first ones, are at low resolution.
        low_scale: the low resolution over the full one.
        start_rate: factor on all learning rates at the first step.
        end_rate: the same at the last step; exponential in between.
        curriculum: opens the frames of the clip one after the other over this share of the stage.
        weights: of the losses in this stage; None takes those of the run.
        rates: learning rates in this stage; None takes those of the run.
    """

    steps: int
    views: int = 1
    static_fraction: float = 0.0
    low_steps: int = 0
    low_scale: float = 0.5
    start_rate: float = 1.0
    end_rate: float = 0.1
    curriculum: float = 0.0
    weights: LossWeights | None = None
    rates: LearningRates | None = None

    def __post_init__(self):
        if self.steps < 0 or self.low_steps < 0:
            raise ValueError(f"The numbers of steps of a stage cannot be negative; got {self}.")
        if self.views < 1:
            raise ValueError(f"A step needs at least 1 view; got views={self.views}.")
        for name in ("static_fraction", "curriculum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}.")
        if not 0 < self.low_scale <= 1:
            raise ValueError(f"low_scale must lie in (0, 1]; got {self.low_scale}.")
        if not (self.start_rate > 0 and self.end_rate > 0):
            raise ValueError(
                f"start_rate={self.start_rate} and end_rate={self.end_rate} must be above 0."
            )


def view_order(
    key: jax.Array, stage: Stage, instants: Int[np.ndarray, "m"], num_still: int
) -> tuple[Int[np.ndarray, "steps views"], Int[np.ndarray, "steps"]]:
    """Which views every step of a stage takes, and which instants are open by then.

    Moving views are drawn like cards, each once before any comes twice. During the curriculum,
    half of them are drawn from the three instants opened last and half from all open ones.

    Args:
        key: of the draws.
        stage: how many steps and views, and the share of still ones.
        instants: number of the instant of every moving view, from 0 without gaps.
        num_still: number of still views.

    Returns:
        The indices into `preparation.views_of` (moving views first, then still ones), and the
        number of the last open instant.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    size = stage.steps, stage.views
    final = int(instants.max())
    opening = stage.curriculum * stage.steps
    progress = np.arange(stage.steps) / opening if opening else np.ones(stage.steps)
    last = np.clip(1 + progress * (final - 1), 0, final).astype(int)
    still = rng.random(size) < (stage.static_fraction if num_still else 0.0)
    recent = rng.random(size) < 0.5
    order = np.zeros(size, int)
    cards: list[int] = []
    for i, j in np.ndindex(size):
        if still[i, j]:
            order[i, j] = len(instants) + rng.integers(num_still)
        elif last[i] < final:
            first = max(0, last[i] - 2) if recent[i, j] else 0
            order[i, j] = rng.choice(np.flatnonzero((first <= instants) & (instants <= last[i])))
        else:
            cards = cards or list(rng.permutation(len(instants)))
            order[i, j] = cards.pop()
    return order, last
