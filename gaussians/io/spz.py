"""SPZ, the compressed splat file of Niantic's viewers: about 16 bytes a splat without harmonics."""

import importlib
import os
from types import ModuleType

import numpy as np

from gaussians.io.cloud import Cloud
from gaussians.io.files import replace_file
from gaussians.types import Splats


def write_spz(path: str | os.PathLike, splats: Splats, *, fractional_bits: int = 12) -> None:
    """Writes the active splats as SPZ, version 3, through the library `gsply`.

    The axes are turned as the format asks: y is up, and our front faces +z. Numbers are rounded:
    positions to multiples of 2^-fractional_bits units, log scales of 1/16 within [-10, 5.9],
    opacities of 1/255, colours of degree 0 of 1/136 within [-0.44, 1.44], higher coefficients of
    1/128 within [-1, 1], components of quaternions of 1/723. What lies outside is clipped.

    Args:
        path: the file.
        splats: any degree of harmonics.
        fractional_bits: of the 24-bit positions, which reach 2^(23 - fractional_bits) units.

    Raises:
        ValueError: `gsply` is not installed, no splat is active, an active one is not finite, or
            one lies beyond the reach.
    """
    gsply = library()
    cloud = Cloud.of(splats, path).y_up()
    farthest, reach = np.abs(cloud.means).max(), 2.0 ** (23 - fractional_bits)
    if farthest > reach - 2.0**-fractional_bits:
        raise ValueError(
            f"A splat at coordinate {farthest:.6g} is beyond the {reach:.6g} units that"
            f" {os.fspath(path)} holds with {fractional_bits} fractional bits; use fewer."
        )
    data = gsply.GSData.from_arrays(
        means=cloud.means,
        scales=cloud.log_scales,
        quats=cloud.quaternions,
        opacities=cloud.opacity_logits,
        sh0=cloud.sh[:, 0],
        shN=cloud.sh[:, 1:] if cloud.sh.shape[1] > 1 else None,
        format="ply",
    )
    replace_file(
        path,
        lambda file: gsply.write_spz(file.name, data, version=3, fractional_bits=fractional_bits),
    )


def library() -> ModuleType:
    """The package `gsply`.

    Raises:
        ValueError: it is not installed, or too old to write SPZ.
    """
    try:
        gsply = importlib.import_module("gsply")
    except ImportError:
        gsply = None
    if gsply is None or not hasattr(gsply, "write_spz"):
        raise ValueError(
            "SPZ files need the package gsply, 0.4.6 or later: pip install 'd4d_jax[formats]'."
        )
    return gsply
