"""Checkpoints of a training run: the state, the data iterator and the configuration, by Orbax.

A checkpoint is written into a temporary folder that is renamed when complete, so a run killed in
the middle of a save continues from the one before.
"""

import base64
import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from d4d_jax.train import sharding
from d4d_jax.train.state import TrainState
from d4d_jax.typing import PyTree

#: What reading a file that is cut short, changed or missing raises, in Orbax and below it.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, FileNotFoundError)
#: TensorStore raises ValueError for everything; these words in it speak of the machine.
_NOT_DAMAGE = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


@runtime_checkable
class DataIterator(Protocol):
    """An endless iterator over batches that can tell and take its position (grain's can)."""

    def __next__(self) -> PyTree: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Checkpointer:
    """Saves and restores the checkpoints `DIRECTORY/STEP`.

    A checkpoint has four items: `model` (the parameter average and the frozen arrays: all that
    sampling needs), `state` (the rest of the TrainState), `data` and `config` (both JSON).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        keep_best: int = 0,
        metric: str = "val_denoising",
    ):
        """Opens the folder, creating it when missing.

        Args:
            directory: folder of the checkpoints.
            keep: number of newest checkpoints that stay on disk.
            keep_best: number of further ones that stay, those with the least `metric`.
            metric: name of the metric.

        Raises:
            ValueError: `keep` is below 1 or `keep_best` below 0.
            OSError: the folder cannot be made.
        """
        if keep < 1 or keep_best < 0:
            raise ValueError(
                f"A run keeps at least its newest checkpoint, not keep={keep}, keep_best="
                f"{keep_best}."
            )
        policies: list[preservation.PreservationPolicy] = [preservation.LatestN(keep)]
        if keep_best:
            best = preservation.BestN(
                get_metric_fn=lambda metrics: -metrics.get(metric, float("inf")),
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best)
        self.directory = pathlib.Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(policies)
            ),
            item_handlers={
                "model": ocp.StandardCheckpointHandler(),
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        data: DataIterator,
        config: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write the checkpoint of `state.step`; disk work goes on in the background.

        The arrays are copied before this returns, so the state may be donated afterwards. A
        step that is already on disk is left as it is.

        Args:
            state: state to save.
            data: iterator whose position is saved with it.
            config: what the run was configured with, in values that JSON has.
            metrics: by which the best checkpoints are found; None if there are none yet.

        Raises:
            OSError: this one, or the one before it, cannot be written, for example since the disk
                is full. The complete ones stay.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        model, rest = _split(state)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            state=ocp.args.StandardSave(rest),
            data=ocp.args.JsonSave(_encode_position(data.get_state())),
            config=ocp.args.JsonSave(dict(config)),
        )
        with self._writing(step):
            self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None)

    def restore(
        self, template: TrainState, data: DataIterator, step: int | None = None
    ) -> TrainState:
        """Returns the saved state and moves `data` to where it stood, both exactly as saved.

        Args:
            template: a state of the same structure; the result takes its shardings, so a
                checkpoint may be restored on other devices than it was written on.
            data: iterator over the same data.
            step: checkpoint to read; the newest when None.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: its files are damaged, or it does not fit the template.
            OSError, MemoryError, RuntimeError: the machine could not read it, for example for
                lack of permission or memory; the files may well be sound.
        """
        step = self._existing(step)
        trees = dict(zip(("model", "state"), _split(template), strict=True))
        for item, tree in trees.items():
            self._check_fit(step, item, tree)
        arguments: dict[str, Any] = {
            item: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
            for item, tree in trees.items()
        }
        saved = self._read(step, data=ocp.args.JsonRestore(), **arguments)
        data.set_state(_decode_position(saved["data"]))
        return TrainState(**saved["state"], **saved["model"])

    def restore_config(self, step: int | None = None) -> dict[str, Any]:
        """Returns the configuration saved with a checkpoint.

        Raises:
            FileNotFoundError, ValueError, OSError: as `restore`.
        """
        return self._read(self._existing(step), config=ocp.args.JsonRestore())["config"]

    def restore_model(self, step: int | None = None) -> tuple[PyTree, PyTree]:
        """Returns (averaged parameters, frozen arrays) on the default device, for sampling.

        Needs no template.

        Raises:
            FileNotFoundError, ValueError, OSError, MemoryError, RuntimeError: as `restore`.
        """
        step = self._existing(step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if jax.process_count() > 1:  # they read together, every one all of it
            device = sharding.replicated(sharding.make_mesh())
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            self._metadata(step, "model"),
        )
        saved = self._read(step, model=ocp.args.StandardRestore(shapes))["model"]
        return sharding.local_copy((saved["ema"], saved["frozen"]))

    def wait(self) -> None:
        """Blocks until started saves are complete; raises OSError as `save`."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Completes started saves and closes the folder; raises OSError as `save`."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self, step: int | None = None) -> Iterator[None]:
        """Turns what Orbax raises when it cannot write into one sentence."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            newest = self.latest_step()
            left = "there is no complete one" if newest is None else f"the newest there is {newest}"
            which = "A checkpoint" if step is None else f"The checkpoint of step {step}"
            raise OSError(
                f"{which} cannot be written to {self.directory} ({_reason(error)}): {left}."
            ) from error

    def _existing(self, step: int | None) -> int:
        self.wait()  # a save under way counts
        wanted = "" if step is None else f" of step {step}"
        if step is None:
            step = self.latest_step()
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"There is no checkpoint{wanted} in {self.directory}.")
        return step

    def _metadata(self, step: int, item: str) -> PyTree:
        with self._explained(step):
            return self._manager.item_metadata(step)[item].tree

    def _read(self, step: int, **items: Any) -> Any:
        with self._explained(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns what Orbax raises on damaged or missing files into one sentence.

        Errors of the machine pass: they say nothing about the files.
        """
        try:
            yield
        except _DAMAGE as error:
            folder = self.directory / str(step)
            reason = _reason(error)
            earlier = [number for number in self._manager.all_steps() if number < step]
            way = f"continue from step {max(earlier)}" if earlier else "start anew"
            if any(word in str(error) for word in _NOT_DAMAGE):
                raise OSError(f"The checkpoint {folder} cannot be read now ({reason}).") from error
            raise ValueError(
                f"The checkpoint {folder} cannot be read ({reason}): delete that folder to {way}."
            ) from error

    def _check_fit(self, step: int, item: str, template: PyTree) -> None:
        saved, wanted = _shapes(self._metadata(step, item)), _shapes(template)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"The checkpoint {self.directory / str(step)} does not fit this "
                    f"configuration: {item}/{name} has shape {saved.get(name, 'none')} there and "
                    f"{wanted.get(name, 'none')} here; use the run's own configuration or another "
                    "workdir."
                )


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160] or type(error).__name__


def _split(state: TrainState) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    model = {"ema": state.ema, "frozen": state.frozen}
    rest = {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "key": state.key,
    }
    return model, rest


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Returns {"a/b/0": shape}, the same for a tree and for Orbax's record of it.

    Typed random keys are left out: Orbax records them as the integers that they consist of.
    """
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [getattr(k, "name", getattr(k, "key", getattr(k, "idx", k))) for k in path]
        if names[-1] != "key":
            shapes["/".join(map(str, names))] = tuple(leaf.shape)
    return shapes


def _encode_position(position: Any) -> dict[str, Any]:
    if isinstance(position, bytes):  # grain's DataLoader; its datasets give plain dicts
        return {"base64": base64.b64encode(position).decode("ascii")}
    return {"json": position}


def _decode_position(saved: Mapping[str, Any]) -> Any:
    return base64.b64decode(saved["base64"]) if "base64" in saved else saved["json"]
