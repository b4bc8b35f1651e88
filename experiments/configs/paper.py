"""Training as in the paper, from the weights of a 3D-aware network, and its ablations.

    python -m experiments.train --config=experiments/configs/paper_image.py:ablation=no_lmr \\
        --config.init_from=models/i2v --config.data.path=DATASET --workdir=runs/no_lmr

Batches of 128 clips for 6000 steps at 3e-5, moving and still ones, all conditions in the cards of
one node: `paper_text.py`, `paper_image.py` and `paper_static3d.py` are this file for the three
prompts. An ablation is one change:

- `no_lmr`: no motion reconstruction loss (Eq. 2);
- `no_3d_cfg`: sampling without the step away from the static object (Eq. 3, w2 = 0);
- `no_motion`: a network that is not told the motion magnitude;
- `no_static_mix`: no still clips among the moving ones.
"""

import ml_collections

from experiments.configs import finetune

ABLATIONS = {
    "no_lmr": lambda config: config.loss.update(omega=0.0),
    "no_3d_cfg": lambda config: config.guidance.update(w2=0.0),
    "no_motion": lambda config: config.network.update(motion_embedding=False),
    "no_static_mix": lambda config: config.data.update(static_probability=0.0),
}


def make_config(preset: str, arg: str) -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "" or "ablation=NAME".

    Raises ValueError for another `arg`.
    """
    config = finetune.get_config(preset)
    config.batch_size = 128
    config.loss.omega = 1.0
    config.data.static_probability = 0.1
    if not arg:
        return config
    kind, _, name = arg.partition("=")
    if kind != "ablation" or name not in ABLATIONS:
        known = ", ".join(f"ablation={name}" for name in ABLATIONS)
        raise ValueError(f"The paper's configurations take {known}, not {arg!r}.")
    ABLATIONS[name](config)
    return config
