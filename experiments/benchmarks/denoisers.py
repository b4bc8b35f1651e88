"""Spatio-temporal UNets ready to be timed: ours, and diffusers' of the same shape in torch."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from d4d_jax import losses
from d4d_jax.guidance import ThreeDAware
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import expand
from d4d_jax.sampling import ddim
from d4d_jax.schedules import scaled_linear
from d4d_jax.train.state import TrainState, create_state
from d4d_jax.train.step import LossFn, compiler_options, make_train_step
from d4d_jax.typing import PyTree
from experiments.benchmarks import measure
from experiments.benchmarks.step_parts import Repeated

#: The network of (32, 64, 64, 64) channels that the CPU is timed on: 7,058,148 parameters.
REDUCED: dict[str, Any] = expand(
    {"variant": "small", "camera_embedding": False, "motion_embedding": False, "dropout": 0.0}
)

#: What can be timed: the network; the gradient of every parameter; an update of the parameters with
#: AdamW (ours keeps a moving average as well); a whole clip with the three branches of guidance.
PASSES = ("forward", "forward_backward", "step", "sample")

#: How tables call them.
NAMES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "step": "training step",
    "sample": "sample",
}

_TOKENS = 77  # of CLIP's text


class Shape(NamedTuple):
    """Of the latents of one clip: frames, and cells a side."""

    frames: int
    latents: int


class Candidate(NamedTuple):
    """A network and its inputs on the device, by what a call does (see `PASSES`).

    calls: They return when their work is done.
    compile_s: Seconds to trace and compile, in torch until the first return; empty: not compiled.
    peak_mb: MB that it needs, with what it is given; None: unknown.
    """

    calls: dict[str, Callable[[], Any]]
    compile_s: dict[str, float]
    peak_mb: dict[str, float | None]


class Example(NamedTuple):
    """Shapes or values of what a network is called with."""

    x_t: Any
    timestep: Any
    conditioning: Conditioning


def example(network: SpatioTemporalUNet, shape: Shape, batch: int = 1) -> Example:
    """Shapes of the inputs; what the network does not look at is pruned when it is compiled."""
    (t, n), channels = shape, network.in_channels

    def make() -> Example:
        def real(*sizes: int) -> jax.Array:
            return jnp.zeros((batch, *sizes))

        conditioning = Conditioning(
            image=real(n, n, channels),
            context=real(_TOKENS, max(network.context_dim, 1)),
            camera=real(t, 4, 4),
            motion=real(),
            image_embedding=real(max(network.context_dim, 1)),
            static=real(t, n, n, channels) if network.static_channels else None,
        )
        return Example(real(t, n, n, channels), jnp.zeros((batch,), jnp.int32), conditioning)

    return jax.eval_shape(make)


def abstract_params(network: SpatioTemporalUNet, shape: Shape) -> PyTree:
    """Shapes of the parameters."""
    init = functools.partial(jax.eval_shape, network.init, jax.random.key(0))
    return init(*example(network, shape))["params"]


def program(
    name: str, network: SpatioTemporalUNet, params: PyTree, given: Example, *, steps: int = 50
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """A pass as one program, jitted, and its arguments.

    Args:
        name: one of `PASSES`.
        network: what is called.
        params: its parameters, or their shapes.
        given: its inputs, or their shapes.
        steps: of a sample; each has the branches of 3D-aware guidance in one batch.
    """

    def forward(params: PyTree, *inputs: Any) -> jax.Array:
        return network.apply({"params": params}, *inputs)

    def loss(params: PyTree, cotangent: jax.Array, *inputs: Any) -> jax.Array:
        return jnp.sum(forward(params, *inputs) * cotangent)

    def sampled(params: PyTree, noise: jax.Array, conditioning: Conditioning) -> jax.Array:
        denoise = ThreeDAware()(functools.partial(forward, params))
        return ddim(denoise, scaled_linear(), noise, conditioning, num_steps=steps)

    if name == "forward":
        return jax.jit(forward), (params, *given)
    if name == "forward_backward":
        gradient = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options())
        return gradient, (params, given.x_t, *given)
    if name == "sample":
        return jax.jit(sampled), (params, given.x_t, given.conditioning)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-5))
    create = functools.partial(create_state, optimizer=optimizer, key=jax.random.key(0))
    abstract = isinstance(given.x_t, jax.ShapeDtypeStruct)
    # The step donates its state: it must not be the only one to hold the parameters.
    copied = params if abstract else jax.tree.map(jnp.copy, params)
    state = jax.eval_shape(create, copied) if abstract else create(copied)
    batch = {"latents": given.x_t, "conditioning": given.conditioning}
    return make_train_step(_loss(network), optimizer), (state, batch)


def _loss(network: SpatioTemporalUNet) -> LossFn:
    """The denoising loss."""
    schedule = scaled_linear()

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array) -> Any:
        x0 = batch["latents"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = jax.random.randint(time_key, x0.shape[:1], 0, schedule.num_steps)
        noise = jax.random.normal(noise_key, x0.shape)
        prediction = network.apply(
            {"params": params},
            schedule.add_noise(x0, noise, t),
            t,
            batch["conditioning"],
            train=True,
            rngs={"dropout": dropout_key},
        )
        return losses.denoising_loss(schedule, prediction, x0, noise, t).mean(), {}

    return loss


def ours(
    fields: Mapping[str, Any],
    shape: Shape,
    names: Sequence[str],
    *,
    half: bool = False,
    steps: int = 50,
) -> Candidate:
    """Our network with random parameters.

    Args:
        fields: of the network.
        shape: of the latents.
        names: of the passes.
        half: whether to compute in bfloat16, with the kernels in it where nothing is trained.
        steps: see `program`.
    """
    network = SpatioTemporalUNet(**fields, dtype=jnp.bfloat16 if half else jnp.float32)
    inputs = _values(example(network, shape))
    params = _weights(abstract_params(network, shape))
    kernels = params
    if half:
        kernels = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, params)
    candidate = Candidate({}, {}, {})
    for name in names:
        given = params if name == "step" else kernels
        function, arguments = program(name, network, given, inputs, steps=steps)
        start = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        candidate.compile_s[name] = time.perf_counter() - start
        candidate.peak_mb[name] = measure.program_mb(compiled)
        call: Callable[[], Any] = functools.partial(_finished, compiled, *arguments)
        if name == "step":
            state, batch = arguments
            call = Repeated(functools.partial(_swapped, compiled, batch), state)
        call()
        candidate.calls[name] = call
    return candidate


def _values(shapes: Example) -> Example:
    """Noise in the places of real numbers, a timestep half-way in the place of an integer."""
    rng = np.random.default_rng(0)

    def value(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.full(x.shape, 500, x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(value, shapes)


def _weights(shapes: PyTree) -> PyTree:
    """Random parameters; those of `network.init` take minutes to compile."""
    rng = np.random.default_rng(0)

    def value(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(x.shape, np.float32)
        return jnp.asarray(values / math.sqrt(math.prod(x.shape[:-1]) if x.ndim > 1 else 10))

    return jax.tree.map(value, shapes)


def _finished(function: Callable[..., Any], *arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def _swapped(function: Callable[..., Any], batch: PyTree, state: TrainState) -> Any:
    return function(state, batch)


def diffusers(
    fields: Mapping[str, Any],
    shape: Shape,
    names: Sequence[str],
    *,
    half: bool = False,
    steps: int = 50,
    compiled: bool = False,
    device: str = "cpu",
) -> Candidate:
    """diffusers' UNet3DConditionModel of the same shape, with its own initial values.

    A sample is `steps` calls on a batch of three, without schedule and guidance.

    Args:
        fields: of ours; it has no cameras, no motion and no reference image.
        shape: of the latents.
        names: of the passes.
        half: whether to compute in bfloat16; the weights are in it too, unless a step is among the
            passes: that computes under autocast.
        steps: of a sample.
        compiled: whether through torch.compile.
        device: of torch.

    Raises:
        ImportError: torch or diffusers is not installed.
        Exception: whatever torch.compile meets.
    """
    import torch

    torch.set_num_threads(measure.threads())
    torch.manual_seed(0)
    kind = torch.bfloat16 if half else torch.float32
    model = torch_model(fields).to(device)
    if half and "step" not in names:
        model.to(kind)
    weights = list(model.parameters())
    run = torch.compile(model, dynamic=False) if compiled else model
    (t, n), channels = shape, model.config["in_channels"]

    def inputs(batch: int) -> tuple[Any, ...]:
        x = torch.randn(batch, channels, t, n, n, device=device, dtype=kind)
        width = model.config["cross_attention_dim"]
        context = torch.randn(batch, _TOKENS, width, device=device, dtype=kind)
        return x, torch.full((batch,), 500, device=device), context

    def predict(given: tuple[Any, ...]) -> Any:
        return run(*given, return_dict=False)[0]

    one, three = inputs(1), inputs(3)
    optimizer = torch.optim.AdamW(weights, lr=3e-5, fused=True) if "step" in names else None

    def forward() -> Any:
        with torch.no_grad():
            return predict(one)

    def forward_backward() -> Any:
        value = (predict(one) * one[0]).sum()
        return torch.autograd.grad(value, weights)

    def sample() -> Any:
        with torch.no_grad():
            return [predict(three) for _ in range(steps)][-1]

    def step() -> None:
        assert optimizer is not None
        optimizer.zero_grad()
        with torch.autocast(device, kind, enabled=half):
            prediction = predict(one)
        torch.nn.functional.mse_loss(prediction.float(), one[0].float()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    calls = {f.__name__: f for f in (forward, forward_backward, step, sample)}
    candidate = Candidate({}, {}, {})
    for name in names:
        call = calls[name] if device == "cpu" else _synchronized(calls[name])
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        if compiled:
            candidate.compile_s[name] = time.perf_counter() - start
        peak = None if device == "cpu" else torch.cuda.max_memory_allocated() / 1e6
        candidate.peak_mb[name] = peak
        candidate.calls[name] = call
    return candidate


def _synchronized(call: Callable[[], Any]) -> Callable[[], None]:
    import torch

    def synchronized() -> None:
        call()
        torch.cuda.synchronize()

    return synchronized


def torch_model(fields: Mapping[str, Any]) -> Any:
    """diffusers' network for the fields of ours, with its own initial values."""
    from diffusers import UNet3DConditionModel

    network = SpatioTemporalUNet(**fields)
    levels = range(len(network.multipliers))
    attends = [level in network.attention_levels for level in levels]
    return UNet3DConditionModel(
        in_channels=network.in_channels,
        out_channels=network.out_channels,
        block_out_channels=tuple(network.width * m for m in network.multipliers),
        down_block_types=tuple("CrossAttnDownBlock3D" if a else "DownBlock3D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock3D" if a else "UpBlock3D" for a in attends[::-1]),
        layers_per_block=network.blocks,
        cross_attention_dim=network.context_dim,
        attention_head_dim=network.head_dim,
        norm_num_groups=network.groups,
    ).eval()
