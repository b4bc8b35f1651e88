"""The training suite: what the loop costs beside its steps."""

import functools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from d4d_jax.data.pipeline import ClipSource
from d4d_jax.train import loop, sharding, writers
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.state import TrainState
from d4d_jax.train.step import make_train_step
from experiments import build, inputs
from experiments.benchmarks.measure import Spread
from experiments.benchmarks.tables import markdown, number

Row = dict[str, Any]

#: In the order of the table.
_COLUMNS = ("bare_ms", "loop_ms", "overhead", "input_wait")


def run(config: Mapping[str, Any], source: ClipSource, *, repeats: int) -> list[Row]:
    """Times `loop.train` over the distance of a checkpoint, and as many bare calls of its step.

    Both go on with the same compiled step, by turns. The loop reads the clips, writes its metrics
    and, at the end, a checkpoint; the bare calls have one batch that lies on the device already.

    Args:
        config: of `experiments.train`; `log_every` and `checkpoint_every` are what is measured.
        source: the clips.
        repeats: rounds.

    Returns:
        One row: quartiles of the milliseconds of a step, of the share by which the loop's are
        longer, and of the share of the loop's time that it waited for data.
    """
    state, step_fn, data, mesh = _parts(config, source)
    batch = sharding.place_batch(next(data), mesh, sharding.BATCH_RULES)
    with jax.set_mesh(mesh):
        step_fn = step_fn.lower(state, batch).compile()
    steps = config["checkpoint_every"]
    found: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for _ in range(repeats):
        state, bare = _bare(step_fn, state, batch, steps)
        state, looped, waited = _looped(step_fn, state, data, config, mesh)
        for name, value in zip(
            _COLUMNS,
            (1e3 * bare / steps, 1e3 * looped / steps, looped / bare - 1, waited),
            strict=True,
        ):
            found[name].append(value)
    spreads = {name: [round(x, 4) for x in Spread.of(found[name])] for name in _COLUMNS}
    sizes = {"clips": len(source), "batch_size": config["batch_size"], "steps": steps}
    return [{**sizes, "log_every": config["log_every"], "rounds": repeats, **spreads}]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    headings = ["steps", "rounds", "bare step (ms)", "in the loop (ms)", "longer by", "input wait"]
    lines = []
    for row in rows:
        spreads = [[row[name][i] for i in (1, 0, 2)] for name in _COLUMNS]
        times = [f"{number(m)} [{number(a)}, {number(b)}]" for m, a, b in spreads[:2]]
        shares = [f"{m:.1%} [{a:.1%}, {b:.1%}]" for m, a, b in spreads[2:]]
        lines.append([str(row["steps"]), str(row["rounds"]), *times, *shares])
    return markdown(headings, lines, left=0)


def _parts(config: Mapping[str, Any], source: ClipSource) -> tuple[TrainState, Any, Iterator, Any]:
    """What `experiments.train` gives its loop."""
    config = dict(config)
    mesh = sharding.make_mesh(config["mesh"]["data"] or None, config["mesh"]["fsdp"])
    codec = build.build_codec(config)
    codec_params, batch = build.fit_codec(codec, source), inputs.example_batch(source)
    network = build.build_network(config, build.latent_channels(codec, codec_params, batch))
    objective = build.build_objective(config, network, codec, build.build_schedule(config))
    state = build.init_state(config, objective, codec_params, batch, mesh)
    step_fn = make_train_step(
        build.build_loss(config, objective),
        build.build_optimizer(config),
        ema_decay=config["ema_decay"],
        rate=build.build_rate(config),
        out_shardings=sharding.shardings(state, mesh, sharding.STATE_RULES),
    )
    return state, step_fn, iter(inputs.build_dataset(config, source)), mesh


def _bare(step_fn: Any, state: TrainState, batch: Any, steps: int) -> tuple[TrainState, float]:
    start = time.perf_counter()
    for _ in range(steps):
        state, _ = step_fn(state, batch)
    jax.block_until_ready(state)
    return state, time.perf_counter() - start


def _looped(
    step_fn: Any, state: TrainState, data: Iterator, config: Mapping[str, Any], mesh: Any
) -> tuple[TrainState, float, float]:
    """The state, the seconds of the whole call, and the share of them that was spent on input."""
    first = int(state.step)
    names = ("log_every", "checkpoint_every", "max_skipped")
    options = loop.LoopOptions(
        **{name: config[name] for name in names},
        num_steps=first + config["checkpoint_every"],
    )
    waits = _Waits(data)
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(Path(folder) / "checkpoints")
        writer = writers.default_writer(folder, restored_step=first)
        start = time.perf_counter()
        state = loop.train(
            state,
            functools.partial(step_fn),  # compiled already
            waits,
            options,
            mesh=mesh,
            checkpointer=checkpointer,
            writer=writer,
            config=config,
        )
        jax.block_until_ready(state)
        taken = time.perf_counter() - start
        writer.close()
        checkpointer.close()
    return state, taken, waits.seconds / taken


class _Waits:
    """A data iterator that counts the seconds that its user waits for it."""

    def __init__(self, data: Any):
        self._data, self.seconds = data, 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self._data)
        self.seconds += time.perf_counter() - start
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)
