"""Samples the orbital video of a prompt: `python -m experiments.sample --workdir=OUT`.

The prompt is an image (`--image`), or for models that are told what to show a sentence
(`--prompt`).

Writes `orbit.mp4` (the moving object), `static.mp4` (the same object standing still), `sheet.png`
(eight frames of both) and `orbit_frames/`, a clip folder that `experiments.reconstruct --clip`
reads, into the workdir.
"""

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

import d4d_jax
from d4d_jax import clips, media
from d4d_jax.guidance import Interval, ThreeDAware
from d4d_jax.models.prompts import Prompt
from d4d_jax.pipeline import EMBEDDED, OrbitPipeline
from experiments import build, cli

_PROMPT = pathlib.Path(d4d_jax.__file__).parent / "assets" / "clips" / "rabbit" / "multi_frame0.png"

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace results that are in the workdir.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    str(EMBEDDED),
    "A model file (.npz), a folder of converted weights, or the workdir of a training run.",
)
_IMAGE = flags.DEFINE_string("image", str(_PROMPT), "The prompt: an image with alpha or on white.")
_TEXT = flags.DEFINE_string("prompt", None, "The prompt as a sentence, instead of an image.")
_MOTION = flags.DEFINE_float("motion", 8.0, "Motion magnitude m; 0 stands still.", lower_bound=0)
_W1 = flags.DEFINE_float(
    "guidance_w1", None, "Weight of classifier-free guidance (Eq. 3); default: the model's."
)
_W2 = flags.DEFINE_float(
    "guidance_w2", None, "Weight of the step away from the static object; default: the model's."
)
_RESCALE = flags.DEFINE_float(
    "guidance_rescale", None, "Share of the contrast that guidance adds which is taken back."
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "FIRST,LAST: timesteps between which there is guidance."
)
_BATCHING = flags.DEFINE_bool(
    "guidance_batching", None, "Compute the branches of guidance in one call; takes more memory."
)
_STATIC_CHECKPOINT = flags.DEFINE_string(
    "static_checkpoint",
    None,
    "The frozen 3D-aware network of Eq. 3, as --checkpoint; default: the model itself at m = 0.",
)
_ASSET = flags.DEFINE_string(
    "asset_clip", None, "Clip folder with the static orbit of a 3D asset that is to move."
)
_STEPS = flags.DEFINE_integer("steps", 50, "DDIM steps.", lower_bound=1)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Samples and writes."""
    prompt, pipeline = read_prompt()
    written = ("orbit.mp4", "orbit_frames", "static.mp4", "sheet.png")
    workdir = cli.claim_workdir(WORKDIR.value, written, overwrite=OVERWRITE.value)
    cli.log_devices()
    with cli.profile(workdir):
        clip = sample(prompt, pipeline)
    write_samples(clip, workdir)
    media.write_video(workdir / "static.mp4", clip.static)
    rows = [frames for frames in (clip.dynamic, clip.static) if frames is not None]
    media.write_image(workdir / "sheet.png", media.contact_sheet(rows))
    logging.info("Wrote %s.", workdir)


def read_prompt() -> tuple[Prompt, OrbitPipeline]:
    """The prompt and the model of the command line; raises FileNotFoundError or ValueError."""
    prompt = clips.read_image(_IMAGE.value) if _TEXT.value is None else _TEXT.value
    return prompt, build.load_pipeline(_CHECKPOINT.value)


def sample(prompt: Prompt, pipeline: OrbitPipeline) -> clips.OrbitClip:
    """Samples the orbits of a prompt with the settings of the command line."""
    logging.info("Sampling %d frames of %d x %d.", pipeline.num_frames, *2 * [pipeline.size])
    start = time.perf_counter()
    asset = None if _ASSET.value is None else clips.read_clip(_ASSET.value)
    clip = _guided(pipeline)(
        prompt, motion=_MOTION.value, num_steps=_STEPS.value, seed=SEED.value, asset=asset
    )
    logging.info("Sampled in %.0f s.", time.perf_counter() - start)
    return clip


def _guided(pipeline: OrbitPipeline) -> OrbitPipeline:
    """The pipeline with the guidance of the command line."""
    options = {
        "w1": _W1.value,
        "w2": _W2.value,
        "rescale": _RESCALE.value,
        "batched": _BATCHING.value,
    }
    given = {name: value for name, value in options.items() if value is not None}
    guidance = pipeline.guidance
    if not isinstance(guidance, ThreeDAware):
        if given or _INTERVAL.value or _STATIC_CHECKPOINT.value:
            raise ValueError("The flags of guidance are for models with a motion input.")
        return pipeline
    if _INTERVAL.value:
        if len(_INTERVAL.value) != 2 or not all(word.isdigit() for word in _INTERVAL.value):
            raise ValueError(
                f"--guidance_interval is FIRST,LAST, not {','.join(_INTERVAL.value)!r}."
            )
        first, last = map(int, _INTERVAL.value)
        for name in ("w1", "w2"):
            weight = given.get(name, getattr(guidance, name))
            if weight and not callable(weight):
                given[name] = Interval(weight, first, last)
    pipeline = with_guidance(pipeline, given)
    if _STATIC_CHECKPOINT.value is None:
        return pipeline
    static = build.load_pipeline(_STATIC_CHECKPOINT.value)
    if (static.codec, static.size, static.schedule.prediction) != (
        pipeline.codec,
        pipeline.size,
        pipeline.schedule.prediction,
    ):
        raise ValueError(
            f"{_STATIC_CHECKPOINT.value} cannot be the 3D-aware network of {_CHECKPOINT.value}:"
            " codec, size or prediction differ."
        )
    return dataclasses.replace(pipeline, static_network=static.network, static_params=static.params)


def with_guidance(pipeline: OrbitPipeline, changes: Mapping[str, Any]) -> OrbitPipeline:
    """The pipeline with other fields of its 3D-aware guidance; its static orbit keeps w2 = 0.

    Raises:
        ValueError: it has another guidance.
    """
    if not changes:
        return pipeline
    if not isinstance(pipeline.guidance, ThreeDAware):
        raise ValueError("The flags of guidance are for models with a motion input.")
    guidance = dataclasses.replace(pipeline.guidance, **changes)
    still = dataclasses.replace(guidance, w2=0.0)
    return dataclasses.replace(pipeline, guidance=guidance, static_guidance=still)


def write_samples(clip: clips.OrbitClip, workdir: pathlib.Path) -> None:
    """Writes `orbit.mp4` and the clip folder `orbit_frames`, in place of older ones."""
    frames = clip.static if clip.dynamic is None else clip.dynamic
    media.write_video(workdir / "orbit.mp4", frames)
    shutil.rmtree(workdir / "orbit_frames", ignore_errors=True)
    clips.write_clip(clip, workdir / "orbit_frames")


def settings() -> dict[str, float | int | str | None]:
    """The settings of the command line, for a report."""
    prompt = _IMAGE if _TEXT.value is None else _TEXT
    chosen = (prompt, _CHECKPOINT, _MOTION, _W1, _W2, _STEPS, SEED)
    chosen += (_RESCALE, _INTERVAL, _STATIC_CHECKPOINT, _ASSET)
    return {flag.name: flag.value for flag in chosen}


if __name__ == "__main__":
    cli.run(main)
