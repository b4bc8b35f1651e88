"""Scores the orbital videos of a model on clips that it was not trained on (paper, section 4.2).

    python -m experiments.evaluate_videos --checkpoint=RUN --data=DATASET --workdir=EVAL

asks for the orbit of every clip's first frame at every motion magnitude of `--motions` ("own" is
that of the clip) with every weight of `--w2`, and writes into EVAL: `evaluation.md`, a table of
means, `evaluation.json`, with every prompt, `evaluation.png`, measured over asked motion, and
`sheet.png`, the clips above what was made of them.

Against the clip: PSNR, SSIM, LPIPS (`--perceptual`), and CLIP-F and CLIP-O (`--clip_weights`), the
cosines of CLIP's embeddings of the front view (the first frame) and of all frames. FVD
(`--i3d_weights`) is one figure for all clips of a motion and a weight. `motion` is the
magnitude of the made clip (Eq. 1, x 100): its dynamic orbit against its own static one. Scores
whose weights are not given are listed as absent.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from d4d_jax import conversion, media, metrics
from d4d_jax.clips import OrbitClip
from d4d_jax.data import records
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.models import clip as clip_models
from d4d_jax.motion import motion_magnitude
from d4d_jax.pipeline import OrbitPipeline
from experiments import build, cli, inputs, sample
from experiments.benchmarks.tables import markdown
from experiments.reconstruct import load_perceptual

#: Scores by name; a function of made and true frames (t, h, w, 3) in [0, 1].
Scores = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]

#: Of videos (b, t, h, w, 3) in [0, 1], for FVD; None without weights.
Features = Callable[[np.ndarray], jax.Array] | None

#: Of the table.
_SCORES = ("psnr", "ssim", "lpips", "clip_f", "clip_o", "fvd")
_SHOWN = 6  # prompts of the sheet


def main() -> None:
    """Evaluates the model of the command line."""
    options = flags.FLAGS
    pipeline = build.load_pipeline(options.checkpoint)
    clips = read_clips(options.data, options.splits, pipeline.size)[: options.count]
    motions = [None if word == "own" else _number(word, "--motions") for word in options.motions]
    weights = [_number(word, "--w2") for word in options.w2] if options.w2 else [None]
    scores = make_scores(options.perceptual, options.clip_weights, options.clip_variant)
    i3d = options.i3d_weights and metrics.load_i3d(options.i3d_weights)
    if i3d and len(clips) < 2:
        raise ValueError(f"FVD compares sets of videos; {options.data} has one clip to take.")
    names = ("evaluation.md", "evaluation.json", "evaluation.png", "sheet.png")
    workdir = cli.claim_workdir(options.workdir, names, overwrite=options.overwrite)
    cli.log_devices()
    features: Features = functools.partial(jax.jit(metrics.I3D.__call__), i3d) if i3d else None
    rows = evaluate(
        pipeline,
        clips,
        motions,
        weights,
        scores,
        workdir,
        num_steps=options.steps,
        features=features,
    )
    (workdir / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = table(rows, [name for name in _SCORES if name not in rows[0]])
    (workdir / "evaluation.md").write_text(text + "\n", encoding="utf-8")
    _plot(rows, workdir / "evaluation.png")
    print(text)
    logging.info("Wrote %s.", workdir)


def read_clips(path: str, splits: Sequence[str], size: int) -> list[dict[str, Any]]:
    """The elements (`d4d_jax.data.pipeline.element`) of a folder of clips, or of splits of a set.

    Raises:
        FileNotFoundError, ValueError: there are none.
    """
    sources: list[Any] = [path]
    if records.is_dataset(path):
        sources = [records.Records(path, split) for split in splits]
    return [clip for source in sources for clip in ClipSource(source, size=size)]


def make_scores(perceptual: str | None, weights: str | None, variant: str) -> Scores:
    """The scores whose weights are given.

    Raises:
        FileNotFoundError, ValueError: weights cannot be read.
    """
    scores: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "psnr": lambda made, true: float(metrics.psnr(made, true).mean()),
        "ssim": lambda made, true: float(metrics.ssim(made, true).mean()),
    }
    lpips = load_perceptual(perceptual)
    if lpips is not None:
        scores["lpips"] = lambda made, true: float(jnp.mean(lpips(made, true)))
    if weights is not None:
        similar = clip_similarity(weights, variant)
        scores["clip_f"] = lambda made, true: float(similar(made[:1], true[:1]).mean())
        scores["clip_o"] = lambda made, true: float(similar(made, true).mean())
    return scores


def clip_similarity(weights: str, variant: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Cosines (t,) of the embeddings of two videos, frame by frame, by CLIP's image tower."""
    tower = clip_models.ImageEncoder(**clip_models.VARIANTS[variant]["image"])
    params = conversion.load(weights)

    @jax.jit
    def embed(params: Any, frames: jax.Array) -> jax.Array:
        images = clip_models.preprocess_image(frames, tower.size)
        found = jnp.asarray(tower.apply({"params": params}, images))
        return found / jnp.linalg.norm(found, axis=-1, keepdims=True)

    def similar(made: np.ndarray, true: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.sum(embed(params, made) * embed(params, true), axis=-1))

    return similar


def evaluate(
    pipeline: OrbitPipeline,
    clips: Sequence[Mapping[str, Any]],
    motions: Sequence[float | None],
    weights: Sequence[float | None],
    scores: Scores,
    workdir: Path,
    *,
    num_steps: int,
    features: Features = None,
) -> list[dict[str, Any]]:
    """A row for every clip, motion and weight; writes `sheet.png`.

    Args:
        motions: magnitudes to ask for; None is that of the clip.
        weights: w2 of Eq. 3; None is that of the pipeline.
        features: for "fvd", which is the same in all rows of a motion and a weight.
    """
    rows: list[dict[str, Any]] = []
    found: dict[Any, list[np.ndarray]] = {}  # features; of the true clips by the key None
    shown: list[np.ndarray] = []
    for number, clip in enumerate(clips):
        true = (clip["dynamic"] + 1) / 2
        by_caption = pipeline.prompt.reads == "text"
        prompt = str(clip["caption"]) if by_caption else inputs.straight(true[0])
        strip = [true[..., :3]]
        if features:
            found.setdefault(None, []).append(np.asarray(features(strip[0][None])[0]))
        options: dict[str, Any] = {"num_steps": num_steps, "seed": number}
        static = np.asarray(pipeline(prompt, **options, views=("static",)).static)
        for weight in weights:
            guided = sample.with_guidance(pipeline, {} if weight is None else {"w2": weight})
            for motion in motions:
                asked = float(clip["motion"]) if motion is None else motion
                made = guided(prompt, motion=asked, **options, views=("dynamic",))
                rows.append(
                    {
                        "clip": number,
                        "asked": "own" if motion is None else motion,
                        "w2": getattr(guided.guidance, "w2", None),
                        "true_motion": float(clip["motion"]),
                        "motion": _measured(made, static),
                        **{n: score(made.dynamic, strip[0]) for n, score in scores.items()},
                    }
                )
                strip.append(np.asarray(made.dynamic))
                if features:
                    kind = _kind(rows[-1])
                    found.setdefault(kind, []).append(np.asarray(features(strip[-1][None])[0]))
        if number < _SHOWN:
            shown += strip
        logging.info("Clip %d of %d.", number + 1, len(clips))
    media.write_image(workdir / "sheet.png", media.contact_sheet(shown))
    if features:
        true, made = np.stack(found.pop(None)), {k: np.stack(v) for k, v in found.items()}
        distances = {kind: metrics.frechet_distance(made[kind], true) for kind in made}
        rows = [{**row, "fvd": distances[_kind(row)]} for row in rows]
    return rows


def _kind(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["w2"], row["asked"]


def _measured(made: OrbitClip, static: np.ndarray) -> float:
    return float(motion_magnitude(2 * np.asarray(made.dynamic) - 1, 2 * static - 1))


def table(rows: Sequence[Mapping[str, Any]], absent: Sequence[str]) -> str:
    """Means over the clips for every motion and weight, and how often the motion is in order."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    present = [name for name in _SCORES if name not in absent]
    cells = []
    for w2, asked in kinds:
        own = [row for row in rows if _kind(row) == (w2, asked)]
        means = [float(np.mean([row[name] for row in own])) for name in ("motion", *present)]
        cells.append((str(w2), str(asked), str(len(own)), *(f"{mean:.4g}" for mean in means)))
    headings = ("w2", "asked", "clips", "motion", *(name.upper() for name in present))
    lines = [markdown(headings, cells, left=2), ""]
    for w2 in dict.fromkeys(w2 for w2, _ in kinds):
        numbers = sorted(asked for weight, asked in kinds if weight == w2 and asked != "own")
        for low, high in itertools.pairwise(numbers):
            both = [
                {row["clip"]: row["motion"] for row in rows if _kind(row) == kind}
                for kind in ((w2, low), (w2, high))
            ]
            right = sum(both[0][clip] < both[1][clip] for clip in both[0])
            what = f"{right} of {len(both[0])} clips move more at {high:g} than at {low:g}"
            lines.append(f"- w2 = {w2}: {what}.")
    if absent:
        lines.append(f"- Absent, since no weights were given: {', '.join(absent)}.")
    return "\n".join(lines)


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure  # Imported here: it starts slowly.

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    for w2 in dict.fromkeys(row["w2"] for row in rows):
        own = [row for row in rows if row["w2"] == w2]
        asked = [row["true_motion"] if row["asked"] == "own" else row["asked"] for row in own]
        axes.plot(asked, [row["motion"] for row in own], ".", label=f"w2 = {w2}")
    axes.set_xlabel("motion magnitude asked for")
    axes.set_ylabel("measured")
    axes.legend()
    figure.savefig(path, dpi=100)


def _number(word: str, flag: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{flag} is a list of numbers, not {word!r}.") from None


if __name__ == "__main__":
    flags.DEFINE_string(
        "data", None, "A folder of clips, or a data set of which --splits are taken.", required=True
    )
    flags.DEFINE_list("splits", ["test"], "Of a data set.")
    flags.DEFINE_integer("count", None, "Take the first clips only.", lower_bound=1)
    flags.DEFINE_list("motions", ["own"], "Motion magnitudes to ask for; own: that of the clip.")
    flags.DEFINE_list("w2", None, "Weights of Eq. 3 to compare; default: the model's.")
    flags.DEFINE_string("perceptual", None, "Adds LPIPS: stlpips, or BACKBONE:FILE of torchvision.")
    flags.DEFINE_string(
        "clip_weights", None, "Adds CLIP-F and CLIP-O: image.safetensors of experiments.convert."
    )
    flags.DEFINE_string("i3d_weights", None, "Adds FVD: see d4d_jax.metrics.load_i3d.")
    flags.DEFINE_enum("clip_variant", "vit_h_14", sorted(clip_models.VARIANTS), "Of the weights.")
    cli.run(main)
