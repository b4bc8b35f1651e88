"""One update as a pure function: gradient, optimizer, moving average."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

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
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, ema_decay: float = 0.999
) -> StepFn:
    """Returns the compiled update `(state, batch) -> (state, metrics)`.

    Args:
        loss_fn: `(params, frozen, batch, key) -> (loss, metrics)`, with `loss` the scalar mean
            over the batch and `metrics` further scalars. Any network and any objective fit.
        optimizer: optax transformation; its state lives in `TrainState.opt_state`.
        ema_decay: final decay of the parameter average, in [0, 1); 0 makes it equal `params`.

    Returns:
        The update. It donates the state: use the one that it returns. Its metrics hold `loss`,
        `grad_norm` (before clipping) and what `loss_fn` reported.

    Raises:
        ValueError: the decay is outside [0, 1).
    """
    if not 0.0 <= ema_decay < 1.0:
        raise ValueError(f"ema_decay must lie in [0, 1), but it is {ema_decay}.")

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, extra), gradients = gradient_fn(state.params, state.frozen, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay_at(state.step, ema_decay)
        ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state.ema, params)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(gradients), **extra}
        new_state = TrainState(
            state.step + 1, params, ema, opt_state, state.key, frozen=state.frozen
        )
        return new_state, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())


def compiler_options() -> dict[str, str]:
    """The `compiler_options` of `jax.jit` for a gradient on JAX's default device."""
    return CPU_COMPILER_OPTIONS if jax.default_backend() == "cpu" else {}
