"""The memory suite: what programs of the networks hold, from XLA's analysis; nothing is run."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import expand
from d4d_jax.typing import PyTree
from experiments.benchmarks import denoisers, measure
from experiments.benchmarks.denoisers import NAMES, Shape
from experiments.benchmarks.tables import markdown, number

DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "step")  # unless others are named
REMATS = ("none", "blocks")

#: Of the CPU's compiler: buffers are assigned before these would take most of the time.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_GRADIENTS = ("forward_backward", "step")

Row = dict[str, Any]


def run(
    variants: Sequence[str],
    shapes: Sequence[Shape],
    *,
    dtypes: Sequence[str] = DTYPES,
    passes: Sequence[str] = PASSES,
    remats: Sequence[str] = REMATS,
    batch: int = 1,
) -> list[Row]:
    """A row for each variant, shape, dtype and pass, and for each way to recompute in a step.

    Parameters and inputs are shapes only, so that a network need not fit where this runs; it is
    compiled for jax's device.

    Args:
        variants: names in `d4d_jax.models.variants.VARIANTS`.
        shapes: of the latents of one clip.
        dtypes: what the networks compute in; parameters are float32.
        passes: of `denoisers.PASSES`.
        remats: values of the network's `remat`; a forward pass has nothing to recompute.
        batch: clips.

    Raises:
        ValueError: there is no such variant.
    """
    networks = {name: expand({"variant": name}) for name in variants}
    rows = []
    for (name, fields), shape, dtype, each in itertools.product(
        networks.items(), shapes, dtypes, passes
    ):
        for remat in ("none",) if each not in _GRADIENTS else remats:
            chosen = fields | {"remat": remat, "dtype": getattr(jnp, dtype)}
            row = analyse(chosen, shape, each, batch=batch)
            rows.append({"variant": name, "dtype": dtype, "remat": remat, **row})
            where = f"{name}, {each}, {dtype}, remat {remat}"
            logging.info("%s: %.0f MB, %.0f s.", where, row["program_mb"] or 0, row["compile_s"])
    return rows


def analyse(fields: Mapping[str, Any], shape: Shape, name: str, *, batch: int = 1) -> Row:
    """Compiles one pass of a network for shapes and returns its figures, in MB and seconds.

    Args:
        fields: of the network.
        shape: of the latents.
        name: of the pass.
        batch: clips.

    Returns:
        "arguments_mb" (parameters, the state of the optimizer, inputs), "temporaries_mb" (what is
        held besides arguments and results at the fullest moment; a step's gradients are in it),
        "program_mb" (all together). None where the platform does not say. "saved_mb" is that of
        `saved_mb`, None for a pass without a gradient.
    """
    network = SpatioTemporalUNet(**fields)
    params = denoisers.abstract_params(network, shape)
    given = denoisers.example(network, shape, batch)
    function, arguments = denoisers.program(name, network, params, given)
    options = _FAST if jax.default_backend() == "cpu" else None
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile(compiler_options=options)
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return {
        "parameters": parameters,
        "pass": name,
        "frames": shape.frames,
        "latents": shape.latents,
        "batch": batch,
        "platform": jax.default_backend(),
        "arguments_mb": None if sizes is None else sizes.argument_size_in_bytes / 1e6,
        "temporaries_mb": None if sizes is None else sizes.temp_size_in_bytes / 1e6,
        "program_mb": measure.program_mb(compiled),
        "saved_mb": saved_mb(network, params, given) if name in _GRADIENTS else None,
        "compile_s": round(seconds, 4),
    }


def saved_mb(network: SpatioTemporalUNet, params: PyTree, given: denoisers.Example) -> float:
    """MB that a forward pass saves for the backward pass, as it is written: no compiler is asked.

    Parameters and inputs are not counted, and neither is what a compiler would fuse away or add.

    Args:
        network: whose `remat` decides what is saved.
        params: its parameters, or their shapes.
        given: its inputs, or their shapes.
    """

    def residuals(params: PyTree, *inputs: Any) -> list[Any]:
        _, pullback = jax.vjp(lambda params: network.apply({"params": params}, *inputs), params)
        return jax.tree.leaves(pullback)

    program = jax.make_jaxpr(residuals)(params, *given).jaxpr
    saved = {x for x in program.outvars if not hasattr(x, "val")} - {*program.invars}
    return sum(x.aval.size * x.aval.dtype.itemsize for x in saved) / 1e6


def table(rows: Sequence[Row]) -> str:
    """A markdown table of rows."""
    headings = ["network", "parameters", "clips x latents", "pass", "dtype", "remat"]
    headings += ["saved (MB)", "temporaries (MB)", "arguments (MB)", "program (MB)", "compile (s)"]
    figures = ("saved_mb", "temporaries_mb", "arguments_mb", "program_mb", "compile_s")
    cells = [
        [
            f"`{row['variant']}`",
            f"{row['parameters']:,}",
            f"{row['batch']} x {row['frames']} x {row['latents']}²",
            NAMES[row["pass"]],
            row["dtype"],
            row["remat"],
            *(number(row[key]) for key in figures),
        ]
        for row in rows
    ]
    return markdown(headings, cells, left=6)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the figures mean, and what those of a CPU leave out."""
    lines = [
        "From XLA's analysis of the compiled program; nothing was run. `temporaries`: activations"
        " and, in a training step, gradients (4 bytes a parameter). `arguments`: parameters, in a"
        " step with AdamW's state and the moving average (16 bytes a parameter together). `saved`:"
        " what the forward pass keeps for the backward pass as it is written, before compilation.",
    ]
    if any(row["platform"] == "cpu" for row in rows):
        lines.append(
            "Compiled for the CPU: attention weights of short sequences are written out, and"
            " bfloat16 products are computed in float32. There `remat` hardly changes the"
            " temporaries, whatever it computes again: `saved` tells what it does."
        )
    return lines
