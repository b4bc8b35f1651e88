"""Optimizers of a run: AdamW and Muon, learning rates, groups of parameters, frozen ones.

Groups are an ordered table of (regular expression, options); the first expression that occurs in
the path of a parameter counts, such as "down_0/block_1/temporal_conv/conv_0/kernel":

    [("temporal|motion", {}), ("", {"frozen": True})]        # trains what knows of time
    [("camera_embedding", {"rate": 10.0}), ("", {})]         # ten times the rate
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from d4d_jax.train.sharding import path_name
from d4d_jax.typing import PyTree

#: (expression, {"rate": factor on the learning rate, "frozen": whether it stays as it is}).
Group: TypeAlias = tuple[str, Mapping[str, Any]]

DECAYS = ("cosine", "constant")


def learning_rate(
    peak: float | int, *, num_steps: int, warmup_steps: int = 0, decay: str = "constant"
) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    It rises from 0 in a line over `warmup_steps`; with 0 of them it starts at the peak. With
    `decay="cosine"` it then falls to 0 at `num_steps`: a run that is continued with more steps
    follows the longer curve from where it stands.

    Raises:
        ValueError: `decay` is not in `DECAYS`, or `warmup_steps` is negative.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be 0 or more, not {warmup_steps}.")
    if decay not in DECAYS:
        raise ValueError(f"decay must be 'cosine' or 'constant', not {decay!r}.")
    after = optax.constant_schedule(peak)
    if decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(num_steps - warmup_steps, 1))
    rise = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    return optax.join_schedules([rise, after], [warmup_steps])


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    *,
    weight_decay: float | int = 0.0,
    clip_norm: float | int = 1.0,
    groups: Sequence[Group] = (),
) -> optax.GradientTransformation:
    """AdamW or Muon, with a clipped gradient.

    Muon (Jordan 2024; scaled to the step size of AdamW as in arXiv 2502.16982) orthogonalises the
    update of every matrix and convolution kernel; vectors still get AdamW.

    Args:
        name: "adamw" or "muon".
        rate: from `learning_rate`.
        weight_decay: decoupled, as in AdamW.
        clip_norm: largest norm of the gradient of all trained parameters together.
        groups: the table; without, all parameters are alike. Frozen ones have no optimizer state.

    Raises:
        ValueError: another name or option; or, from `init`, no parameter is in a group, or one is
            in none.
    """

    def update(factor: float | int) -> optax.GradientTransformation:
        def scaled(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
            return factor * rate(step)

        of_group = rate if factor == 1 else scaled
        if name == "adamw":
            return optax.adamw(of_group, weight_decay=weight_decay)
        return muon(
            of_group,
            weight_decay=weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_kernel_axes,
        )

    if name not in ("adamw", "muon"):
        raise ValueError(f"The optimizer is 'adamw' or 'muon', not {name!r}.")
    clip = optax.clip_by_global_norm(clip_norm)

    def labels(params: PyTree) -> PyTree:
        return group_labels(params, groups)

    if not groups:
        return optax.chain(clip, update(1))
    updates, gates = {}, {}
    for number, (pattern, options) in enumerate(groups):
        unknown = set(options) - {"rate", "frozen"}
        if unknown:
            raise ValueError(
                f"The group {pattern!r} of parameters has the options 'rate' and 'frozen', not"
                f" {', '.join(map(repr, sorted(unknown)))}."
            )
        frozen, factor = options.get("frozen", False), options.get("rate", 1)
        gates[str(number)] = optax.set_to_zero() if frozen else optax.identity()
        updates[str(number)] = optax.set_to_zero() if frozen else update(factor)
    gate = optax.partition(gates, labels)
    return optax.chain(gate, clip, optax.partition(updates, labels))


def group_labels(params: PyTree, groups: Sequence[Group]) -> PyTree:
    """The number of every parameter's group, as a string.

    Raises:
        ValueError: no parameter is in a group, or one is in none; the message names it.
    """
    patterns = [pattern for pattern, _ in groups]

    def label(path: tuple, _: Any) -> str:
        name = path_name(path)
        for number, pattern in enumerate(patterns):
            if re.search(pattern, name):
                return str(number)
        raise ValueError(f"The parameter {name!r} is in none of the groups {patterns}.")

    labels = jax.tree_util.tree_map_with_path(label, params)
    used = set(jax.tree.leaves(labels))
    for number, pattern in enumerate(patterns):
        if str(number) not in used:
            raise ValueError(f"No parameter is in the group {pattern!r} of {patterns}.")
    return labels


def _kernel_axes(params: PyTree) -> PyTree:
    """Which axes of each kernel are inputs and outputs; None for vectors."""
    return jax.tree.map(
        lambda leaf: (
            MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)
            if leaf.ndim > 1
            else None
        ),
        params,
    )
