"""What the pictures of rendered clips depend on."""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from d4d_jax.data import blender


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the pictures of a clip depend on: options of `blender.py`, which explains them.

    Attributes:
        resolution: pixels a side of the written frames.
        supersample: frames are rendered that many times larger a side, and averaged over squares
            with premultiplied colour.
        elevation: "DEGREES", or "LOW,HIGH" to draw it for each clip.
        transforms: path of a list of further views, or "".
        seed: of the draws.
    """

    resolution: int = 128
    supersample: int = 1
    samples: int = 8
    frames: int = 24
    views: str = "dynamic,static,front"
    passes: str = ""
    transforms: str = ""
    elevation: str = "0"
    azimuth: float = 0.0
    azimuth_augmentation: bool = False
    compat: bool = False
    normalise: str = "first"
    loop_threshold: float = 0.01
    open_loops: bool = False
    engine: str = "cycles"
    filter_width: float = 0.01
    denoise: bool = False
    seed: int = 0

    def __post_init__(self):
        """Raises ValueError for a value that cannot be."""
        for name in ("resolution", "supersample", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.frames < 2:
            raise ValueError(f"frames must be at least 2; got {self.frames}.")
        for name, parse in (
            ("views", blender.parse_views),
            ("passes", blender.parse_passes),
            ("elevation", blender.parse_elevation),
        ):
            try:
                parse(getattr(self, name))
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{name}: {error}.") from None
        if self.transforms:
            try:
                blender.plan.read_transforms(self.transforms)
            except blender.plan.RenderError as error:
                raise ValueError(str(error)) from None

    def options(self) -> list[str]:
        """The words that make `blender.py` render so."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["resolution"] *= values.pop("supersample")
        words = []
        for name, value in values.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not False and value != "":
                words.append(f"--{name}={value}")
        return words

    @property
    def digest(self) -> str:
        """Tells settings apart: 12 hexadecimal digits, of the list of further views as well."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        if self.transforms:
            text += Path(self.transforms).read_text(encoding="utf-8")
        return hashlib.sha256(text.encode()).hexdigest()[:12]
