"""Training that starts from published weights, with the paper's rate, on 256 x 256 pixels.

    python -m experiments.train --config=experiments/configs/finetune.py:diffusion4d_t2v \\
        --config.init_from=models/t2v --config.data.path=CLIPS --workdir=runs/t2v

`init_from` is a folder for `d4d_jax.pipeline.OrbitPipeline.load`; it gives the prompt encoder.
"""

import ml_collections

from d4d_jax.presets import PRESETS
from experiments.configs import tiny


def get_config(arg: str = "diffusion4d_t2v") -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is a name in `d4d_jax.presets.PRESETS`.

    Raises ValueError for another `arg`.
    """
    if arg not in PRESETS:
        raise ValueError(f"finetune.py takes one of {', '.join(PRESETS)}, not {arg!r}.")
    config = tiny.get_config()
    config.update(num_steps=6000, batch_size=8, ema_decay=0.9999, checkpoint_every=1000)
    for name, part in PRESETS[arg].items():
        if name == "data":
            config.data.update(part)
        elif name != "prompt":
            config[name] = ml_collections.ConfigDict(part) if isinstance(part, dict) else part
    config.network.update(remat="dots", dtype="bfloat16")
    config.loss.update(timestep_shift=1.0, snr_power=2.0)
    config.optimizer.update(name="adamw", learning_rate=3e-5, decay="constant", weight_decay=0.01)
    return config
