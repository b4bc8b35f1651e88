"""The training loop, to be read from top to bottom."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from d4d_jax.train import sharding
from d4d_jax.train.checkpoint import Checkpointer, DataIterator
from d4d_jax.train.state import TrainState
from d4d_jax.train.step import Metrics, StepFn
from d4d_jax.typing import MetricWriter, PyTree

_REMEDY = "lower the learning rate or clip the gradient, and continue from the last checkpoint."


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

    Raises:
        ValueError: one of them is below 1 (`sample_every`, `validate_every`: below 0).
    """

    num_steps: int
    log_every: int = 50
    checkpoint_every: int = 500
    sample_every: int = 0
    validate_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 1), ("log_every", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("sample_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}.")


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
) -> TrainState:
    """Trains from `state.step` to `options.num_steps` and returns the final state.

    Args:
        state: where to start; its buffers are donated.
        step_fn: from `make_train_step`.
        data: endless iterator over batches (leading axis: clips).
        options: lengths and distances.
        mesh: devices; every batch is split over them.
        checkpointer: receives the state and the position of `data`.
        writer: receives the metrics, plus `steps_per_second` and `eta_seconds`.
        config: saved with every checkpoint.
        on_sample: returns images `(h w 3)` in [0, 1] to write, for example a contact sheet.
        on_validate: returns scalars to write, for example the loss on other clips.

    Raises:
        FloatingPointError: a metric (the gradient's norm is one), a parameter or an averaged
            parameter is not finite; the message names the step. Nothing that came after the last
            good checkpoint is saved then.
    """
    state = sharding.place_state(state, mesh)
    first = int(state.step)
    if on_validate and options.validate_every and first == 0:
        writer.write_scalars(0, on_validate(state))
    pending: list[Metrics] = []  # on the device; fetched once per line so steps overlap
    mark_time, mark_step = time.perf_counter(), first
    for step in range(first + 1, options.num_steps + 1):
        # Update.
        batch = sharding.place_batch(next(data), mesh)
        state, metrics = step_fn(state, batch)
        pending.append(metrics)
        is_last = step == options.num_steps
        is_checkpoint = is_last or step % options.checkpoint_every == 0
        # Metrics. Fetched, and so checked, before every checkpoint too.
        if is_checkpoint or step - first == 1 or step % options.log_every == 0:
            means = _mean_metrics(pending, last_step=step)
            speed = (step - mark_step) / (time.perf_counter() - mark_time)
            eta = (options.num_steps - step) / speed
            writer.write_scalars(step, {**means, "steps_per_second": speed, "eta_seconds": eta})
            writer.flush()
            pending = []
            mark_time, mark_step = time.perf_counter(), step
        # Validation.
        if on_validate and options.validate_every and (
            is_last or step % options.validate_every == 0
        ):
            writer.write_scalars(step, on_validate(state))
            mark_time, mark_step = time.perf_counter(), step
        # Samples.
        if on_sample and options.sample_every and step % options.sample_every == 0:
            writer.write_images(step, on_sample(state))
            mark_time, mark_step = time.perf_counter(), step
        # Checkpoint. The loss above is that of the parameters before their update.
        if is_checkpoint:
            _check_parameters(state)
            checkpointer.save(state, data, config)
    checkpointer.wait()
    return state


def _mean_metrics(pending: list[Metrics], last_step: int) -> dict[str, float]:
    """Returns the mean of each metric over consecutive steps that end at `last_step`.

    Raises:
        FloatingPointError: a metric is not finite; the first such step is named.
    """
    fetched = jax.device_get(pending)
    for offset, metrics in enumerate(fetched):
        for name, value in metrics.items():
            if not np.isfinite(value):
                step = last_step - len(fetched) + 1 + offset
                raise FloatingPointError(f"The {name} of step {step} is {float(value)}: {_REMEDY}")
    return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


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
