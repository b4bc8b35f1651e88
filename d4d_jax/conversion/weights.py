"""Loads, saves and converts weights of a named format."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from flax import linen as nn

from d4d_jax.conversion import files, formats
from d4d_jax.conversion.formats import OWN, find_format, find_network
from d4d_jax.conversion.matching import (
    Arrays,
    Report,
    flatten,
    nest,
    shapes_of,
    to_foreign,
    to_ours,
)
from d4d_jax.conversion.rules import Table
from d4d_jax.typing import PyTree

Path = str | os.PathLike[str]

_TORCH_ENDINGS = (".pth", ".ckpt", ".pt", ".bin")


def load(
    path: Path,
    format: str = OWN,
    *,
    network: nn.Module | None = None,
    allow_new: Sequence[str] = (),
    seed: int = 0,
) -> PyTree:
    """Parameters of a network, nested and float32, from a file or folder of weights.

    Args:
        path: a .safetensors, .pth, .ckpt or .bin file; a folder of diffusers or transformers; or
            what `save` has written.
        format: name in `FORMATS`, or "d4d".
        network: the module that the parameters are for. When None, that of the published weights
            ("d4d": whatever the file holds).
        allow_new: regular expressions of our paths, such as "motion_embedding": these parameters
            may be missing in the file and get their initial values.
        seed: of these initial values.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: weights that do not fit the network, all of them in one error.
        ValueError: an unknown format, a damaged file, or a pickle that is more than data.
    """
    network = network or find_network(format)
    state = files.read(path, find_format(format).subfolder)
    arrays, report = _incoming(state, format, network, allow_new, seed, str(path))
    logging.info("%s: %s.", path, report)
    return nest(dict(arrays))


def save(
    path: Path,
    params: PyTree,
    format: str = OWN,
    *,
    network: nn.Module | None = None,
    drop: Sequence[str] = (),
    overwrite: bool = False,
) -> Report:
    """Writes parameters, for this library or for another.

    Args:
        path: a .safetensors file; a .pth, .ckpt, .pt or .bin file, which needs torch; or a folder,
            without an ending: an Orbax checkpoint, or for diffusers and transformers what
            `from_pretrained` reads.
        params: nested dicts of arrays.
        format: name in `FORMATS`, or "d4d".
        network: the module of the parameters, which have to be complete, and which a folder's
            configuration file describes. When None, that of the published weights ("d4d": any).
        drop: regular expressions of our paths, such as "motion_embedding", that are left out.
        overwrite: whether to replace what is there.

    Raises:
        FileExistsError: `path` is there and `overwrite` is not set.
        ConversionError: parameters that the format has no name for, all of them in one error.
        ValueError: an unknown format or ending.
        ImportError: a file of torch without torch.
    """
    _check_target(path, format, overwrite)
    network = network or find_network(format)
    arrays, report = _outgoing(flatten(params), format, network, drop, "The parameters")
    _write(path, arrays, format, network, {}, overwrite)
    return report


def convert(
    state: Mapping[str, Any],
    table: Table | str,
    template: nn.Module | PyTree,
    *,
    allow_new: Sequence[str] = (),
) -> PyTree:
    """Nested parameters from a foreign state dict that is in memory.

    Args:
        state: arrays by foreign name; tensors of torch as `tensor.numpy()`.
        table: names and layouts, or a name in `FORMATS`.
        template: the network, or nested arrays or shapes (`jax.eval_shape`) of its parameters.
        allow_new: regular expressions of our paths that `state` may lack; the arrays of a template
            of arrays are taken there.

    Raises:
        ConversionError: everything that does not fit, in one error.
        ValueError: an unknown format.
    """
    module = isinstance(template, nn.Module)
    leaves = formats.template(template) if module else flatten(template)
    arrays, _ = to_ours(state, _table(table, leaves), leaves, allow_new=allow_new)
    return nest(dict(arrays))


def export(
    params: PyTree, table: Table | str, *, drop: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """A foreign state dict, in memory, of nested parameters.

    Args:
        params: nested arrays.
        table: names and layouts, or a name in `FORMATS`.
        drop: regular expressions of our paths that are left out.

    Raises:
        ConversionError: parameters that the format has no name for.
        ValueError: an unknown format.
    """
    leaves = flatten(params)
    return dict(to_foreign(leaves, _table(table, leaves), drop=drop)[0])


def convert_file(
    source: Path | PyTree,
    target: Path | None,
    *,
    format: str = OWN,
    to: str = OWN,
    variant: str | None = None,
    allow_new: Sequence[str] = (),
    drop: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Report, Report]:
    """Converts weights from one format to another, tensor by tensor.

    Args:
        source: a file or folder as in `load`, or nested parameters of ours.
        target: a file or folder as in `save`; None checks everything and writes nothing.
        format: that of the source.
        to: that of the target.
        variant: of the network; when None, the variant that a file of ours names, or that of the
            published weights.
        allow_new, seed: as in `load`.
        drop, overwrite: as in `save`.

    Returns:
        What was read and what was written.

    Raises:
        ConversionError, FileExistsError, FileNotFoundError, ImportError, ValueError: as `load` and
            `save`, before anything is written; a variant is given and both formats are ours.
    """
    if target is not None:
        _check_target(target, to, overwrite)
    remarks: dict[str, str] = {}
    if isinstance(source, Mapping):
        named, state = "the parameters", flatten(source)
    else:
        named, state = str(source), files.read(source, find_format(format).subfolder)
        remarks = files.read_metadata(source) if format == OWN else {}
    if variant and format == to == OWN:
        raise ValueError(
            f"The variant {variant!r} has no meaning from {OWN} to {OWN}: these files may hold any"
            " network."
        )
    variant = variant or remarks.get("variant")
    ours, incoming = _incoming(state, format, find_network(format, variant), allow_new, seed, named)
    network = find_network(to, variant)
    arrays, outgoing = _outgoing(ours, to, network, drop, named)
    if target is not None:
        if format != OWN:
            kind = find_format(format)
            remarks = {"network": kind.network, "variant": variant or kind.variant}
            remarks |= {"source": pathlib.Path(named).name, "source_format": format}
        _write(target, arrays, to, network, remarks, overwrite)
    return incoming, outgoing


def _incoming(
    state: Mapping[str, Any],
    format: str,
    network: nn.Module | None,
    allow_new: Sequence[str],
    seed: int,
    source: str,
) -> tuple[Arrays, Report]:
    """Our leaves of foreign arrays; new ones get the network's initial values."""
    shapes = shapes_of(formats.template(network) if network is not None else state)
    leaves: dict[str, Any] = {
        path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()
    }
    table = _table(format, leaves)
    arrays, report = to_ours(state, table, leaves, allow_new=allow_new, source=source)
    if network is not None and report.new:
        leaves |= formats.initial_leaves(network, report.new, seed)  # where `arrays` finds them
    return arrays, report


def _outgoing(
    leaves: Mapping[str, Any],
    format: str,
    network: nn.Module | None,
    drop: Sequence[str],
    source: str,
) -> tuple[Arrays, Report]:
    """Foreign arrays of our leaves, which have to be all that the network has."""
    template = formats.template(network) if network is not None else None
    table = _table(format, leaves)
    return to_foreign(leaves, table, template=template, drop=drop, source=source)


def _table(table: Table | str, paths: Iterable[str]) -> Table:
    return table if isinstance(table, Table) else find_format(table).table(paths)


def _outputs(path: Path, format: str) -> list[pathlib.Path]:
    """The files, or the folder, that are going to be written.

    Raises:
        ValueError: the ending is unknown, or the format has no folders.
    """
    path = pathlib.Path(path)
    if path.suffix in (".safetensors", *_TORCH_ENDINGS):
        return [path]
    kind = find_format(format)
    if format == OWN and not path.suffix:
        return [path]
    if kind.filename and not path.suffix:
        return [path / kind.filename, path / "config.json"]
    folder = ", or a folder" if format == OWN or kind.filename else ""
    raise ValueError(
        f"{path} has none of the endings .safetensors, {', '.join(_TORCH_ENDINGS)}{folder}."
    )


def _check_target(path: Path, format: str, overwrite: bool) -> None:
    for output in _outputs(path, format):
        if output.exists() and not overwrite:
            raise FileExistsError(f"{output} exists: choose another target, or pass overwrite.")


def _write(
    path: Path,
    arrays: Arrays,
    format: str,
    network: nn.Module | None,
    remarks: Mapping[str, str],
    overwrite: bool,
) -> None:
    kind = find_format(format)
    first, *config = _outputs(path, format)
    metadata = {"format": OWN, **remarks} if format == OWN else {"format": "pt"}
    if first.suffix == ".safetensors":
        files.write_safetensors(first, arrays, metadata)
    elif first.suffix:
        files.write_torch(first, arrays)
    else:
        files.write_orbax(first, arrays, overwrite=overwrite)
    if config and kind.config is not None:
        with files.replacing(config[0]) as partial:
            partial.write_text(json.dumps(kind.config(network), indent=2) + "\n", encoding="utf-8")
