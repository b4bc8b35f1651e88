"""Turns a prompt into a moving 3D asset: samples an orbital video, then reconstructs it.

    python -m experiments.generate --workdir=out [--image=PATH] [--motion=8]

writes into the workdir: `orbit.mp4` and `orbit_frames/` (the sampled clip, a folder that
`experiments.reconstruct --clip` reads), the files of the reconstruction (see
`experiments/reconstruct.py`; its own orbit is `asset_orbit.mp4` here) and `report.json`. The same
seed gives the same bytes on the same platform.
"""

import json

from absl import flags, logging

from d4d_jax import clips
from experiments import cli, sample
from experiments.reconstruct import PRESETS, fit, to_config
from experiments.results import outputs, write_results
from gaussians.captures import of_clip

#: The asset along the orbit; `orbit.mp4` is the sampled video.
_ORBIT = "asset_orbit.mp4"


def main() -> None:
    """Generates the asset that the command line asks for."""
    prompt, pipeline = sample.read_prompt()
    if not pipeline.moves:
        raise ValueError(
            "This model knows no motion, so there is nothing to make a moving asset of: sample its"
            " orbit with experiments.sample."
        )
    config = to_config(flags.FLAGS.config)
    written = ("orbit.mp4", "orbit_frames", *outputs(_ORBIT))
    workdir = cli.claim_workdir(sample.WORKDIR.value, written, overwrite=sample.OVERWRITE.value)
    cli.log_devices()
    with cli.profile(workdir):
        sample.write_samples(sample.sample(prompt, pipeline), workdir)
        # Reconstruct what the files hold, as experiments.reconstruct --clip would.
        clip = clips.read_clip(workdir / "orbit_frames")
        asset, seconds = fit(clip, config, sample.SEED.value, workdir)
    facts = {"prompt": sample.settings(), "measured_motion": clip.motion}
    capture = of_clip(clip, asset.meta["static_time"])
    report = write_results(asset, capture, workdir, seconds=seconds, orbit=_ORBIT, facts=facts)
    logging.info("Wrote %s: %s", workdir, json.dumps(report))


if __name__ == "__main__":
    cli.define_config("reconstruct.py:fast")
    cli.define_preset(PRESETS)
    flags.adopt_module_key_flags(cli)
    flags.adopt_module_key_flags(sample)
    cli.run(main)
