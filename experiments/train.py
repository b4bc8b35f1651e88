"""Trains the orbital video model: `python -m experiments.train --workdir=DIR [--config.KEY=VALUE]`.

A workdir that has a checkpoint is continued, exactly where it stopped, and with the configuration
that it was started with: only the lengths and distances in `CHANGEABLE` may be given anew. It ends
up with `config.json`, `metrics.jsonl`, `checkpoints/` and, with --config.sample_every, `images/`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags, logging
from jax.experimental import multihost_utils

from d4d_jax import pipeline
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.models import bundle
from d4d_jax.train import loop, sharding, writers
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.state import parameter_table
from d4d_jax.train.step import make_train_step
from d4d_jax.typing import MetricWriter
from experiments import build, cli, inputs

#: The lengths and distances of `loop.LoopOptions` in a configuration.
_LOOP = (
    "num_steps",
    "log_every",
    "checkpoint_every",
    "sample_every",
    "validate_every",
    "max_skipped",
)

#: The keys of the configuration that a continued run may change.
CHANGEABLE = frozenset(
    {
        *_LOOP,
        "keep_checkpoints",
        "keep_best",
        "writers",
        "mesh.data",
        "mesh.fsdp",
        "mesh.by_frames",
        "data.validation",
        "data.max_corrupt",
    }
)

#: What runs of earlier versions did not save, and were as if it had been this.
_EARLIER = {
    "init_from": "",
    "accumulate": 1,
    "loss.min_snr_gamma": 0.0,
    "loss.noise_offset": 0.0,
    "loss.drop_text": 0.0,
    "loss.drop_image": 0.0,
    "loss.drop_static": 0.0,
    "loss.motion.space": "pixel",
    "loss.motion.scale": 100.0,
    "loss.motion.reduction": "mean",
    "optimizer.groups": [],
    "lora.rank": 0,
    "lora.alpha": 8.0,
    "lora.kernels": "",
}

#: What a run leaves in its workdir, and all that --overwrite deletes.
_OUTPUTS = (
    "checkpoints",
    "images",
    "profile",
    "tensorboard",
    "metrics.jsonl",
    "samples.html",
    "config.json",
)


def main() -> None:
    """Trains, then exports when asked to, as the command line says."""
    options = flags.FLAGS
    if options.distributed:
        jax.distributed.initialize(options.coordinator, options.num_processes, options.process_id)
    run(
        json.loads(options.config.to_json()),  # from here on plain values, tuples as lists
        pathlib.Path(options.workdir),
        overwrite=options.overwrite,
        export=options.export,
    )


def run(
    config: dict[str, Any],
    workdir: pathlib.Path,
    *,
    overwrite: bool = False,
    export: str | None = None,
) -> None:
    """Trains in `workdir` up to `num_steps`, from its newest checkpoint if it has one.

    Args:
        config: the configuration, in values that JSON has.
        workdir: folder of the run.
        overwrite: start anew; the earlier run is deleted when the new one is known to be sound.
        export: file (.npz) or folder to write the model to when the run is complete, see
            `bundle.save_bundle` and `pipeline.save_folder`. A run that is complete already is only
            exported, with its own configuration.

    Raises:
        FileExistsError: `export` is there already.
        ValueError: the run is complete and not to be exported, or the configuration is wrong or
            not that of the run.
    """
    if export and os.path.exists(export):
        raise FileExistsError(f"{export} exists already: remove it or choose another name.")
    done, saved = (0, None) if overwrite else _progress(workdir / "checkpoints")
    if done < config["num_steps"]:
        _train(config, workdir, saved, overwrite=overwrite)
    elif not export:
        raise ValueError(
            f"{workdir} holds a finished run of {done} steps: raise --config.num_steps to "
            "continue it, or pass --overwrite to start anew."
        )
    if export:
        _export(export, workdir / "checkpoints")


def _train(
    config: dict[str, Any],
    workdir: pathlib.Path,
    saved: dict[str, Any] | None,
    *,
    overwrite: bool,
) -> None:
    options = loop.LoopOptions(
        **{name: config[name] for name in _LOOP},
        profile=cli.profile_steps(),
        profile_folder=workdir / "profile",
    )
    accumulate, by_frames = config["accumulate"], config["mesh"]["by_frames"]
    mesh = sharding.make_mesh(config["mesh"]["data"] or None, config["mesh"]["fsdp"])
    sharding.check_batch(config["batch_size"], mesh, by_frames=by_frames, accumulate=accumulate)

    optimizer, schedule = build.build_optimizer(config), build.build_schedule(config)

    base = build.load_base(config)
    if base:
        config = config | {"prompt": inputs.describe("prompt", base.prompt)}

    # Data.
    source = inputs.build_source(config)
    config = config | {"data": config["data"] | {"num_frames": source.num_frames}}
    if saved:
        check_unchanged(saved, config, workdir)
    sharding.check_batch(
        config["batch_size"], mesh, num_frames=source.num_frames, by_frames=by_frames
    )

    def told(clips: ClipSource) -> ClipSource:
        return inputs.tell(clips, base) if base else clips

    source = told(source)
    data = iter(inputs.build_dataset(config, source))

    # Model.
    codec = build.build_codec(config)
    folder = workdir / "checkpoints"
    codec_params = _restore_codec(folder) if saved else build.fit_codec(codec, source, base)
    batch = inputs.example_batch(source)
    network = build.build_network(config, build.latent_channels(codec, codec_params, batch))
    objective = build.build_objective(config, network, codec, schedule)
    state = build.init_state(config, objective, codec_params, batch, mesh, base)
    step_fn = make_train_step(
        build.build_loss(config, objective),
        optimizer,
        ema_decay=config["ema_decay"],
        accumulate=accumulate,
        rate=build.build_rate(config),
        out_shardings=sharding.shardings(state, mesh, sharding.STATE_RULES),
    )
    on_sample = None
    if options.sample_every:
        on_sample = build.build_sampler(config, inputs.build_source(config, frames=True), base)
    on_validate = None
    if options.validate_every:
        on_validate = build.build_validation(config, objective, told)

    # Everything is known to be sound: write from here on.
    primary = jax.process_index() == 0
    if overwrite and primary:
        _delete_run(workdir)
    multihost_utils.sync_global_devices("cleared")
    with contextlib.ExitStack() as stack:
        keep = {"keep": config["keep_checkpoints"], "keep_best": config["keep_best"]}
        checkpointer = Checkpointer(folder, **keep)
        stack.callback(checkpointer.close)
        if saved:
            state = checkpointer.restore(state, data)
        first = int(state.step)
        writer: MetricWriter = writers.MultiWriter([])
        if primary:
            text = json.dumps(config, indent=1) + "\n"
            (workdir / "config.json").write_text(text, encoding="utf-8")
            writer = writers.default_writer(workdir, restored_step=first, further=config["writers"])
        cli.log_devices(mesh)
        logging.info("Parameters:\n%s", parameter_table(state.params))
        logging.info("The state takes %.1f MB on a device.", sharding.bytes_per_device(state) / 1e6)
        logging.info("Training from step %d to %d.", first, options.num_steps)
        stack.callback(writer.close)
        stack.enter_context(cli.profile(workdir))
        stop = stack.enter_context(cli.stop_requests())
        try:
            loop.train(
                state,
                step_fn,
                data,
                options,
                mesh=mesh,
                checkpointer=checkpointer,
                writer=writer,
                config=config,
                on_sample=on_sample,
                on_validate=on_validate,
                batch_rules=sharding.FRAME_RULES if by_frames else sharding.BATCH_RULES,
                stop=lambda: stop() > 0,
            )
        except loop.Interrupted as interruption:
            logging.warning("%s The same command goes on from there.", interruption)
            sys.exit(128 + (stop() or signal.SIGTERM))


def check_unchanged(
    saved: Mapping[str, Any], config: Mapping[str, Any], workdir: pathlib.Path
) -> None:
    """Passes when a run can be continued: its configuration is `config`, up to `CHANGEABLE`.

    Args:
        saved: the configuration of the run, from its checkpoint.
        config: the one that it is to be continued with.
        workdir: folder of the run, for the message.

    Raises:
        ValueError: a key differs; the message names it and both values.
    """
    before, now = _flatten(saved), _flatten(config)
    # The first is found in the data, not configured.
    before = {"data.num_frames": now.get("data.num_frames"), **_EARLIER, **before}
    for key in sorted(before.keys() | now.keys()):
        old, new = (repr(d[key]) if key in d else "absent" for d in (before, now))
        if key not in CHANGEABLE and old != new:
            raise ValueError(
                f"The run in {workdir} was started with {key}={old}, but now it is {new}: "
                "continue it with the --config flags that started it, choose another --workdir, "
                "or pass --overwrite to start anew."
            )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"network.width": 8, ...} of a nested configuration."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _progress(folder: pathlib.Path) -> tuple[int, dict[str, Any] | None]:
    """The newest checkpoint's step and configuration; 0 and None without one."""
    if not folder.is_dir():
        return 0, None
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        step = checkpointer.latest_step()
        return (0, None) if step is None else (step, checkpointer.restore_config())


def _restore_codec(folder: pathlib.Path) -> Any:
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        return checkpointer.restore_model()[1]["codec"]


def _export(path: str, folder: pathlib.Path) -> None:
    with contextlib.closing(Checkpointer(folder)) as checkpointer:
        params, frozen = checkpointer.restore_model()
        config = checkpointer.restore_config()
    params = build.whole_params(config, params, frozen)
    if jax.process_index():
        return
    if path.endswith(".npz"):
        bundle.save_bundle(path, params, frozen["codec"], config)
    else:
        base = config.get("init_from") or None
        pipeline.save_folder(path, params, frozen["codec"], config, base=base)
    logging.info("Wrote %s.", path)


def _delete_run(workdir: pathlib.Path) -> None:
    for name in _OUTPUTS:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_bool("overwrite", False, "Delete the run in the workdir and start anew.")
    flags.DEFINE_string(
        "export", None, "File (.npz, float16) or folder for the model when it is complete."
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Train with other processes, each started by this command. SLURM, Kubernetes, GKE and TPU"
        " pods are found by JAX; elsewhere say who is who by the next three flags.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this one, from 0.", lower_bound=0)
    cli.define_config("tiny.py")
    flags.adopt_module_key_flags(cli)
    cli.run(main)
