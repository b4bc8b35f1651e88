"""A moving asset as sampled numbers: what the page of `gaussians.viewer` plays, and its encoding.

A `Track` holds the visible splats at a few timestamps and is linear in between. `encode` quantises
it and packs it into bytes that a browser can inflate by itself; `decode` is the inverse.

| attribute | bits | range | largest error |
|---|---|---|---|
| position | 16 | its bounding box over all timestamps, per axis | 1/131070 of the side |
| quaternion | 12 | [-1, 1], four numbers | 1/4095, less than 0.06 degrees of rotation |
| log scale | 10 | from the smallest to the largest, per axis | 1/2046 of the range |
| opacity | 10 | [0, 1] | 1/2046 |
| colour | 12 | from the smallest to the largest, per channel | 1/8190 of the range |
| harmonics | 8 | from the smallest to the largest, per coefficient | 1/510 of the range |

An attribute that does not change is stored once. Otherwise each number is stored as its change
since the timestamp before (modulo 2^16, zigzag), all low bytes before all high bytes, and the whole
is deflated: 12 000 moving splats at 24 timestamps take about 2.5 MB.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gaussians import sh as spherical_harmonics
from gaussians.asset import Asset
from gaussians.rasterize.screen import ALPHA_MIN
from gaussians.types import Splats


class _Code(NamedTuple):
    """How many bits a number of an attribute takes, and its range where that is fixed."""

    bits: int
    limits: tuple[float, float] | None = None


_CODES = {
    "means": _Code(16),
    "quaternions": _Code(12, (-1.0, 1.0)),
    "log_scales": _Code(10),
    "opacities": _Code(10, (0.0, 1.0)),
    "colours": _Code(12),
    "harmonics": _Code(8),
}


@dataclasses.dataclass(frozen=True)
class Track:
    """The visible splats of an asset at some timestamps.

    An attribute that never changes has a leading axis of length 1 instead of t.

    Attributes:
        timestamps: increasing, in [0, 1].
        means: world positions.
        quaternions: unit, w x y z; between neighbouring timestamps the sign that is nearer.
        log_scales: natural logarithms of the standard deviations.
        opacities: peak opacity in [0, 1] (no logit).
        colours: RGB of the harmonics' constant term; outside [0, 1] at times.
        harmonics: coefficients of degree 1 and up, k - 1 of them (0, 3, 8 or 15).
    """

    timestamps: Float[np.ndarray, "t"]
    means: Float[np.ndarray, "_ n 3"]
    quaternions: Float[np.ndarray, "_ n 4"]
    log_scales: Float[np.ndarray, "_ n 3"]
    opacities: Float[np.ndarray, "_ n"]
    colours: Float[np.ndarray, "_ n 3"]
    harmonics: Float[np.ndarray, "_ n k 3"]

    def __len__(self) -> int:
        """The number of splats."""
        return self.means.shape[1]

    @property
    def moves(self) -> bool:
        """Whether anything changes over time."""
        return any(len(getattr(self, name)) > 1 for name in _CODES)

    def extent(self) -> tuple[Float[np.ndarray, "3"], float]:
        """Centre and radius of a ball that holds the object at all timestamps.

        Stray splats are left out: the box behind the ball goes from the 1st to the 99th percentile
        of the positions, each counted by its opacity.
        """
        frames = max(len(self.means), len(self.opacities))
        positions = np.broadcast_to(self.means, (frames, len(self), 3)).reshape(-1, 3)
        weights = np.broadcast_to(self.opacities, (frames, len(self))).ravel().astype(float)
        corners = []
        for axis in positions.T:
            order = np.argsort(axis)
            shares = np.cumsum(weights[order]) / weights.sum()
            corners.append(axis[order][np.searchsorted(shares, (0.01, 0.99))])
        low, high = np.stack(corners, axis=1)
        return (low + high) / 2, float(np.linalg.norm(high - low) / 2)

    def at(self, t: float) -> Splats:
        """The splats that the page shows at a timestamp: linear between the neighbouring samples.

        A splat that appears or vanishes between them does so at once, half-way: where bodies take
        turns, only one is seen. Before the first and after the last sample all stand still.
        """
        place = np.interp(t, self.timestamps, np.arange(len(self.timestamps)))
        before = min(int(place), max(len(self.timestamps) - 2, 0))
        weight = np.float32(place - before)

        def blend(values: np.ndarray) -> np.ndarray:
            if len(values) == 1:
                return values[0]
            return values[before] + weight * (values[before + 1] - values[before])

        opacities = blend(self.opacities)
        if len(self.opacities) > 1:
            samples = self.opacities[before : before + 2]
            nearer = samples[int(weight >= 0.5)]
            opacities = np.where(samples.min(axis=0) < ALPHA_MIN, nearer, opacities)
        opacities = np.clip(opacities, 1e-6, 1 - 1e-6)
        constant = np.asarray(spherical_harmonics.from_rgb(blend(self.colours)))
        return Splats(
            means=jnp.asarray(blend(self.means)),
            log_scales=jnp.asarray(blend(self.log_scales)),
            quaternions=jnp.asarray(blend(self.quaternions)),
            opacity_logits=jnp.asarray(np.log(opacities) - np.log1p(-opacities)),
            sh=jnp.concatenate([constant[:, None], blend(self.harmonics)], axis=1),
            active=jnp.ones(len(self), bool),
        )


def sample(asset: Asset, timestamps: Sequence[float] | Float[np.ndarray, "t"]) -> Track:
    """The splats of an asset at some timestamps, without those that are never visible.

    Left out are inactive slots and splats whose opacity stays below 1/255 at every timestamp.

    Raises:
        ValueError: the timestamps are not increasing numbers in [0, 1], no splat is ever visible,
            or an active splat holds a number that is not finite.
    """
    instants = np.asarray(timestamps, np.float32).reshape(-1)
    inside = np.isfinite(instants).all() and ((instants >= 0) & (instants <= 1)).all()
    if not len(instants) or not inside or (np.diff(instants) <= 0).any():
        raise ValueError(f"Timestamps must be increasing numbers in [0, 1]; got {timestamps}.")
    active = np.asarray(asset.splats.active)
    poses = [asset.at(float(t)).parameters for t in instants]
    values = {
        name: _once(np.stack([np.asarray(pose[name], np.float32)[active] for pose in poses]))
        for name in poses[0]
    }
    finite = np.ones(int(active.sum()), bool)
    for value in values.values():
        finite &= np.isfinite(value).all(axis=(0, *range(2, value.ndim)))
    if not finite.all():
        raise ValueError(
            f"{np.sum(~finite)} of the {len(finite)} active splats hold numbers that are not finite"
            f" (the first is slot {np.flatnonzero(active)[np.argmin(finite)]}); deactivate them"
            " first."
        )
    with np.errstate(over="ignore"):  # exp(-logit) = inf is an opacity of 0
        opacities = 1 / (1 + np.exp(-values["opacity_logits"]))
    seen = opacities.max(axis=0) >= ALPHA_MIN
    if not seen.any():
        raise ValueError(
            f"None of the {len(seen)} active splats is ever visible: opacities stay below 1/255."
        )
    harmonics = values["sh"][:, seen]
    return Track(
        timestamps=instants,
        means=values["means"][:, seen],
        quaternions=_continuous(values["quaternions"][:, seen]),
        log_scales=values["log_scales"][:, seen],
        opacities=opacities[:, seen],
        colours=_once(0.5 + spherical_harmonics.C0 * harmonics[:, :, 0]),
        harmonics=_once(harmonics[:, :, 1:]),
    )


def encode(track: Track) -> tuple[dict[str, Any], bytes]:
    """Quantises and packs a track.

    Returns:
        What `decode` needs to know, as JSON values, and the deflated numbers (raw DEFLATE).
    """
    attributes, planes = [], []
    for name, code in _CODES.items():
        values = getattr(track, name)
        if not values.size:  # no harmonics
            continue
        flat = values.reshape(*values.shape[:2], -1)
        low, high = code.limits or (flat.min(axis=(0, 1)), flat.max(axis=(0, 1)))
        low, high = (np.broadcast_to(limit, flat.shape[-1:]).astype(float) for limit in (low, high))
        top = 2**code.bits - 1
        step = np.where(high > low, high - low, 1.0) / top
        numbers = np.clip(np.rint((flat - low) / step), 0, top).astype(np.int32)
        numbers = numbers.transpose(2, 0, 1)
        planes += _pack(numbers)
        attributes.append(
            {
                "name": name,
                "shape": list(values.shape),
                "low": low.tolist(),
                "step": step.tolist(),
            }
        )
    header = {"timestamps": track.timestamps.tolist(), "attributes": attributes}
    return header, deflate(b"".join(planes))


def decode(header: Mapping[str, Any], payload: bytes) -> Track:
    """The inverse of `encode`, up to the quantisation."""
    content = np.frombuffer(zlib.decompress(payload, -zlib.MAX_WBITS), np.uint8)
    values, start = {}, 0
    for attribute in header["attributes"]:
        shape = attribute["shape"]
        frames, splats = shape[:2]
        components = len(attribute["low"])
        size = components * frames * splats
        low, high = content[start : start + 2 * size].astype(np.int32).reshape(2, -1)
        start += 2 * size
        zigzag = low | high << 8
        changes = (zigzag >> 1 ^ -(zigzag & 1)).reshape(components, frames, splats)
        numbers = (np.cumsum(changes, axis=1) & 0xFFFF).transpose(1, 2, 0)
        flat = np.asarray(attribute["low"]) + numbers * np.asarray(attribute["step"])
        values[attribute["name"]] = flat.reshape(shape).astype(np.float32)
    values.setdefault("harmonics", np.zeros((1, values["means"].shape[1], 0, 3), np.float32))
    return Track(timestamps=np.asarray(header["timestamps"], np.float32), **values)


def deflate(content: bytes) -> bytes:
    """Raw DEFLATE, which browsers undo with `new DecompressionStream("deflate-raw")`."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(content) + packer.flush()


def _pack(numbers: np.ndarray) -> list[bytes]:
    """Changes along axis 1, modulo 2^16, signs in the lowest bit; low bytes, then high bytes."""
    changes = np.diff(numbers, axis=1, prepend=0).astype(np.int16)
    zigzag = (changes << 1 ^ changes >> 15).astype(np.uint16)
    return [(zigzag & 255).astype(np.uint8).tobytes(), (zigzag >> 8).astype(np.uint8).tobytes()]


def _once(values: np.ndarray) -> np.ndarray:
    """One sample where all samples are the same."""
    return values[:1] if (values == values[:1]).all() else values


def _continuous(quaternions: np.ndarray) -> np.ndarray:
    """Unit quaternions whose sign does not jump from one sample to the next; zero is identity."""
    norms = np.linalg.norm(quaternions, axis=-1, keepdims=True)
    identity = np.array([1, 0, 0, 0], np.float32)
    unit = np.where(norms > 0, quaternions, identity) / np.where(norms > 0, norms, 1)
    turns = np.sum(unit[1:] * unit[:-1], axis=-1) < 0
    signs = np.where(np.cumsum(turns, axis=0) % 2 == 1, -1, 1).astype(np.float32)
    unit[1:] *= signs[..., None]
    return unit
