"""Snapshots of a running reconstruction: it stops at any step and goes on later, bit for bit."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax.metrics import Lpips
from d4d_jax.typing import PyTree
from gaussians.captures import Capture
from gaussians.io.files import DAMAGE, replace_file

_FORMAT = "d4d_jax reconstruction snapshot 1"


class Interrupted(Exception):
    """A run was stopped on request; its snapshot is saved."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A reconstruction between two steps.

    Attributes:
        run: `digest` of what the run was started with.
        steps: how many are done.
        pairs: capacity of the rasterizer's pair list.
        arrays: the leaves of the `TrainState` by their paths.
    """

    run: str
    steps: int
    pairs: int
    arrays: Mapping[str, np.ndarray]


@runtime_checkable
class Keeper(Protocol):
    """Looks after a run: where its snapshots go, and when it has to stop.

    Attributes:
        every: steps between two snapshots.
    """

    every: int

    def load(self) -> Snapshot | None:
        """The snapshot to go on from; None starts anew."""
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Takes a snapshot, replacing the one before."""
        ...

    def stops(self) -> bool:
        """Whether the run should end after this step."""
        ...


@dataclasses.dataclass(frozen=True)
class FileKeeper:
    """Keeps the newest snapshot in a file.

    Attributes:
        path: of the file; a run goes on from it when it is there.
        every: steps between two snapshots.
        stops: asked after every step.
    """

    path: str | os.PathLike
    every: int = 500
    stops: Callable[[], bool] = lambda: False

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"There must be at least 1 step between snapshots; got {self.every}.")

    def load(self) -> Snapshot | None:
        """The snapshot in the file, or None without a file.

        Raises:
            ValueError: the file is cut off or no snapshot.
        """
        path = Path(self.path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            facts = json.loads(str(arrays.pop("json")))
            if facts.pop("format") != _FORMAT:
                raise ValueError("its format is another one")
            return Snapshot(**facts, arrays=arrays)
        except FileNotFoundError:
            return None
        except DAMAGE as error:
            raise ValueError(
                f"{path} is not a complete snapshot ({error}); remove it to start anew."
            ) from error

    def save(self, snapshot: Snapshot) -> None:
        """Replaces the file; a kill in the middle leaves the one before."""
        facts = {name: getattr(snapshot, name) for name in ("run", "steps", "pairs")}
        text = np.array(json.dumps({"format": _FORMAT, **facts}))
        arrays: dict[str, Any] = {"json": text, **snapshot.arrays}
        replace_file(self.path, lambda file: np.savez(file, **arrays))

    def discard(self) -> None:
        """Removes the file, once the run is complete."""
        Path(self.path).unlink(missing_ok=True)


def digest(capture: Capture, config: Any, key: jax.Array, perceptual: Lpips | None = None) -> str:
    """A name for a run: equal for equal frames to fit, cameras, configuration, key and network."""
    found = hashlib.sha256(repr((config, capture.background)).encode())
    fitted = capture.moving, capture.still
    for leaf in jax.tree.leaves((fitted, jax.random.key_data(key), perceptual)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def flatten(state: PyTree) -> dict[str, np.ndarray]:
    """The leaves of a state on the host, by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.array(leaf) for path, leaf in leaves}


def restore(like: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    """The inverse of `flatten`, for a state of the structure of `like`.

    Raises:
        ValueError: the arrays are those of another structure.
    """
    names = flatten(like)
    if {k: (v.shape, v.dtype) for k, v in names.items()} != {
        k: (v.shape, v.dtype) for k, v in arrays.items()
    }:
        raise ValueError("The snapshot was made by another version of the library; start anew.")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(arrays[jax.tree_util.keystr(path)]), like
    )
