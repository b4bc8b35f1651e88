"""One update as a pure function: gradient, optimizer, moving average."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, Key

from d4d_jax.train.state import TrainState
from d4d_jax.typing import PyTree

#: What training programs are compiled with on a CPU. In XLA's usual order, which has as many
#: operations ready at once as possible, a step of the UNet takes two fifths more memory and is
#: slower: a good part of its time goes into fetching fresh pages (benchmarks/networks.md).
CPU_COMPILER_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

Metrics: TypeAlias = Mapping[str, Float[Array, ""]]
LossFn: TypeAlias = Callable[[PyTree, PyTree, PyTree, Key[Array, ""]], tuple[Array, Metrics]]
StepFn: TypeAlias = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def ema_decay_at(step: Int[Array, ""], decay: float) -> Float[Array, ""]:
    """Returns the decay of update number `step` (0 first): min(decay, (1 + step) / (10 + step)).

    The ramp (as in TensorFlow's ExponentialMovingAverage) lets a short run forget its random
    start; it reaches 0.999 after 9000 updates.
    """
    count = step.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + count) / (10.0 + count))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
    accumulate: int = 1,
    rate: optax.Schedule | None = None,
    out_shardings: PyTree = None,
) -> StepFn:
    """Returns the compiled update `(state, batch) -> (state, metrics)`.

    An update whose loss or gradient is not finite is not made: the step is counted, and parameters,
    average and optimizer stay as they were.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`, with `loss` the scalar mean
            over the batch and `metrics` further scalars. Any network and any objective fit.
        optimizer: optax transformation; its state lives in `TrainState.opt_state`.
        ema_decay: final decay of the parameter average, in [0, 1); 0 makes it equal `params`.
        accumulate: parts that a batch is split into, one after the other, for batches too large
            for the memory. Each has every `accumulate`-th clip; their gradients are averaged.
        rate: learning rate by step, to be reported.
        out_shardings: where the arrays of the new state are to lie, see `sharding.shardings`.

    Returns:
        The update. It donates the state: use the one that it returns. Its metrics hold `loss`,
        `grad_norm` (before clipping), `skipped` (1 where the update was not made), `learning_rate`
        if `rate` is given, and what `loss_fn` reported.

    Raises:
        ValueError: the decay is outside [0, 1), or `accumulate` is below 1.
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1), but it is {ema_decay}.")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}.")

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        loss, extra, gradients = _gradient(loss_fn, accumulate, state, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay_at(state.step, ema_decay)
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        metrics = {"loss": loss, "grad_norm": norm, "skipped": 1.0 - finite, **extra}
        if rate is not None:
            metrics["learning_rate"] = jnp.asarray(rate(state.step), jnp.float32)
        new_state = TrainState(
            state.step + 1, params, ema, opt_state, state.key, frozen=state.frozen
        )
        return new_state, metrics

    places: dict[str, Any] = {}
    if out_shardings is not None:
        places["out_shardings"] = (out_shardings, None)
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(), **places)


def _gradient(
    loss_fn: LossFn, accumulate: int, state: TrainState, batch: PyTree, key: Key[Array, ""]
) -> tuple[Array, Metrics, PyTree]:
    """The loss, what it reports, and its gradient: means over the parts of the batch."""
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, extra), gradients = gradient_fn(state.params, state.frozen, batch, key)
        return loss, extra, gradients

    def split(leaf: Array) -> Array:
        # Every part has clips of every device, so that nothing needs to be moved.
        return jnp.swapaxes(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 0, 1)

    def add(total: PyTree, part: tuple[PyTree, Array]) -> tuple[PyTree, None]:
        some, number = part
        own = jax.random.fold_in(key, number)
        (loss, extra), gradients = gradient_fn(state.params, state.frozen, some, own)
        return jax.tree.map(jnp.add, total, (loss, extra, gradients)), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(
        gradient_fn, state.params, state.frozen, jax.tree.map(lambda x: x[0], parts), key
    )
    (loss, extra), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, (loss, extra, gradients), (parts, jnp.arange(accumulate)))
    return jax.tree.map(lambda x: x / accumulate, total)


def compiler_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a gradient on JAX's default device."""
    return CPU_COMPILER_OPTIONS if jax.default_backend() == "cpu" else {}
