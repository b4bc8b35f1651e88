"""Trains the orbital video model: `python -m experiments.train --workdir=DIR [--config.KEY=VALUE]`.

A workdir that has a checkpoint is continued, exactly where it stopped. It ends up with
`config.json`, `metrics.jsonl`, `checkpoints/` and, with --config.sample_every, `images/`.
"""

import json
import logging
import os
import pathlib
import shutil

from absl import flags

from d4d_jax.models import bundle
from d4d_jax.train import loop, sharding, writers
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.state import count_parameters
from d4d_jax.train.step import make_train_step
from experiments import build, cli

_LOGGER = logging.getLogger("experiments.train")  # also when run as __main__

_CONFIG = cli.define_config("tiny.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the run in the workdir and start anew.")
_EXPORT = flags.DEFINE_string(
    "export", None, "File (.npz) to write the trained model to when the run is complete."
)
flags.adopt_module_key_flags(cli)

#: What a run leaves in its workdir, and all that --overwrite deletes.
_OUTPUTS = ("checkpoints", "images", "profile", "metrics.jsonl", "config.json")


def main() -> None:
    """Trains, then exports when asked to."""
    config = json.loads(_CONFIG.value.to_json())  # from here on plain values, tuples as lists
    workdir = pathlib.Path(_WORKDIR.value)
    if _EXPORT.value and os.path.exists(_EXPORT.value):
        raise FileExistsError(f"{_EXPORT.value} exists already: remove it or choose another name.")
    if _OVERWRITE.value:
        _delete_run(workdir)
    checkpointer = Checkpointer(workdir / "checkpoints", keep=config["keep_checkpoints"])
    try:
        done = checkpointer.latest_step() or 0
        if done < config["num_steps"]:
            _train(config, workdir, checkpointer)
        elif not _EXPORT.value:
            raise ValueError(
                f"{workdir} holds a finished run of {done} steps: raise --config.num_steps to "
                "continue it, or pass --overwrite to start anew."
            )
        if _EXPORT.value:
            _export(_EXPORT.value, checkpointer)
    finally:
        checkpointer.close()


def _train(config: build.Config, workdir: pathlib.Path, checkpointer: Checkpointer) -> None:
    # Data.
    dataset = build.build_dataset(config)
    batch = next(iter(dataset))
    data = iter(dataset)

    # Model.
    codec = build.build_codec(config)
    codec_params = build.fit_codec(config, codec)
    network = build.build_network(config, build.latent_channels(codec, codec_params, batch))
    state = build.init_state(config, network, codec, codec_params, batch)
    loss_fn = build.build_loss(config, network, codec, build.build_schedule(config))
    step_fn = make_train_step(loss_fn, build.build_optimizer(config), ema_decay=config["ema_decay"])

    # Continue where an earlier run stopped.
    if checkpointer.latest_step() is not None:
        state = checkpointer.restore(state, data)
    restored_step = int(state.step)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    # Train.
    mesh = sharding.make_mesh()
    cli.log_devices(mesh)
    _LOGGER.info("Parameters: %s.", f"{count_parameters(state.params):,}")
    _LOGGER.info("Training from step %d to %d.", restored_step, config["num_steps"])
    writer = writers.default_writer(workdir, restored_step=restored_step)
    options = loop.LoopOptions(
        config["num_steps"],
        log_every=config["log_every"],
        checkpoint_every=config["checkpoint_every"],
        sample_every=config["sample_every"],
    )
    try:
        with cli.profile(workdir):
            loop.train(
                state,
                step_fn,
                data,
                options,
                mesh=mesh,
                checkpointer=checkpointer,
                writer=writer,
                config=config,
            )
    finally:
        writer.close()


def _export(path: str, checkpointer: Checkpointer) -> None:
    params, frozen = checkpointer.restore_model()
    config = checkpointer.restore_config()
    bundle.save_bundle(path, params, frozen["codec"], config)
    _LOGGER.info("Wrote %s (%.2f MB).", path, os.path.getsize(path) / 1e6)


def _delete_run(workdir: pathlib.Path) -> None:
    for name in _OUTPUTS:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
