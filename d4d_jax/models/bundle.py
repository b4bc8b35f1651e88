"""A trained model in one npz file: parameters, latent codec and configuration.

Layout: the entry `__config__` is JSON text; the entries `params/a/b/kernel` are the network's
float parameters as float16 (half the size; the rounding is far below the noise of sampling); the
entries `codec/...` keep their dtype. Plain numpy reads it; nothing is pickled.
"""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax.typing import PyTree

_CONFIG = "__config__"


def save_bundle(
    path: str | os.PathLike[str], params: PyTree, codec_params: PyTree, config: Mapping[str, Any]
) -> None:
    """Writes a bundle; a file that was there is replaced only when the new one is complete.

    Args:
        path: file to write; its folder is created.
        params: nested dicts (string keys without `/`) of the network's arrays.
        codec_params: the same for the latent codec; may be empty.
        config: what rebuilds network, codec and schedule; values as in JSON.

    Raises ValueError for a tree that is not nested dicts of arrays, or a value that float16
    cannot hold.
    """
    entries: dict[str, Any] = {_CONFIG: np.array(json.dumps(dict(config), sort_keys=True))}
    for name, array in _flatten(params, "params").items():
        entries[name] = _to_half(name, array)
    entries |= _flatten(codec_params, "codec")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **entries)
    os.replace(temporary, path)


def load_bundle(path: str | os.PathLike[str]) -> tuple[PyTree, PyTree, dict[str, Any]]:
    """Returns (params, codec_params, config) of a bundle, floating parameters as float32.

    Raises FileNotFoundError for a missing file, ValueError for one that is no bundle.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {path}.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            entries = {name: archive[name] for name in archive.files}
        config = json.loads(str(entries.pop(_CONFIG)))
    except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a model file of this project, or it is damaged ({error})."
        ) from error
    trees: dict[str, Any] = {"params": {}, "codec": {}}
    for name, array in entries.items():
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        *parents, leaf = name.split("/")
        node = trees
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(array)
    return trees["params"], trees["codec"], config


def _flatten(tree: PyTree, prefix: str) -> dict[str, np.ndarray]:
    if not isinstance(tree, Mapping):
        if not isinstance(tree, np.ndarray | np.generic | jax.Array):
            raise ValueError(f"A bundle holds nested dicts of arrays, but {prefix} is {tree!r}.")
        return {prefix: np.asarray(tree)}
    entries = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f"A bundle needs string keys without '/', but {prefix} has {key!r}.")
        entries |= _flatten(value, f"{prefix}/{key}")
    return entries


def _to_half(name: str, array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.floating):
        return array
    if not np.all(np.abs(array) < np.finfo(np.float16).max):  # False for NaN as well
        raise ValueError(f"{name} has values that float16 cannot hold; the model is not usable.")
    return array.astype(np.float16)
