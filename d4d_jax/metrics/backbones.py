"""The feature networks of LPIPS: VGG16, AlexNet and SqueezeNet 1.1, and shift-tolerant forms.

A network is a table of layers, cut into stages; LPIPS compares what the stages put out. The layers
are numbered through from 0 as in the `features` of torchvision's networks, so that the parameters
of layer 5 are "features.5.weight" and "features.5.bias". Convolution kernels are (h, w, in, out)
here. The shift-tolerant forms (Ghildyal & Liu 2022) replace every stride by a stride-1 layer and a
blurred subsampling.

Pooling is written with shifted slices: on a CPU several times faster, forward and backward, than
`lax.reduce_window` and depthwise convolutions.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from d4d_jax.typing import AnyArray

Weights = Mapping[str, AnyArray]


@dataclasses.dataclass(frozen=True)
class Layer(abc.ABC):
    """What the tables below consist of; by default without parameters, and keeping the size."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by their name in the layer, as torch has them."""
        return {}

    def size(self, n: int) -> int:
        """Rows that come out where `n` go in; not positive where the layer does not fit."""
        return n

    @abc.abstractmethod
    def __call__(
        self, weights: Weights, name: str, x: Float[Array, "n h w c"]
    ) -> Float[Array, "n height width channels"]:
        """The layer's output; `name` is the prefix of its parameters in `weights`."""


@dataclasses.dataclass(frozen=True)
class Conv(Layer):
    """Convolution with zero padding, and its bias."""

    inputs: int
    outputs: int
    width: int = 3
    stride: int = 1
    padding: int = 0

    def shapes(self):
        return {
            "weight": (self.outputs, self.inputs, self.width, self.width),
            "bias": (self.outputs,),
        }

    def size(self, n):
        return (n + 2 * self.padding - self.width) // self.stride + 1

    def __call__(self, weights, name, x):
        kernel = jnp.asarray(weights[f"{name}.weight"])
        y: Array
        if self.stride == 1 and self.inputs < self.width:
            y = _wide_convolve(x, kernel, self.padding)
        else:
            y = _convolve(x, kernel, self.stride, self.padding)
        return y + weights[f"{name}.bias"]


def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_convolve(x: Array, kernel: Array, padding: int) -> Array:
    """`_convolve` with stride 1, and a gradient for wide kernels on few channels.

    On a CPU the transposed convolution onto 3 channels is ten times slower than others of its
    number of operations. Here the columns of a window count as channels, and the gradient that
    arrives there is shifted back: six times faster.
    """
    return _convolve(x, kernel, 1, padding)


def _wide_forward(x, kernel, padding):
    return _wide_convolve(x, kernel, padding), (x, kernel)


def _wide_backward(padding, residuals, cotangent):
    x, kernel = residuals
    width = kernel.shape[1]

    def unfolded(x):
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        count = x.shape[2] - width + 1
        columns = [lax.slice_in_dim(x, i, i + count, axis=2) for i in range(width)]
        tall = kernel.reshape(width, 1, -1, kernel.shape[-1])
        return _convolve(jnp.concatenate(columns, axis=-1), tall, 1, 0)

    (to_x,) = jax.linear_transpose(unfolded, x)(cotangent)
    _, pull = jax.vjp(lambda kernel: _convolve(x, kernel, 1, padding), kernel)
    return to_x, *pull(cotangent)


_wide_convolve.defvjp(_wide_forward, _wide_backward)


@dataclasses.dataclass(frozen=True)
class Fire(Layer):
    """SqueezeNet's module: 1 x 1 to few channels, then 1 x 1 and 3 x 3 beside each other."""

    inputs: int
    squeezed: int
    expanded: int

    @property
    def outputs(self):
        return 2 * self.expanded

    @property
    def parts(self):
        return {
            "squeeze": Conv(self.inputs, self.squeezed, 1),
            "expand1x1": Conv(self.squeezed, self.expanded, 1),
            "expand3x3": Conv(self.squeezed, self.expanded, padding=1),
        }

    def shapes(self):
        return {
            f"{part}.{name}": shape
            for part, conv in self.parts.items()
            for name, shape in conv.shapes().items()
        }

    def __call__(self, weights, name, x):
        def apply(part, x):
            return jax.nn.relu(self.parts[part](weights, f"{name}.{part}", x))

        x = apply("squeeze", x)
        return jnp.concatenate([apply("expand1x1", x), apply("expand3x3", x)], axis=-1)


class Relu(Layer):
    def __call__(self, weights, name, x):
        return jax.nn.relu(x)


@dataclasses.dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum of windows; `partial` admits windows that reach over the end (torch's ceil_mode)."""

    width: int
    stride: int
    partial: bool = False

    def size(self, n):
        return (n - self.width + (self.stride - 1) * self.partial) // self.stride + 1

    def __call__(self, weights, name, x):
        for axis in (1, 2):
            count = self.size(x.shape[axis])
            missing = (count - 1) * self.stride + self.width - x.shape[axis]
            if missing > 0:
                pads = [(0, missing if i == axis else 0) for i in range(4)]
                x = jnp.pad(x, pads, constant_values=-jnp.inf)
            windows = (_every(x, axis, i, self.stride, count) for i in range(self.width))
            x = functools.reduce(jnp.maximum, windows)
        return x


class BlurPool(Layer):
    """Every second pixel of the image reflected by 2 pixels and smoothed with (1, 2, 1) / 4."""

    def size(self, n):
        return (n + 1) // 2 + 1 if n > 2 else 0

    def __call__(self, weights, name, x):
        x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
        for axis in (1, 2):
            count = (x.shape[axis] - 1) // 2
            left, middle, right = (_every(x, axis, i, 2, count) for i in range(3))
            x = 0.25 * (left + right) + 0.5 * middle
        return x


def _every(x: Array, axis: int, start: int, stride: int, count: int) -> Array:
    return lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)


Stages = tuple[tuple[Layer, ...], ...]


def _vgg16(pool: tuple[Layer, ...]) -> Stages:
    channels = (3, 64, 128, 256, 512, 512)
    stages = []
    for i, convolutions in enumerate((2, 2, 3, 3, 3)):
        stage = list(pool) if i else []
        for j in range(convolutions):
            inputs = channels[i + 1] if j else channels[i]
            stage += [Conv(inputs, channels[i + 1], padding=1), Relu()]
        stages.append(tuple(stage))
    return tuple(stages)


def _alexnet(first: tuple[Layer, ...], pool: tuple[Layer, ...]) -> Stages:
    return (
        first,
        (*pool, Conv(64, 192, 5, padding=2), Relu()),
        (*pool, Conv(192, 384, padding=1), Relu()),
        (Conv(384, 256, padding=1), Relu()),
        (Conv(256, 256, padding=1), Relu()),
    )


def _squeezenet() -> Stages:
    pool = MaxPool(3, 2, partial=True)
    return (
        (Conv(3, 64, stride=2), Relu()),
        (pool, Fire(64, 16, 64), Fire(128, 16, 64)),
        (pool, Fire(128, 32, 128), Fire(256, 32, 128)),
        (pool, Fire(256, 48, 192)),
        (Fire(384, 48, 192),),
        (Fire(384, 64, 256),),
        (Fire(512, 64, 256),),
    )


#: The stages of every backbone.
BACKBONES: dict[str, Stages] = {
    "vgg": _vgg16((MaxPool(2, 2),)),
    "alex": _alexnet((Conv(3, 64, 11, stride=4, padding=2), Relu()), (MaxPool(3, 2),)),
    "squeeze": _squeezenet(),
    "vgg_shift_tolerant": _vgg16((MaxPool(2, 1), BlurPool())),
    "alex_shift_tolerant": _alexnet(
        (Conv(3, 64, 11, padding=2), BlurPool(), Relu()), (MaxPool(3, 1), BlurPool())
    ),
}


def stages_of(backbone: str) -> Stages:
    """The layers of a backbone; ValueError for an unknown name."""
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown LPIPS backbone {backbone!r}; use one of {sorted(BACKBONES)}.")
    return BACKBONES[backbone]


def parameter_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as torch has them: kernels (out, in, h, w)."""
    return {
        f"{name}.{parameter}": shape
        for stage in _numbered(stages_of(backbone))
        for name, layer in stage
        for parameter, shape in layer.shapes().items()
    }


def stage_channels(backbone: str) -> tuple[int, ...]:
    """The number of features that every stage puts out."""
    return tuple(
        [layer.outputs for layer in stage if isinstance(layer, Conv | Fire)][-1]
        for stage in stages_of(backbone)
    )


@functools.cache
def smallest_size(backbone: str) -> int:
    """The least height and width of an image that leaves every stage at least one pixel."""
    layers = [*itertools.chain.from_iterable(stages_of(backbone))]

    def fits(n: int) -> bool:
        for layer in layers:
            n = layer.size(n)
            if n < 1:
                return False
        return True

    return next(n for n in itertools.count(1) if fits(n))


def stage_features(
    backbone: str, weights: Weights, images: Float[Array, "n h w 3"]
) -> Iterator[Float[Array, "n height width c"]]:
    """What every stage puts out, for images as the backbone was trained on them."""
    x = images
    for stage in _numbered(stages_of(backbone)):
        for name, layer in stage:
            x = layer(weights, name, x)
        yield x


def _numbered(stages: Stages) -> Iterator[list[tuple[str, Layer]]]:
    """The stages with the layers' names."""
    numbers = itertools.count()
    for stage in stages:
        yield [(f"features.{next(numbers)}", layer) for layer in stage]
