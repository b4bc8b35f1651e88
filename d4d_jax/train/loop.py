"""The training loop, to be read from top to bottom."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from d4d_jax.train import sharding
from d4d_jax.train.checkpoint import Checkpointer, DataIterator
from d4d_jax.train.state import TrainState
from d4d_jax.train.step import Metrics, StepFn
from d4d_jax.typing import MetricWriter, PyTree

_LOGGER = logging.getLogger(__name__)

_REMEDY = "lower the learning rate or clip the gradient, and continue from the last checkpoint."


class Interrupted(Exception):
    """The run was asked to stop, and has saved where it stands."""


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long to train and what to do in between; all in steps.

    Attributes:
        num_steps: the run ends when the state has made this many updates in total.
        log_every: distance between two lines of metrics (means over that stretch).
        checkpoint_every: distance between two checkpoints; the last step always gets one.
        sample_every: distance between two calls of `on_sample`; 0 means never.
        validate_every: distance between two calls of `on_validate`, of which there is also one
            before the first and one after the last step; 0 means never.
        max_skipped: updates in a row that may not be made, because loss or gradient is not finite,
            before the run stops.
        profile: first and last step of a profiler trace in `profile_folder`; None for none.
        profile_folder: a folder to be made.

    Raises:
        ValueError: one of them is below 1 (`sample_every`, `validate_every`: below 0), or the trace
            ends before it starts.
    """

    num_steps: int
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0
    validate_every: int = 0
    max_skipped: int = 10
    profile: tuple[int, int] | None = None
    profile_folder: str | os.PathLike[str] = "profile"

    def __post_init__(self) -> None:
        for name in ("num_steps", "log_every", "checkpoint_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("sample_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}.")
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            first, last = self.profile
            raise ValueError(f"A profile goes from a step on to a later one, not {first}:{last}.")


def train(
    state: TrainState,
    step_fn: StepFn,
    data: DataIterator,
    options: LoopOptions,
    *,
    mesh: Mesh,
    checkpointer: Checkpointer,
    writer: MetricWriter,
    config: Mapping[str, Any],
    on_sample: Callable[[TrainState], Mapping[str, Any]] | None = None,
    on_validate: Callable[[TrainState], Mapping[str, float]] | None = None,
    state_rules: Sequence[sharding.Rule] = sharding.STATE_RULES,
    batch_rules: Sequence[sharding.Rule] = sharding.BATCH_RULES,
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains from `state.step` to `options.num_steps` and returns the final state.

    Args:
        state: where to start; its buffers are donated.
        step_fn: from `make_train_step`.
        data: endless iterator over batches (leading axis: clips of this process).
        options: lengths and distances.
        mesh: devices; every batch is split over them.
        checkpointer: receives the state, the position of `data`, and the newest validation.
        writer: receives the metrics, and of the stretch since the last line `steps_per_second`,
            `clips_per_second`, `tflops_per_second` (of all devices, as XLA counts the operations),
            `input_wait` (share of the time that was spent waiting for data) and `eta_seconds`.
        config: saved with every checkpoint.
        on_sample: returns images `(h w 3)` in [0, 1], and videos `(t h w 3)`, to write.
        on_validate: returns scalars to write, for example the loss on other clips.
        state_rules, batch_rules: where the leaves of the state and of batches lie.
        stop: asked after every step whether to save and stop. Runs of several processes ask JAX
            instead, which lets all of them stop at one step when one is told to (by SIGTERM).

    Raises:
        FloatingPointError: `max_skipped` updates in a row were not made, or a parameter or an
            averaged parameter is not finite; the message names the steps. Nothing that came after
            the last good checkpoint is saved then.
        Interrupted: it was stopped; the state is saved.
    """
    state = sharding.place_state(state, mesh, state_rules)
    first = int(state.step)
    validation: Mapping[str, float] = {}
    if on_validate and options.validate_every and first == 0:
        with jax.set_mesh(mesh):
            validation = on_validate(state)
        writer.write_scalars(0, validation)
    pending: list[Metrics] = []  # on the device; fetched once per line so steps overlap
    skips = _Skips(first, options.max_skipped, checkpointer)
    stretch, flops, clips = _Stretch(first), None, 0
    for step in range(first + 1, options.num_steps + 1):
        # Input.
        asked = time.perf_counter()
        batch = next(data)
        stretch.waited += time.perf_counter() - asked
        batch = sharding.place_batch(batch, mesh, batch_rules)
        # Update. Compiled once, before the first one.
        if flops is None:
            with jax.set_mesh(mesh):
                step_fn, flops = _compiled(step_fn, state, batch)
            clips, stretch = jax.tree.leaves(batch)[0].shape[0], _Stretch(first)
        if options.profile and step == options.profile[0]:
            jax.profiler.start_trace(options.profile_folder)
        state, metrics = step_fn(state, batch)
        if options.profile and step == options.profile[1]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
        pending.append(metrics)
        stopping = _should_stop(step, stop)
        is_last = step == options.num_steps
        is_checkpoint = is_last or stopping or step % options.checkpoint_every == 0
        # Metrics. Fetched, and so checked, before every checkpoint too.
        if is_checkpoint or step - first == 1 or step % options.log_every == 0:
            means = skips.means(jax.device_get(pending))
            rates = stretch.rates(step, options.num_steps, clips, flops)
            writer.write_scalars(step, {**means, **rates})
            writer.flush()
            pending, stretch = [], _Stretch(step)
        # Validation.
        if on_validate and options.validate_every and not stopping:
            if is_last or step % options.validate_every == 0:
                with jax.set_mesh(mesh):
                    validation = on_validate(state)
                writer.write_scalars(step, validation)
                stretch = _Stretch(step)
        # Samples.
        if on_sample and options.sample_every and step % options.sample_every == 0:
            _write_samples(writer, step, on_sample(state))
            stretch = _Stretch(step)
        # Checkpoint. The loss above is that of the parameters before their update.
        if is_checkpoint:
            _check_parameters(state)
            checkpointer.save(state, data, config, metrics=validation)
        if stopping and not is_last:
            checkpointer.wait()
            raise Interrupted(f"Stopped after step {step} of {options.num_steps}.")
    checkpointer.wait()
    return state


class _Stretch:
    """The steps since the last line of metrics."""

    def __init__(self, step: int):
        self.step, self.start, self.waited = step, time.perf_counter(), 0.0

    def rates(self, step: int, num_steps: int, clips: int, flops: float | None) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        speed = (step - self.step) / seconds
        rates = {"steps_per_second": speed, "clips_per_second": speed * clips}
        if flops:
            rates["tflops_per_second"] = speed * flops / 1e12
        rates["input_wait"] = self.waited / seconds
        return {**rates, "eta_seconds": (num_steps - step) / speed}


class _Skips:
    """Counts the updates that were not made, and stops the run when they are too many in a row."""

    def __init__(self, step: int, most: int, checkpointer: Checkpointer):
        self._step, self._most, self._checkpointer = step, most, checkpointer
        self._in_a_row = self._total = 0

    def means(self, fetched: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Returns the mean of each metric over the updates that were made since the last call.

        Raises:
            FloatingPointError: too many in a row were not made.
        """
        made = []
        for metrics in fetched:
            self._step += 1
            if metrics.get("skipped", 0):
                self._in_a_row += 1
                self._total += 1
                _LOGGER.warning(
                    "The update of step %d is not made: the loss is %s, the norm of its gradient"
                    " %s.",
                    *(self._step, metrics["loss"], metrics["grad_norm"]),
                )
            else:
                made.append(metrics)
                self._in_a_row = 0
            if self._in_a_row >= self._most:
                newest = self._checkpointer.latest_step()
                good = "there is none yet" if newest is None else f"the last good one is {newest}"
                raise FloatingPointError(
                    f"The updates of steps {self._step - self._in_a_row + 1} to {self._step} could"
                    f" not be made, since loss or gradient is not finite: {_REMEDY} Of the"
                    f" checkpoints in {self._checkpointer.directory} {good}."
                )
        names = fetched[0].keys() - {"skipped"}
        means = {n: float(np.mean([m[n] for m in made])) for n in sorted(names)} if made else {}
        return {**means, "skipped": float(self._total)}


def _compiled(step_fn: StepFn, state: TrainState, batch: PyTree) -> tuple[StepFn, float]:
    """The step, compiled for its arguments, and its floating point operations; 0 if unknown."""
    if not hasattr(step_fn, "lower"):  # not a function of `jax.jit`
        return step_fn, 0.0
    compiled = step_fn.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    costs = compiled.cost_analysis() or {}
    return compiled, float(costs.get("flops", 0.0)) * jax.device_count()


def _should_stop(step: int, stop: Callable[[], bool]) -> bool:
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stop()


def _write_samples(writer: MetricWriter, step: int, samples: Mapping[str, Any]) -> None:
    images = {name: value for name, value in samples.items() if np.ndim(value) == 3}
    writer.write_images(step, images)
    writer.write_videos(step, {n: value for n, value in samples.items() if n not in images})


def _check_parameters(state: TrainState) -> None:
    """Passes when all parameters and their average are finite.

    Raises:
        FloatingPointError: one is not.
    """
    for name, tree in (("parameters", state.params), ("averaged parameters", state.ema)):
        if not _is_finite(tree):
            raise FloatingPointError(
                f"The {name} after step {int(state.step)} are not finite: {_REMEDY}"
            )


@jax.jit
def _is_finite(tree: PyTree) -> Array:
    return jnp.isfinite(optax.global_norm(tree))
