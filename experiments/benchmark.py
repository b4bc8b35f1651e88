"""Measures speed and memory beside other implementations.

    python -m experiments.benchmark --suite=rasterizer --json=rasterizer.json

runs what it finds installed and installs nothing. The JSON is a list of rows; printed, and written
where --markdown says, is a table of them with the machine and the reasons for what is missing.
Figures of different runs or machines are not comparable; those of one run are taken in turn.

    python -m experiments.benchmark --suite=reconstruction --json=reconstruction.json

takes a training step of `experiments.reconstruct` apart, on a clip of the package.

    python -m experiments.benchmark --suite=networks --json=networks.json
    python -m experiments.benchmark --suite=memory --json=memory.json

time the networks of the diffusion half beside diffusers, and tell what their programs hold.

    python -m experiments.benchmark --suite=data --clips=CLIPS --json=data.json

tells how many clips a second the training pipeline reads, by how they are stored.

    python -m experiments.benchmark --suite=training --json=training.json

tells what the training loop costs beside its steps: data, metrics, a checkpoint.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging

import d4d_jax
from d4d_jax.clips import read_clip
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.models.level import REMATS
from d4d_jax.models.variants import VARIANTS, expand
from experiments import cli
from experiments.benchmarks import (
    loading,
    measure,
    memory,
    networks,
    rasterizer,
    reconstruction,
    scenes,
    training,
)
from experiments.benchmarks.denoisers import PASSES, Shape
from experiments.configs import tiny
from gaussians.rasterize import available

#: Leaves device memory to the processes that measure it; lets threads that wait sleep, since they
#: would take the processor from whoever has the next turn (which slows torch down most of all).
_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_WAIT_POLICY": "PASSIVE"}

_N, _SIZES = (1_000, 10_000, 50_000), (256,)
_FULL_N, _FULL_SIZES = (*_N, 200_000), (256, 512, 1024)

_CLIP = pathlib.Path(d4d_jax.__file__).parent / "assets" / "clips" / "knight"
_WORDS, _FULL_WORDS = ("",), ("", "hexplane", "mcmc", "fast")

_FRAMES, _LATENTS, _PAPER = (24,), (32, 16), "videomv_t2v"


class Suite(NamedTuple):
    """What can be measured.

    run: Returns the rows and the text with their table.
    flags: Names of those that have a part in it, besides --json and --markdown.
    """

    run: Callable[[flags.FlagValues], tuple[list[Any], str]]
    flags: tuple[str, ...]


def main() -> None:
    """Runs the suite of the command line and writes its figures."""
    options = flags.FLAGS
    suite = SUITES[options.suite]
    foreign = {name for other in SUITES.values() for name in other.flags} - {*suite.flags}
    for name in sorted(foreign):
        if options[name].present:
            raise ValueError(f"--{name} has no part in --suite={options.suite}.")
    paths = [_writable(path) for path in (options.json, options.markdown) if path]
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    rows, text = suite.run(options)
    _replace(paths[0], json.dumps(rows, indent=1, allow_nan=False))
    for path in paths[1:]:
        _replace(path, text)
    print(text)


def run_rasterizer(options: flags.FlagValues) -> tuple[list[rasterizer.Row], str]:
    """The rows of the rasterizer suite, and their table with the machine and what is missing."""
    ours = [name for name in available() if name != "reference"]
    names = options.implementations or [*ours, *rasterizer.PEERS]
    rasterizer.check_names(names)
    rows: list[rasterizer.Row] = []
    missing: list[str] = []
    for size in map(int, options.sizes or (_FULL_SIZES if options.full else _SIZES)):
        for n in map(int, options.n or (_FULL_N if options.full else _N)):
            cell = rasterizer.run(
                names, options.scene, n, size, repeats=options.repeats, seconds=options.seconds
            )
            rows += cell.rows
            missing += [f"`{name}` did not run: {why}" for name, why in cell.failures.items()]
            differences = ", ".join(f"{k} {v:.1e}" for k, v in cell.differences.items())
            logging.info("%d splats, %d px; largest differences: %s.", n, size, differences)
    if not rows:
        raise ValueError(" ".join(["Nothing was measured.", *missing]))
    notes = "\n".join(f"- {line}" for line in dict.fromkeys(missing))
    about = f"{measure.machine()}; scene `{options.scene}`; x: times faster than"
    return rows, f"{about} `{rasterizer.BASELINE}`.\n\n{rasterizer.table(rows)}\n\n{notes}".strip()


def run_reconstruction(options: flags.FlagValues) -> tuple[list[reconstruction.Row], str]:
    """The rows of the reconstruction suite, and their tables with the machine and notes."""
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    words = options.words or (_FULL_WORDS if options.full else _WORDS)
    names = options.implementations or [None]
    rows: list[reconstruction.Row] = []
    notes: list[str] = []
    for size in map(int, options.sizes or _SIZES):
        clip = read_clip(options.clip, size=(size, size))
        logging.info("Compiling steps at %d px: a minute or more for a configuration.", size)
        measured, missing = reconstruction.run(
            clip, words, names, repeats=options.repeats, seconds=options.seconds
        )
        rows += measured
        notes += missing
    notes = [*reconstruction.notes(rows), *dict.fromkeys(notes)]
    about = f"{measure.machine()}; clip `{pathlib.Path(options.clip).name}`."
    lines = "\n".join(f"- {line}" for line in notes)
    return rows, f"{about}\n\n{reconstruction.tables(rows)}\n\n{lines}"


def run_networks(options: flags.FlagValues) -> tuple[list[networks.Row], str]:
    """The rows of the networks suite, and their tables with the machine and notes."""
    jax.config.update("jax_enable_compilation_cache", False)  # compilation is measured
    names = options.implementations or list(networks.IMPLEMENTATIONS)
    networks.check_names(names)
    parts, shapes = options.parts or networks.PARTS, _shapes(options, _LATENTS)
    rounds = {"repeats": options.repeats, "seconds": options.seconds}
    full = {name: expand({"variant": name}) for name in options.variants or [_PAPER]}
    rows: list[networks.Row] = []
    for part in ("reduced", "training"):
        if part in parts:
            rows += networks.reduced(names, shapes, part=part, **rounds)
    for name, fields in full.items():
        if "compilation" in parts:
            rows += networks.compilation(name, fields, shapes[0], half=True)
        if "full" in parts:
            chosen = {"fields": fields, "shape": shapes[0], "peak_tflops": options.peak_tflops}
            own = networks.full(names, **chosen, **rounds)
            rows += [{**row, "variant": name} for row in own]
    lines = "\n".join(f"- {line}" for line in networks.notes(rows))
    return rows, f"{measure.machine()}.\n\n{networks.tables(rows)}\n\n{lines}"


def run_memory(options: flags.FlagValues) -> tuple[list[memory.Row], str]:
    """The rows of the memory suite, and their table with the machine and notes."""
    rows = memory.run(
        options.variants or list(VARIANTS),
        _shapes(options, _LATENTS[:1]),
        dtypes=options.dtypes or memory.DTYPES,
        passes=options.passes or memory.PASSES,
        remats=options.remats or memory.REMATS,
    )
    lines = "\n".join(f"- {line}" for line in memory.notes(rows))
    return rows, f"{measure.machine()}.\n\n{memory.table(rows)}\n\n{lines}"


def run_data(options: flags.FlagValues) -> tuple[list[loading.Row], str]:
    """The rows of the data suite, and their table with the machine."""
    rows = loading.run(
        options.clips or [str(_CLIP.parent)],
        threads=options.threads,
        repeats=options.repeats,
        seconds=options.seconds,
    )
    about = f"{measure.machine()}; {options.threads} threads decode"
    return rows, f"{about}; x: times faster than {loading.BASELINE}.\n\n{loading.table(rows)}"


def run_training(options: flags.FlagValues) -> tuple[list[training.Row], str]:
    """The rows of the training suite, and their table with the machine."""
    config = json.loads(tiny.get_config(options.train_config).to_json())
    path, steps = (options.clips or [str(_CLIP.parent)])[0], options.steps
    config |= {"checkpoint_every": steps or config["checkpoint_every"]}
    source = ClipSource(path, size=config["data"]["size"])
    rows = training.run(config, source, repeats=options.repeats)
    about = f"{measure.machine()}; `tiny.py` on {rows[0]['clips']} clips"
    return (
        rows,
        f"{about}, a line of metrics every {rows[0]['log_every']} steps.\n\n{training.table(rows)}",
    )


def _shapes(options: flags.FlagValues, latents: Sequence[int]) -> list[Shape]:
    sizes = (options.frames or _FRAMES, options.latents or latents)
    return [Shape(int(t), int(n)) for t, n in itertools.product(*sizes)]


def _writable(path: str) -> pathlib.Path:
    """The path, whose folder is made if needed; raises OSError before anything is measured."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent} cannot be written to.")
    return target


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes through a temporary file, so that the file is the old or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _are_counts(values: list[str] | None) -> bool:
    return all(value.isdecimal() and int(value) > 0 for value in values or [])


_ROUNDS = ("implementations", "repeats", "seconds")

SUITES = {
    "rasterizer": Suite(run_rasterizer, ("n", "scene", "sizes", "full", *_ROUNDS)),
    "reconstruction": Suite(run_reconstruction, ("clip", "words", "sizes", "full", *_ROUNDS)),
    "networks": Suite(
        run_networks, ("parts", "variants", "frames", "latents", "peak_tflops", *_ROUNDS)
    ),
    "memory": Suite(run_memory, ("variants", "frames", "latents", "dtypes", "passes", "remats")),
    "data": Suite(run_data, ("clips", "threads", "repeats", "seconds")),
    "training": Suite(run_training, ("clips", "train_config", "steps", "repeats")),
}

if __name__ == "__main__":
    flags.DEFINE_enum("suite", None, list(SUITES), "What to measure.", required=True)
    flags.DEFINE_string("json", None, "File for the rows.", required=True)
    flags.DEFINE_string("markdown", None, "File for the table that is printed.")
    flags.DEFINE_list(
        "implementations",
        None,
        "Names; default: all but `reference`, and peers; of reconstructions: the fastest; of"
        " networks: all.",
    )
    flags.DEFINE_list("n", None, f"Numbers of splats; default: {_N}.")
    flags.DEFINE_list("sizes", None, f"Image sizes in pixels; default: {_SIZES}.")
    flags.DEFINE_bool(
        "full",
        False,
        f"Let n default to {_FULL_N} and sizes to {_FULL_SIZES}; of reconstructions: words to"
        f" {_FULL_WORDS}.",
    )
    flags.DEFINE_enum(
        "scene",
        "ball",
        list(scenes.RADII),
        "Ball of splats that fills the image, or one as large as an object.",
    )
    flags.DEFINE_multi_string(
        "words", None, "A configuration of experiments/configs/reconstruct.py; may be repeated."
    )
    flags.DEFINE_string("clip", str(_CLIP), "Folder of the clip, resized to the image sizes.")
    flags.DEFINE_multi_string("clips", None, "Folder of clips to load; default: the shipped ones.")
    flags.DEFINE_string("train_config", "", "Argument of experiments/configs/tiny.py.")
    flags.DEFINE_integer(
        "steps", None, "Steps to a checkpoint; default: the configuration's.", lower_bound=1
    )
    flags.DEFINE_integer("threads", 2, "That decode clips.", lower_bound=1)
    flags.DEFINE_integer(
        "repeats", 25, "Most rounds of turns that are timed together.", lower_bound=1
    )
    flags.DEFINE_float("seconds", 20.0, "Time after which no round starts.", lower_bound=0)
    flags.DEFINE_multi_enum("parts", None, networks.PARTS, "What of the networks; default: all.")
    flags.DEFINE_list(
        "variants", None, f"Networks at full size; default: {_PAPER}; of memory: all of them."
    )
    flags.DEFINE_list("frames", None, f"Numbers of frames; default: {_FRAMES}.")
    flags.DEFINE_list(
        "latents", None, f"Cells of the latents a side; default: {_LATENTS}; of memory: the first."
    )
    flags.DEFINE_float(
        "peak_tflops", None, "Of the device in bfloat16; default: known for some.", lower_bound=1
    )
    flags.DEFINE_multi_enum("dtypes", None, memory.DTYPES, "Of the computation; default: all.")
    flags.DEFINE_multi_enum("passes", None, PASSES, f"What is compiled; default: {memory.PASSES}.")
    flags.DEFINE_multi_enum(
        "remats", None, list(REMATS), f"What is recomputed in a step; default: {memory.REMATS}."
    )
    for name in ("n", "sizes", "frames", "latents"):
        flags.register_validator(name, _are_counts, "these must be whole numbers above 0")
    cli.run(main)
