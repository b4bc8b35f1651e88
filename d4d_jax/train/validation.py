"""The losses on clips that are not trained on, without chance: the same draws every time."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from d4d_jax.train import sharding
from d4d_jax.train.state import TrainState
from d4d_jax.typing import PyTree

#: `(params, frozen, batch, timestep (b,)) -> {"name": (b,)}`, with `schedule.num_steps` steps.
EvaluateFn = Callable[[PyTree, PyTree, PyTree, Array], Mapping[str, Array]]


@runtime_checkable
class Clips(Protocol):
    """Random access to clips, such as a list or a `grain.MapDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PyTree: ...


class Validation:
    """Means over clips and over the whole range of timesteps, for the averaged parameters.

    Every clip is seen at `levels` timesteps, one in each of as many equal parts of the range. Where
    in that part it lies, and the noise, depend on the clip's number alone. So the figures of two
    steps, or of two runs on the same clips, differ by what the networks have learnt.
    """

    def __init__(
        self,
        evaluate: EvaluateFn,
        clips: Clips,
        *,
        num_timesteps: int,
        levels: int = 4,
    ):
        """Compiles nothing yet.

        Args:
            evaluate: the parts of the loss of every clip, as `DiffusionObjective.evaluate`.
            clips: dicts of arrays without a batch axis.
            num_timesteps: of the schedule.
            levels: parts of the range of timesteps.
        """
        self._evaluate = jax.jit(
            # Every process is to have all of the figures.
            lambda *arguments: jax.tree.map(sharding.constrain, evaluate(*arguments))
        )
        self._clips = clips
        self._num_timesteps, self._levels = num_timesteps, levels

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{"val_NAME": mean, "val_NAME_1of4": mean over the least noisy quarter, ...}`."""
        found: dict[str, list[Array]] = {}
        for i in range(len(self._clips)):
            batch, timestep = self._draw(i)
            for name, values in self._evaluate(state.ema, state.frozen, batch, timestep).items():
                found.setdefault(name, []).append(values)
        means: dict[str, float] = {}
        for name, values in jax.device_get(found).items():
            by_level = np.mean(values, axis=0)
            means[f"val_{name}"] = float(by_level.mean())
            for level, mean in enumerate(by_level, start=1):
                means[f"val_{name}_{level}of{self._levels}"] = float(mean)
        return means

    def _draw(self, index: int) -> tuple[PyTree, Array]:
        """A clip, repeated for every level, with its keys and timesteps."""
        rng = np.random.default_rng(index)
        place = np.arange(self._levels) + rng.random(self._levels)
        timestep = (place / self._levels * self._num_timesteps).astype(np.int32)
        batch = {
            name: np.repeat(np.asarray(value)[None], self._levels, axis=0)
            for name, value in self._clips[index].items()
        }
        batch["key"] = rng.integers(2**32, size=(self._levels, 2), dtype=np.uint32)
        return batch, jnp.asarray(timestep)
