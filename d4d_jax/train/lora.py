"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): trained additions to frozen kernels.

    adapters = lora.init(params, r"attention.*/(query|key|value|out)/kernel$", rank=8, key=key)
    loss_fn = lora.adapted(objective, alpha=8.0)      # trains `adapters`; `frozen["base"]` = params
    params = lora.merge(params, adapters, alpha=8.0)  # a plain network again, to be exported

A kernel W (..., out) becomes W + alpha / rank * A B, with A (inputs, rank) and B (rank, out), where
the inputs are all axes but the last. B starts at 0, so that nothing changes before the training.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from d4d_jax.train.sharding import path_name
from d4d_jax.train.step import LossFn, Metrics
from d4d_jax.typing import PyTree

#: Queries, keys, values and outputs of every attention in our networks.
ATTENTION = r"(^|/)\w*attention\w*/(query|key|value|out)/kernel$"


def init(params: PyTree, pattern: str, *, rank: int, key: Key[Array, ""]) -> dict[str, Any]:
    """Adapters {path: {"a", "b"}} for the kernels whose path the expression occurs in.

    Args:
        params: of the network, or their shapes.
        pattern: regular expression.
        rank: of the additions.
        key: for the matrices A; B is 0.

    Raises:
        ValueError: the rank is below 1, or no kernel matches.
    """
    if rank < 1:
        raise ValueError(f"The rank of an adapter must be at least 1, not {rank}.")
    adapters = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        name = path_name(path)
        if leaf.ndim < 2 or not re.search(pattern, name):
            continue
        inputs = math.prod(leaf.shape[:-1])
        own = jax.random.fold_in(key, len(adapters))
        a = jax.random.normal(own, (inputs, rank), jnp.float32) / math.sqrt(inputs)
        adapters[name] = {"a": a, "b": jnp.zeros((rank, leaf.shape[-1]), jnp.float32)}
    if not adapters:
        raise ValueError(f"No kernel of the network matches {pattern!r}: nothing would be trained.")
    return adapters


def merge(params: PyTree, adapters: PyTree, *, alpha: float | int) -> PyTree:
    """The parameters with the additions of the adapters in them.

    Raises:
        ValueError: an adapter belongs to none of the parameters.
    """
    unused = set(adapters)

    def add(path: tuple, leaf: Array) -> Array:
        name = path_name(path)
        if name not in adapters:
            return leaf
        unused.discard(name)
        a, b = adapters[name]["a"], adapters[name]["b"]
        return leaf + (alpha / a.shape[-1] * (a @ b)).reshape(leaf.shape).astype(leaf.dtype)

    merged = jax.tree_util.tree_map_with_path(add, params)
    if unused:
        raise ValueError(f"The network has no kernel {sorted(unused)[0]!r}, which an adapter has.")
    return merged


def adapted(loss_fn: LossFn, *, alpha: float | int) -> LossFn:
    """The loss as a function of adapters to the parameters `frozen["base"]`."""

    def of_adapters(
        adapters: PyTree, frozen: PyTree, batch: PyTree, key: Array
    ) -> tuple[Array, Metrics]:
        return loss_fn(merge(frozen["base"], adapters, alpha=alpha), frozen, batch, key)

    return of_adapters
