"""Converts weights between this library and others, either way.

    python -m experiments.convert --source=videomv_t2v.pth --format=videomv_t2v \\
        --target=videomv_t2v.safetensors
    python -m experiments.convert --source=videomv_t2v.safetensors --to=diffusers_t2v \\
        --drop=camera_embedding --target=unet

--format and --to name what is read and written; the default of both, d4d, is this library's own.
A source is a file, a folder of diffusers, transformers or Orbax, a model file (.npz) or the workdir
of a training run. A target is a .safetensors file, a file for torch (.pth, needs torch), or a
folder: an Orbax checkpoint, or what `from_pretrained` of diffusers and transformers reads. All
names and shapes are compared before anything is written, and all that does not fit is listed.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from absl import flags, logging

from d4d_jax import conversion
from d4d_jax.models import bundle
from d4d_jax.train.checkpoint import Checkpointer
from experiments import cli


def main() -> None:
    """Converts what the command line names."""
    options = flags.FLAGS
    if options.target is None and not options.dry_run:
        raise ValueError("There is no --target to write to; --dry_run only compares.")
    begin = time.monotonic()
    try:
        reports = conversion.convert_file(
            find_source(options.source, options.format),
            None if options.dry_run else options.target,
            format=options.format,
            to=options.to,
            variant=options.variant,
            allow_new=options.allow_new,
            drop=options.drop,
            seed=options.seed,
            overwrite=options.overwrite,
        )
    except conversion.ConversionError as error:
        print("\n".join(error.problems))
        count = len(error.problems)
        plural = "" if count == 1 else "s"
        raise ValueError(f"{error.what}: {count} problem{plural}, listed above.") from error
    for name, report in zip((options.format, options.to), reports, strict=True):
        print(f"{name}: {report}")
    seconds = time.monotonic() - begin
    if options.dry_run:
        logging.info("Everything fits (%.0f s); nothing was written.", seconds)
    else:
        logging.info("Wrote %s in %.0f s.", options.target, seconds)


def find_source(path: str, format: str) -> Any:
    """What `convert_file` reads: the path, or the parameters of a model file or a training run.

    Raises:
        FileNotFoundError: there is nothing at the path.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if format == "d4d" and path.endswith(".npz"):
        return bundle.load_bundle(path)[0]
    folder = Path(path) / "checkpoints"
    if format == "d4d" and folder.is_dir():
        with contextlib.closing(Checkpointer(folder)) as checkpointer:
            return checkpointer.restore_model()[0]
    return path


if __name__ == "__main__":
    known = sorted(conversion.FORMATS)
    flags.DEFINE_string("source", None, "File or folder to read.", required=True)
    flags.DEFINE_enum("format", "d4d", known, "What the source is.")
    flags.DEFINE_string("target", None, "File or folder to write.")
    flags.DEFINE_enum("to", "d4d", known, "What to write.")
    flags.DEFINE_string(
        "variant", None, "Variant of the network; default: that of the published weights."
    )
    flags.DEFINE_multi_string(
        "allow_new",
        [],
        "Regular expression of our parameters that the source may lack, for example"
        " motion_embedding: they get initial values. May be repeated.",
    )
    flags.DEFINE_multi_string(
        "drop", [], "Regular expression of our parameters that are not written. May be repeated."
    )
    flags.DEFINE_integer("seed", 0, "Of the initial values.")
    flags.DEFINE_bool("dry_run", False, "Compare names and shapes, and write nothing.")
    flags.DEFINE_bool("overwrite", False, "Replace the target.")
    cli.run(main)
