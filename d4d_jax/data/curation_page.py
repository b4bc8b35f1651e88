"""One HTML file that shows what curation kept and dropped, with pictures, rule by rule."""

import base64
import dataclasses
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d4d_jax import clips
from d4d_jax.data import curation, tables
from d4d_jax.data.curation import Thresholds, Verdict

#: What the rules ask, with the thresholds' values filled in.
_MEANINGS = {
    "label": "The asset is not among those that are labelled as animated.",
    "empty": "A frame shows less than {min_coverage:.2%} of object.",
    "still": "Both SSIM are above {ssim_high:g}.",
    "drastic": "An SSIM is below {ssim_low:g}.",
    "boundary": "More than {border_frames:.0%} of the frames touch the border"
    " (alpha above {border_alpha:g}).",
    "duplicate": "The hash differs from that of a kept clip in {duplicate_bits} bits or fewer.",
}

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
td, th { padding: .15rem .8rem; border-bottom: 1px solid #8886; }
td + td, th + th { text-align: right; }
ul { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }
li { width: 17rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; background: #fff; border-radius: .3rem; }
small { opacity: .75; }
"""


def write_page(
    path: str | os.PathLike,
    verdicts: Sequence[Verdict],
    source: str | os.PathLike,
    thresholds: Thresholds | None = None,
    *,
    examples: int = 40,
) -> None:
    """Writes the page; it needs no other file and no network.

    Args:
        path: of the HTML file.
        verdicts: of `curation.curate`.
        source: the folder of the clips.
        thresholds: that the verdicts are by; by default `Thresholds()`.
        examples: clips shown of a rule, and of those that are kept, evenly drawn by name.
    """
    limits = dataclasses.asdict(thresholds or Thresholds())
    rows = curation.count(verdicts)
    kept = [verdict for verdict in verdicts if verdict.kept]
    table = "".join(
        f"<tr><td><a href='#{rule}'>{rule}</a>" + "".join(f"<td>{number}" for number in numbers)
        for rule, *numbers in rows
    )
    sections = [
        _section(
            rule,
            _MEANINGS[rule].format(**limits),
            [verdict for verdict in verdicts if rule in verdict.rules],
            Path(source),
            examples,
        )
        for rule in curation.RULES
    ]
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Curation</title>"
        f"<style>{_STYLE}</style>"
        f"<h1>{len(kept)} of {len(verdicts)} clips are kept</h1>"
        "<p>Each picture shows a clip at 0, T/4 and T/2. A clip is listed under every rule that"
        " drops it.</p>"
        "<table><tr><th>rule<th>clips<th>by it alone<th>left after it and those before"
        f"{table}</table>{''.join(sections)}"
        f"{_section('kept', 'No rule drops these.', kept, Path(source), examples)}</html>\n"
    )
    tables.write_text(path, text)


def _section(
    name: str, meaning: str, verdicts: Sequence[Verdict], source: Path, examples: int
) -> str:
    count = min(examples, len(verdicts))
    shown = [verdicts[i * len(verdicts) // count] for i in range(count)]
    items = "".join(_item(verdict, source) for verdict in shown)
    heading = f"{name}: {len(verdicts)}"
    if len(shown) < len(verdicts):
        heading += f", {len(shown)} of them here"
    return f"<h2 id={name}>{heading}</h2><p>{meaning}</p><ul>{items}</ul>"


def _item(verdict: Verdict, source: Path) -> str:
    numbers = verdict.numbers
    facts = [
        f"SSIM {numbers['ssim_quarter']:.3f}, {numbers['ssim_half']:.3f}",
        f"coverage {min(numbers['coverage']):.1%}",
        f"border {max(numbers['border']):.2f}",
        *verdict.rules,
    ]
    if verdict.duplicate_of:
        facts.append(f"of {verdict.duplicate_of}")
    return (
        f"<li><img alt='' src='data:image/webp;base64,{_picture(source / verdict.clip)}'>"
        f"{html.escape(verdict.clip)}<br><small>{html.escape(' · '.join(facts))}</small>"
    )


def _picture(folder: Path, height: int = 80) -> str:
    """The clip at 0, T/4 and T/2 side by side on white, as WebP in base 64."""
    views = clips.read_views(folder)
    frames = views.get("front", views["dynamic"])
    chosen = clips.composite(frames[[0, len(frames) // 4, len(frames) // 2]], clips.WHITE)
    strip = np.concatenate(list(np.round(255 * chosen).astype(np.uint8)), axis=1)
    image = Image.fromarray(strip)
    image.thumbnail((3 * height * image.width // image.height, height))
    stream = io.BytesIO()
    image.save(stream, "webp", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
