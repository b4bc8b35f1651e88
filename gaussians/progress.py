"""What a callback is told of a reconstruction, and how long it still takes."""

import collections
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from gaussians.asset import Asset
from gaussians.stages import Stage

_WINDOW = 50  # steps of one kind that are looked at


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


class Clock:
    """Estimates the time to the last step from the steps done, by their stage and resolution.

    A kind of step that has not come yet is taken to last as long as the latest one, times the ratio
    of the image sides: between fixed costs, which do not grow, and those of pixels, which grow with
    the square.
    """

    def __init__(self, stages: Mapping[str, Stage]):
        """Takes the stages by name, in their order."""
        self._sides: list[float] = []  # of each kind
        kinds: list[int] = []  # of each step
        for stage in stages.values():
            low = min(stage.low_steps, stage.steps)
            for side, steps in ((stage.low_scale, low), (1.0, stage.steps - low)):
                kinds += [len(self._sides)] * steps
                self._sides.append(side)
        self._kinds = np.array(kinds, int)
        self._seconds: dict[int, collections.deque[float]] = {}

    def note(self, step: int, seconds: float) -> None:
        """Takes note of how long a step took; steps count from 1 over the run."""
        times = collections.deque[float](maxlen=_WINDOW)
        self._seconds.setdefault(int(self._kinds[step - 1]), times).append(seconds)

    def remaining(self, step: int) -> float:
        """Seconds from the end of a step, which has been noted, to the end of the last one."""
        latest = int(self._kinds[step - 1])
        medians = {kind: float(np.median(times)) for kind, times in self._seconds.items()}
        unit = medians[latest] / self._sides[latest]
        counts = np.bincount(self._kinds[step:], minlength=len(self._sides))
        return sum(
            int(steps) * medians.get(kind, unit * self._sides[kind])
            for kind, steps in enumerate(counts)
        )
