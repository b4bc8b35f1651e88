"""The active splats on the host, checked: what every exchange format starts from."""

import dataclasses
import os

import numpy as np
from jaxtyping import Float

from gaussians import sh as spherical_harmonics
from gaussians.types import Splats

#: Turns our world (z up, front towards -y) into glTF's and OpenGL's (y up, front towards +z).
_Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


@dataclasses.dataclass(frozen=True)
class Cloud:
    """Raw parameters as in `Splats`, of the active splats only, with unit quaternions w x y z."""

    means: Float[np.ndarray, "n 3"]
    log_scales: Float[np.ndarray, "n 3"]
    quaternions: Float[np.ndarray, "n 4"]
    opacity_logits: Float[np.ndarray, "n"]
    sh: Float[np.ndarray, "n k 3"]

    @classmethod
    def of(cls, splats: Splats, path: str | os.PathLike) -> "Cloud":
        """The splats that a file would hold; `path` is that file, for the messages.

        Raises:
            ValueError: no splat is active, or an active one holds a number that is not finite, a
                scale beyond float32, or a quaternion of length 0.
        """
        active = np.asarray(splats.active)
        if not active.any():
            raise ValueError(f"There is no active splat to write to {os.fspath(path)}.")
        fields = {k: np.asarray(v, np.float32)[active] for k, v in splats.parameters.items()}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            fields["quaternions"] /= np.linalg.norm(fields["quaternions"], axis=-1, keepdims=True)
            checked = [*fields.values(), np.exp(fields["log_scales"])]
        count = len(fields["means"])
        finite = [np.isfinite(values).reshape(count, -1).all(axis=1) for values in checked]
        broken = np.flatnonzero(~np.logical_and.reduce(finite))
        if len(broken):
            raise ValueError(
                f"{len(broken)} of the {count} active splats hold numbers that are not finite (the"
                f" first is slot {np.flatnonzero(active)[broken[0]]}); deactivate them before"
                f" writing {os.fspath(path)}."
            )
        return cls(**fields)

    def y_up(self) -> "Cloud":
        """The same object with y up: (x, y, z) becomes (x, z, -y)."""
        w, x, y, z = self.quaternions.T
        turned = np.stack([w + x, x - w, y + z, z - y], axis=1) * np.float32(np.sqrt(0.5))
        return dataclasses.replace(
            self,
            means=self.means @ _Y_UP.T,
            quaternions=turned / np.linalg.norm(turned, axis=1, keepdims=True),
            sh=_rotated_harmonics(self.sh, _Y_UP),
        )


def _rotated_harmonics(
    coefficients: Float[np.ndarray, "n k 3"], rotation: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "n k 3"]:
    """Coefficients that give in the direction `rotation @ d` what the given ones give in `d`.

    The matrix between them (Wigner's D for real harmonics) solves a linear system over many
    directions; it is exact up to rounding, since a rotation keeps each degree to itself.
    """
    degree = spherical_harmonics.degree_of(coefficients.shape[1])
    directions = np.random.default_rng(0).standard_normal((256, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    before = np.asarray(spherical_harmonics.basis(directions @ rotation, degree), float)
    after = np.asarray(spherical_harmonics.basis(directions, degree), float)
    matrix = np.linalg.lstsq(after, before)[0].round(6)
    return np.einsum("ij,njc->nic", matrix, coefficients).astype(np.float32)
