"""A page that plays a moving asset in any browser: one file, nothing loaded from elsewhere.

    write_viewer("viewer.html", asset, title="Fox")

The page draws with Spark (a Gaussian splatting renderer on three.js) what `Asset.render` draws:
splats sorted by depth, a blur of 0.3 square pixels, colours in sRGB as they were fitted, harmonics
of any degree. It has a time slider, play and pause, an orbit camera and four backgrounds. What it
needs is WebGL 2, DecompressionStream and WebAssembly: browsers since about 2023. Its content
security policy forbids it every connection.

The view can be set in the address, angles in degrees as in `d4d_jax.cameras.orbit`:

    viewer.html#t=0.5&azimuth=30&elevation=10&distance=2&fov=40&target=0,0,0&background=black&play=0

`fov` is across the shorter side of the window, `background` one of white, black, grey and checker,
and `ui=0` hides the controls, for pages that embed this one. Scripts find the same in `window.d4d`:

    await d4d.ready                              // loaded and drawn once
    d4d.time = 0.5; d4d.play(); d4d.pause()
    d4d.view({azimuth: 30, distance: 2})         // any of the keys above
    await d4d.snapshot({t, world_to_camera, intrinsics, width, height, background})

`snapshot` resolves to a PNG as a data URL. Its camera is a `Camera` as nested lists: OpenCV axes,
intrinsics in pixels.
"""

import base64
import html
import json
import os
import re
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from gaussians.asset import Asset
from gaussians.io import replace_file
from gaussians.viewer.track import Track, decode, deflate, encode, sample

__all__ = ["Track", "decode", "encode", "read_viewer", "sample", "write_viewer"]

_FORMAT = "d4d_jax viewer 1"
#: Samples tried in turn when no timestamps are given, until the page is small enough.
_SAMPLES = (24, 16, 12, 8)


def write_viewer(
    path: str | os.PathLike,
    asset: Asset,
    *,
    timestamps: Sequence[float] | Float[np.ndarray, "t"] | None = None,
    title: str = "Asset",
    seconds: float = 3.0,
    max_bytes: int = 15_000_000,
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        asset: to show, on its own background at first.
        timestamps: at which the motion is sampled; the page is linear in between. By default 24,
            both ends included, or where the page would be too large 16, 12 or 8.
        title: of the page, plain text.
        seconds: that the motion from t = 0 to t = 1 takes when played.
        max_bytes: the largest page to write. 1.4 MB are the program; 12 000 splats at 24 timestamps
            add about 3.5 MB (8.4 MB if they moved without any regularity), so that 15 MB hold
            about 45 000, or about 100 000 at 8 timestamps.

    Raises:
        ValueError: the page would be larger than that, `seconds` is not above 0, or as in `sample`.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"The motion must take some seconds to play; got {seconds}.")
    facts = {"title": title, "seconds": seconds, "background": _hex(asset.background)}
    choices = [np.linspace(0, 1, count) for count in _SAMPLES]
    page, instants = b"", choices[0]
    for instants in choices if timestamps is None else [np.asarray(timestamps)]:
        page = _page(sample(asset, instants), facts)
        if len(page) <= max_bytes:
            break
    else:
        raise ValueError(
            f"With {len(instants)} timestamps the page would take {len(page)} bytes, more than"
            f" {max_bytes}; pass fewer timestamps, deactivate splats, or raise max_bytes."
        )
    replace_file(path, lambda file: file.write(page))


def read_viewer(path: str | os.PathLike) -> Track:
    """The track that a page plays, as the page sees it: quantised.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a page of `write_viewer`, or it is damaged.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    header, payload = (_element(text, name) for name in ("header", "payload"))
    try:
        facts = json.loads(header)
        if facts["format"] != _FORMAT:
            raise ValueError(f"its format is {facts['format']!r}, not {_FORMAT!r}")
        return decode(facts, base64.b64decode(payload, validate=True))
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"{os.fspath(path)} is not a complete viewer page: {error}.") from error


def _page(track: Track, facts: dict[str, Any]) -> bytes:
    description, payload = encode(track)
    centre, radius = track.extent()
    facts = {"format": _FORMAT, **facts, "centre": centre.tolist(), "radius": radius}
    header = json.dumps(facts | description)
    library = deflate(_text("vendor/vendor.js").encode())
    parts = {
        "title": html.escape(facts["title"]),
        "licences": html.escape(_text("vendor/LICENCES.txt")),
        "style": _text("style.css"),
        "header": header.replace("<", "\\u003c"),  # no string may end the script element
        "payload": base64.b64encode(payload).decode(),
        "vendor": base64.b64encode(library).decode(),
        "app": "'use strict';\n\n" + _text("splats.js") + "\n" + _text("app.js"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _text("page.html"))
    return page.encode()


def _hex(colour: Sequence[float]) -> str:
    """#rrggbb of a colour in [0, 1]."""
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in colour)


def _text(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _element(text: str, name: str) -> str:
    """The content of the script element with this id."""
    found = re.search(rf'<script [^>]*id="{name}">(.*?)</script>', text, re.DOTALL)
    return found[1] if found else ""
