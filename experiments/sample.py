"""Samples the orbital video of one prompt image: `python -m experiments.sample --workdir=OUT`.

Writes `orbit.mp4` (the moving object), `static.mp4` (the same object standing still), `sheet.png`
(eight frames of both) and `orbit_frames/`, a clip folder that `experiments.reconstruct --clip`
reads, into the workdir.
"""

import dataclasses
import pathlib
import shutil
import time

from absl import flags, logging

import d4d_jax
from d4d_jax import clips, media
from d4d_jax.guidance import ThreeDAware
from d4d_jax.pipeline import EMBEDDED, OrbitPipeline
from d4d_jax.train.checkpoint import Checkpointer
from experiments import cli

_PROMPT = pathlib.Path(d4d_jax.__file__).parent / "assets" / "clips" / "rabbit" / "multi_frame0.png"

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace results that are in the workdir.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", str(EMBEDDED), "A model file (.npz), or the workdir of a training run."
)
_IMAGE = flags.DEFINE_string("image", str(_PROMPT), "The prompt: an image with alpha or on white.")
_MOTION = flags.DEFINE_float("motion", 8.0, "Motion magnitude m; 0 stands still.", lower_bound=0)
_W1 = flags.DEFINE_float("guidance_w1", 0.0, "Weight of classifier-free guidance (Eq. 3).")
_W2 = flags.DEFINE_float("guidance_w2", 0.5, "Weight of the step away from the static object.")
_STEPS = flags.DEFINE_integer("steps", 50, "DDIM steps.", lower_bound=1)
flags.adopt_module_key_flags(cli)


def main() -> None:
    """Samples and writes."""
    image, pipeline = read_prompt()
    written = ("orbit.mp4", "orbit_frames", "static.mp4", "sheet.png")
    workdir = cli.claim_workdir(WORKDIR.value, written, overwrite=OVERWRITE.value)
    cli.log_devices()
    with cli.profile(workdir):
        clip = sample(image, pipeline)
    write_samples(clip, workdir)
    media.write_video(workdir / "static.mp4", clip.static)
    media.write_image(workdir / "sheet.png", media.contact_sheet([clip.dynamic, clip.static]))
    logging.info("Wrote %s.", workdir)


def read_prompt() -> tuple[clips.AnyArray, OrbitPipeline]:
    """The image and the model of the command line; raises FileNotFoundError or ValueError."""
    return clips.read_image(_IMAGE.value), load_pipeline(_CHECKPOINT.value)


def sample(image: clips.AnyArray, pipeline: OrbitPipeline) -> clips.OrbitClip:
    """Samples the two orbits of `image` with the settings of the command line."""
    logging.info("Sampling %d frames of %d x %d.", pipeline.num_frames, *2 * [pipeline.size])
    start = time.perf_counter()
    pipeline = dataclasses.replace(
        pipeline,
        guidance=ThreeDAware(_W1.value, _W2.value),
        static_guidance=ThreeDAware(_W1.value, 0.0),
    )
    clip = pipeline(image, motion=_MOTION.value, num_steps=_STEPS.value, seed=SEED.value)
    logging.info("Sampled in %.0f s.", time.perf_counter() - start)
    return clip


def write_samples(clip: clips.OrbitClip, workdir: pathlib.Path) -> None:
    """Writes `orbit.mp4` and the clip folder `orbit_frames`, in place of older ones."""
    media.write_video(workdir / "orbit.mp4", clip.dynamic)
    shutil.rmtree(workdir / "orbit_frames", ignore_errors=True)
    clips.write_clip(clip, workdir / "orbit_frames")


def settings() -> dict[str, float | int | str]:
    """The settings of the command line, for a report."""
    chosen = (_IMAGE, _CHECKPOINT, _MOTION, _W1, _W2, _STEPS, SEED)
    return {flag.name: flag.value for flag in chosen}


def load_pipeline(path: str) -> OrbitPipeline:
    """The pipeline of a model file, or of the newest checkpoint of a training workdir.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it cannot be read.
    """
    folder = pathlib.Path(path) / "checkpoints"
    if not pathlib.Path(path).is_dir():
        return OrbitPipeline.load(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not the workdir of a training run: it has no {folder}.")
    checkpointer = Checkpointer(folder)
    try:
        params, frozen = checkpointer.restore_model()
        return OrbitPipeline.from_parts(params, frozen["codec"], checkpointer.restore_config())
    finally:
        checkpointer.close()


if __name__ == "__main__":
    cli.run(main)
