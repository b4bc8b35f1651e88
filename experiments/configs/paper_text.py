"""The paper's training for prompts that are a sentence; see `paper.py`."""

import ml_collections

from experiments.configs import paper


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "" or "ablation=NAME" (`paper.ABLATIONS`)."""
    return paper.make_config("diffusion4d_t2v", arg)
