"""Curation: which rendered clips are worth training on, by the rules of Diffusion4D, sec. 3.2.

Measuring a clip and judging it are apart: `measure` reads the frames once, and other thresholds
cost nothing. The rules, in the paper's order where it has them:

    label       the asset is not among those that are labelled as animated
    empty       a frame of the dynamic orbit shows next to nothing
    still       SSIM of the front view at 0 and T/4, and at 0 and T/2, are both above 0.95
    drastic     one of the two is below 0.4
    boundary    the object touches the border of a frame of the dynamic orbit
    duplicate   the perceptual hash is close to that of another clip that is kept
"""

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
from jaxtyping import Float

from d4d_jax import clips
from d4d_jax.data import bulk, pipeline, records, tables
from d4d_jax.metrics.ssim import ssim

_LOGGER = logging.getLogger(__name__)

RULES = ("label", "empty", "still", "drastic", "boundary", "duplicate")

#: Of `verdicts.tsv`.
COLUMNS = (
    *("clip", "kept", "rules", "duplicate_of", "ssim_quarter", "ssim_half"),
    *("least_coverage", "most_border", "border_frames", "asset", "action"),
)

#: Of `measure`; another number means that what was measured before does not hold any more.
_VERSION = 1

#: Rec. 709 luminance, as scikit-image's `rgb2gray`.
_GREY = np.array([0.2125, 0.7154, 0.0721], np.float32)

Numbers = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where the rules draw their lines; the first two are the paper's.

    Attributes:
        ssim_high: both SSIM above it: too little motion.
        ssim_low: one SSIM below it: distorted, or gone.
        min_coverage: share of the pixels that the object covers at least, in every frame.
        border_alpha: opacity above which a pixel of the outermost rows and columns is touched.
        border_frames: share of the frames that may touch the border.
        duplicate_bits: clips whose hashes of 252 bits differ in no more are the same; -1 lets
            duplicates pass.
    """

    ssim_high: float = 0.95
    ssim_low: float = 0.4
    min_coverage: float = 0.005
    border_alpha: float = 0.1
    border_frames: float = 0.0
    duplicate_bits: int = 8


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one clip.

    Attributes:
        clip: its name.
        rules: those that drop it; none for a clip that is kept.
        duplicate_of: the clip that is kept instead, for the rule "duplicate".
        numbers: of `measure`.
    """

    clip: str
    rules: tuple[str, ...]
    duplicate_of: str
    numbers: Numbers

    @property
    def kept(self) -> bool:
        """Whether no rule drops the clip."""
        return not self.rules


def measure(folder: str | os.PathLike) -> dict[str, Any]:
    """The numbers that the rules judge by, of one clip folder.

    Returns:
        `ssim_quarter`, `ssim_half`: of the front view at timestamps 0 and T/4, 0 and T/2, grey on
        white, as scikit-image's default (Wang et al. 2004 with a 7 x 7 window). Without front
        frames, the dynamic frame at T/4 (T/2) is compared with the static one of the same view.
        `coverage`, `border`: for every dynamic frame, the mean of alpha, and its maximum in the
        outermost rows and columns.
        `hash`: perceptual hash of four dynamic frames, hexadecimal.
        `asset`, `action`: of `clip.json`.

    Raises:
        FileNotFoundError, ValueError: as `records.read_folder`, or frames are missing.
    """
    record = records.read_folder(folder)
    if "dynamic" not in record or not {"front", "static"} & set(record):
        raise ValueError(f"{str(folder)!r} lacks dynamic frames, or both front and static ones.")
    grey = {view: _grey(record[view]) for view in records.VIEWS if view in record}
    count = len(grey["dynamic"])
    quarter, half = (
        float(ssim(*_pair(grey, i)[..., None], window="uniform")) for i in (count // 4, count // 2)
    )
    alpha = record["dynamic"][..., 3] / np.float32(255)
    rim = (alpha[:, 0], alpha[:, -1], alpha[:, :, 0], alpha[:, :, -1])
    border = np.max([edge.max(-1) for edge in rim], axis=0)
    hashes = [perceptual_hash(grey["dynamic"][i * count // 4]) for i in range(4)]
    return {
        "ssim_quarter": quarter,
        "ssim_half": half,
        "coverage": [round(float(x), 6) for x in alpha.mean((1, 2))],
        "border": [round(float(x), 6) for x in border],
        "hash": "".join(f"{value:016x}" for value in hashes),
        "asset": record["asset"],
        "action": record["action"],
    }


def perceptual_hash(image: Float[np.ndarray, "h w"]) -> int:
    """63 bits that images which look alike share: signs of low frequencies about their median.

    The frequencies are the lowest 8 x 8 of the cosine transform, without the mean of the image
    (pHash, Zauner 2010).
    """
    small = clips.resize(image[None, ..., None], 32, 32)[0, ..., 0]
    frequencies = np.asarray(scipy.fft.dctn(small, norm="ortho"))[:8, :8].ravel()[1:]
    bits = frequencies > np.median(frequencies)
    return int("".join("1" if bit else "0" for bit in bits), 2)


def judge(
    numbers: Mapping[str, Numbers],
    thresholds: Thresholds | None = None,
    *,
    animated: Collection[str] | None = None,
) -> list[Verdict]:
    """Judges clips by their numbers.

    Args:
        numbers: of `measure`, by the name of the clip.
        thresholds: by default `Thresholds()`.
        animated: names of the assets that are labelled as animated; None lets all pass.

    Returns:
        A verdict for each clip, in the order of their names.
    """
    limits = thresholds or Thresholds()
    rules = {name: _broken(numbers[name], limits, animated) for name in sorted(numbers)}
    passing = [name for name, broken in rules.items() if not broken]
    first = _duplicates({name: numbers[name]["hash"] for name in passing}, limits.duplicate_bits)
    return [
        Verdict(
            name, ("duplicate",) if name in first else broken, first.get(name, ""), numbers[name]
        )
        for name, broken in rules.items()
    ]


def count(verdicts: Sequence[Verdict]) -> list[tuple[str, int, int, int]]:
    """Per rule: how many clips break it, break it alone, and are left after it and all before."""
    rows, left = [], list(verdicts)
    for rule in RULES:
        breaking = [verdict for verdict in verdicts if rule in verdict.rules]
        alone = sum(verdict.rules == (rule,) for verdict in breaking)
        left = [verdict for verdict in left if rule not in verdict.rules]
        rows.append((rule, len(breaking), alone, len(left)))
    return rows


def curate(
    source: str | os.PathLike,
    out: str | os.PathLike,
    thresholds: Thresholds | None = None,
    *,
    animated: Collection[str] | None = None,
    workers: int = 1,
    beam: Sequence[str] | None = None,
) -> tuple[list[Verdict], list[tuple[str, str]]]:
    """Measures and judges the clips of a folder, and writes what it found.

    `verdicts.tsv` has the numbers and the rules of every clip, `counts.tsv` those of every rule,
    `kept.txt` the names of the clips that are kept, and `failures.tsv` the clips that cannot be
    read. What was measured before is not measured again, unless the clip has changed.

    Args:
        source: folder whose subfolders are clips.
        out: folder of these files; created.
        thresholds: by default `Thresholds()`.
        animated: as in `judge`.
        workers: processes, on this machine.
        beam: options of an Apache Beam pipeline, which then does the work (`bulk.run`).

    Returns:
        The verdicts, and the rows of `failures.tsv`.

    Raises:
        FileNotFoundError: there is no such folder, or no clip in it.
        RuntimeError: a worker process was killed.
    """
    out = Path(out)
    items = {
        f"{path.name} {_VERSION} {bulk.fingerprint(path)}": str(path)
        for path in pipeline.find_clips(source)
    }
    outcomes = bulk.run(measure, items, folder=out / ".records", workers=workers, beam=beam)
    numbers, failures = {}, []
    for path, outcome in zip(items.values(), outcomes, strict=True):
        if outcome.error is None:
            numbers[Path(path).name] = outcome.value
        else:
            failures.append((Path(path).name, outcome.error))
    verdicts = judge(numbers, thresholds, animated=animated)
    tables.write_table(out / "verdicts.tsv", COLUMNS, [_row(verdict) for verdict in verdicts])
    headings = ("rule", "clips", "clips_by_it_alone", "clips_left")
    tables.write_table(out / "counts.tsv", headings, count(verdicts))
    tables.write_table(out / "failures.tsv", ("clip", "reason"), failures)
    names = [verdict.clip for verdict in verdicts if verdict.kept]
    tables.write_text(out / "kept.txt", "".join(f"{name}\n" for name in names))
    limits = dataclasses.asdict(thresholds or Thresholds())
    tables.write_text(out / "thresholds.json", json.dumps(limits, indent=1) + "\n")
    _LOGGER.info("%d of %d clips are kept.", len(names), len(verdicts))
    return verdicts, failures


def _grey(rgba: np.ndarray) -> Float[np.ndarray, "t h w"]:
    return clips.composite(rgba.astype(np.float32) / 255, clips.WHITE) @ _GREY


def _pair(grey: Mapping[str, np.ndarray], index: int) -> Float[np.ndarray, "2 h w"]:
    """The object at a timestamp and at the first one, from one view."""
    if "front" in grey:
        return np.stack([grey["front"][0], grey["front"][index]])
    return np.stack([grey["static"][index], grey["dynamic"][index]])


def _broken(
    numbers: Numbers, limits: Thresholds, animated: Collection[str] | None
) -> tuple[str, ...]:
    """The rules that a clip breaks, but for "duplicate"."""
    scores = (numbers["ssim_quarter"], numbers["ssim_half"])
    broken = {
        "label": animated is not None and numbers["asset"] not in animated,
        "empty": min(numbers["coverage"]) < limits.min_coverage,
        "still": min(scores) > limits.ssim_high,
        "drastic": min(scores) < limits.ssim_low,
        "boundary": _touching(numbers, limits) > limits.border_frames,
    }
    return tuple(rule for rule in RULES if broken.get(rule))


def _touching(numbers: Numbers, limits: Thresholds) -> float:
    """The share of the frames that touch the border."""
    return float(np.mean(np.asarray(numbers["border"]) > limits.border_alpha))


def _duplicates(hashes: Mapping[str, str], bits: int) -> dict[str, str]:
    """For each clip that is close to an earlier one that is kept, the name of that one."""
    names = list(hashes)
    words = np.frombuffer(bytes.fromhex("".join(hashes.values())), ">u8").reshape(-1, 4)
    words = words.astype(np.uint64)
    kept, first = np.zeros(len(names), np.int64), {}
    count = 0
    for i, name in enumerate(names):
        distances = np.bitwise_count(words[kept[:count]] ^ words[i]).sum(-1)
        if count and distances.min() <= bits:
            first[name] = names[kept[distances.argmin()]]
        else:
            kept[count] = i
            count += 1
    return first


def _row(verdict: Verdict) -> tuple[str, ...]:
    numbers = verdict.numbers
    return (
        *(verdict.clip, "yes" if verdict.kept else "no", ",".join(verdict.rules)),
        verdict.duplicate_of,
        *(f"{numbers[name]:.6f}" for name in ("ssim_quarter", "ssim_half")),
        f"{min(numbers['coverage']):.6f}",
        f"{max(numbers['border']):.6f}",
        str(sum(alpha > 0 for alpha in numbers["border"])),
        numbers["asset"],
        numbers["action"],
    )
