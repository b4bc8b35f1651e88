"""A whole asset in one NumPy archive: splats, field, parameters, background, facts of the run."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from d4d_jax import registry
from d4d_jax.typing import PyTree
from gaussians.asset import Asset
from gaussians.deformation import Deformation, build
from gaussians.io.files import DAMAGE, replace_file
from gaussians.types import Splats

_FORMAT = "d4d_jax gaussians 1"


def save_asset(path: str | os.PathLike, asset: Asset) -> None:
    """Writes an asset as one NumPy archive: arrays, and a JSON text that says how they belong.

    Raises:
        ValueError: the metadata cannot be written as JSON, or the field's parameters are not arrays
            in dicts with text keys, lists and tuples.
    """
    arrays: dict[str, np.ndarray] = {}
    description = {
        "format": _FORMAT,
        "splats": _describe(dict(vars(asset.splats)), "splats", arrays),
        "params": _describe(asset.params, "params", arrays),
        "deformation": _spec_of(asset.deformation),
        "background": [float(value) for value in asset.background],
        "meta": dict(asset.meta),
    }
    try:
        text = json.dumps(description)
    except TypeError as error:
        raise ValueError(f"The asset's metadata do not fit into JSON: {error}.") from None
    arrays["json"] = np.array(text)
    replace_file(path, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore


def load_asset(path: str | os.PathLike, *, deformation: Deformation | None = None) -> Asset:
    """Reads what `save_asset` wrote. Nothing in the file is executed.

    Args:
        path: of the archive.
        deformation: the field, for a file whose field is not one of the library's own (such as one
            built from "my.module:MyField"); by default it is built as the file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such an archive, is cut off, names a field from elsewhere, or
            one that this version of the library builds differently.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        description = json.loads(str(arrays["json"]))
        if description["format"] != _FORMAT:
            raise ValueError(f"its format is {description['format']!r}, not {_FORMAT!r}")
        splats = Splats(**_rebuild(description["splats"], arrays))
        params = _rebuild(description["params"], arrays)
        spec, meta = description["deformation"], description["meta"]
        background = tuple(description["background"])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no asset {path}.") from None
    except DAMAGE as error:
        raise ValueError(f"{path} is not a complete asset file: {error}.") from error
    if deformation is None:
        deformation = _build_own(spec, path)
    return Asset(splats, deformation, params, background, meta)


def _describe(tree: PyTree, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Files the arrays of a tree under `name/...`; returns the tree's shape as JSON values."""
    if tree is None:
        return {"none": True}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) and "/" not in key for key in tree):
            raise ValueError(f"The keys of {name} must be text without '/'; got {list(tree)}.")
        return {"dict": {k: _describe(v, f"{name}/{k}", arrays) for k, v in tree.items()}}
    if type(tree) in (list, tuple):
        kind = type(tree).__name__
        return {kind: [_describe(v, f"{name}/{i}", arrays) for i, v in enumerate(tree)]}
    values = np.asarray(tree)
    kind, dtype = values.dtype.kind, values.dtype.name
    if kind not in "biufc":
        # NumPy's format has no name for JAX's own floats, such as bfloat16: their bits are stored.
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"{name} is a {type(tree).__name__}; an asset file holds arrays in dicts, lists and"
                " tuples."
            )
        values = values.view(f"u{values.dtype.itemsize}")
    arrays[name] = values
    return {"array": name, "dtype": dtype}


def _rebuild(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PyTree:
    ((kind, content),) = [item for item in description.items() if item[0] != "dtype"]
    if kind == "none":
        return None
    if kind == "dict":
        return {key: _rebuild(value, arrays) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [_rebuild(value, arrays) for value in content]
        return values if kind == "list" else tuple(values)
    values, dtype = arrays[content], description["dtype"]
    return jnp.asarray(values if values.dtype.name == dtype else values.view(jnp.dtype(dtype)))


def _spec_of(field: Any) -> dict[str, Any]:
    """What `gaussians.deformation.build` needs to make this field again."""
    kind = type(field)
    name = f"{kind.__module__}:{kind.__qualname__}"
    for known in registry.names("deformation"):
        if registry.lookup("deformation", known) is kind:
            name = known
    sizes = {}
    if dataclasses.is_dataclass(field):
        for part in dataclasses.fields(field):
            value = getattr(field, part.name)
            sizes[part.name] = _spec_of(value) if dataclasses.is_dataclass(value) else value
    return {"name": name, **sizes}


def _build_own(spec: Mapping[str, Any], path: Path) -> Deformation:
    """Builds a registered field only: a file must not choose which code is imported."""

    def checked(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(checked(item) for item in value)  # JSON has no tuples
        if not isinstance(value, Mapping):
            return value
        if ":" in str(value.get("name", "")):
            raise ValueError(
                f"{path} was made with the deformation field {value['name']}, which is not part of"
                " the library; build it and pass it as `deformation`."
            )
        return {key: checked(item) for key, item in value.items()}

    arguments = checked(spec)
    try:
        return build(arguments)
    except ValueError as error:
        raise ValueError(f"The field of {path} cannot be built here: {error}") from error
