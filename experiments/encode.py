"""Encodes a data set once: latents by a model's codec, and what its prompt encoder says.

    python -m experiments.encode --data=DATASET --checkpoint=models/i2v --out=LATENTS

writes DATASET anew with the latents of all clips. `experiments.train --config.data.path=LATENTS`
reads these instead of frames, so neither the VAE nor CLIP runs in a step. DATASET is what
`experiments.build_dataset` wrote; the same command after a stop goes on with the files that are
missing. The codec lies beside the data (`codec.safetensors`), for runs that start from no model.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from d4d_jax import conversion
from d4d_jax.data import latents, records
from d4d_jax.data.pipeline import Element
from d4d_jax.pipeline import EMBEDDED
from experiments import build, cli, inputs


def main() -> None:
    """Encodes the data set of the command line."""
    options = flags.FLAGS
    model = build.load_pipeline(options.checkpoint)
    total = sum(split["clips"] for split in records.read_index(options.data)["splits"].values())
    cli.log_devices()
    encode = jax.jit(model.codec.encode)
    told = bool(model.prompt_params)

    def entries(clip: Element) -> dict[str, np.ndarray]:
        views = zip(records.LATENTS, ("dynamic", "static"), strict=True)
        found = {name: encode(model.codec_params, clip[view][None])[0] for name, view in views}
        found = {name: np.asarray(value, options.dtype) for name, value in found.items()}
        return found | (inputs.prompt_entries(clip, model) if told else {})

    def on_clip(count: int) -> None:
        logging.log_every_n_seconds(logging.INFO, "Clip %d of %d.", 10, count, total)

    about: dict[str, Any] = {
        "size": model.size,
        "dtype": options.dtype,
        "codec": inputs.describe("codec", model.codec),
        "prompt": inputs.describe("prompt", model.prompt) if told else None,
    }
    latents.encode(options.data, options.out, entries, about, on_clip=on_clip)
    codec_params = jax.tree.map(np.asarray, model.codec_params)
    conversion.save(Path(options.out) / build.CODEC_FILE, codec_params, overwrite=True)
    logging.info("%d clips are in %s.", total, options.out)


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder of a data set.", required=True)
    flags.DEFINE_string(
        "checkpoint",
        str(EMBEDDED),
        "A model file (.npz), a folder of converted weights, or the workdir of a training run.",
    )
    flags.DEFINE_string("out", None, "Folder of the new data set.", required=True)
    flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of the latents.")
    cli.run(main)
