"""The published weights of LPIPS: files of torchvision, `lpips` and `stlpips_pytorch`.

Only their files are read; neither torch nor these packages are imported.
"""

import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from d4d_jax.metrics.backbones import parameter_shapes, stage_channels, stages_of
from d4d_jax.metrics.lpips import Lpips
from d4d_jax.metrics.state_dict import read_state_dict
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray

_HEAD = re.compile(r"lin(\d+)\.model\.\d+\.weight")
# The classifier behind the features, and constants of the packages.
_UNUSED = re.compile(r"classifier\..*|scaling_layer\..*|lins\..*|.*\.filt")


@register("perceptual", "lpips")
def load_lpips(
    backbone: str, weights: str | os.PathLike[str], heads: str | os.PathLike[str] | None = None
) -> Lpips:
    """LPIPS from torchvision's weights of a backbone and the heads of the PyPI package `lpips`.

    The files are what torchvision downloads (vgg16-397923af.pth, alexnet-owt-7be5be79.pth,
    squeezenet1_1-b8a52dc0.pth), or .npz and .safetensors files with the same names inside, or a
    saved state dict of a whole `lpips.LPIPS`.

    Args:
        backbone: "vgg", "alex" or "squeeze".
        weights: file of the backbone, with or without the heads.
        heads: file of the heads (weights/v0.1/vgg.pth and so on in the package). Without it, those
            in `weights`, or else those of the installed package.

    Raises:
        FileNotFoundError: there is no such file, or no heads anywhere.
        ValueError: unknown backbone, unreadable file, or missing, superfluous or misshapen arrays,
            all of them named.
    """
    stages_of(backbone)
    state = read_state_dict(weights)
    origin = str(weights)
    if heads is None and not any(_HEAD.fullmatch(name) for name in state):
        heads = _packaged(
            "lpips",
            f"weights/v0.1/{backbone}.pth",
            f"{weights} has no heads: pass heads=, or pip install --no-deps lpips, of which only"
            " the weight files are read.",
        )
    if heads is not None:
        state = {name: array for name, array in state.items() if not _HEAD.fullmatch(name)}
        state |= read_state_dict(heads)
        origin += f" with {heads}"
    return lpips_from_state_dict(backbone, state, origin)


@register("perceptual", "stlpips")
def load_stlpips(backbone: str = "alex", weights: str | os.PathLike[str] | None = None) -> Lpips:
    """Shift-tolerant LPIPS with the weights of the PyPI package `stlpips_pytorch` (BSD-2).

    Args:
        backbone: "alex" or "vgg".
        weights: file of the package; without it, that of the installed one.

    Raises:
        FileNotFoundError: there is no such file, or the package is not installed.
        ValueError: unknown backbone, or a file that does not fit it.
    """
    full = f"{backbone}_shift_tolerant"
    stages_of(full)
    if weights is None:
        weights = _packaged(
            "stlpips_pytorch",
            f"weights/vST0.0/{full}.pth",
            "The shift-tolerant LPIPS needs its weights: pip install 'd4d_jax[perceptual]', or pass"
            " weights= with the file.",
        )
    return lpips_from_state_dict(full, read_state_dict(weights), str(weights))


def lpips_from_state_dict(
    backbone: str, state: Mapping[str, AnyArray], origin: str = "The state dict"
) -> Lpips:
    """LPIPS from arrays with torch's names and shapes: kernels (out, in, h, w), heads (1, c, 1, 1).

    Args:
        backbone: as in `Lpips`.
        state: backbone as in torchvision ("features.0.weight") or as in the packages
            ("net.slice1.0.weight"), heads as in the packages ("lin0.model.1.weight").
        origin: what the error calls it.

    Raises:
        ValueError: unknown backbone, or missing, superfluous or misshapen arrays, all of them
            named.
    """
    found = {
        _HEAD.sub(r"heads.\1", re.sub(r"^net\.slice\d+\.", "features.", name)): array
        for name, array in state.items()
        if not _UNUSED.fullmatch(name)
    }
    expected = parameter_shapes(backbone)
    heads = {f"heads.{i}": (1, c, 1, 1) for i, c in enumerate(stage_channels(backbone))}
    _check({**expected, **heads}, found, f"{origin} does not fit the LPIPS backbone {backbone!r}")
    return Lpips(
        backbone,
        {name: _kernel(np.asarray(found[name], np.float32)) for name in expected},
        tuple(jnp.asarray(found[name], jnp.float32).reshape(-1) for name in heads),
    )


def _kernel(array: np.ndarray) -> AnyArray:
    """(out, in, h, w) -> (h, w, in, out); a bias stays."""
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)


def _check(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, AnyArray], complaint: str
) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"superfluous {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"{complaint}: {', '.join(problems)}.")


def _packaged(package: str, file: str, otherwise: str) -> pathlib.Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / file
        if path.is_file():
            return path
    raise FileNotFoundError(otherwise)
