"""Frozen dataclasses that are JAX pytrees: arrays are traced, fields marked `static` are not.

`jax.tree_util.register_dataclass` rebuilds a value through `__init__`, where run-time shape checks
would see the placeholders that `jax.tree.map`, `vmap` and `eval_shape` put in place of arrays. Here
rebuilding skips `__init__`, so that the checks see what people construct and nothing else.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static(**keywords: Any) -> Any:
    """A dataclass field that belongs to the tree's structure: hashable, compared, never traced."""
    return dataclasses.field(metadata={"static": True}, **keywords)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def dataclass(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass and registers it as a pytree."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    traced = tuple(f.name for f in fields if not f.metadata.get("static"))
    fixed = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(value: Any):
        children = tuple(getattr(value, name) for name in traced)
        return children, tuple(getattr(value, name) for name in fixed)

    def flatten_with_keys(value: Any):
        children, structure = flatten(value)
        keys = (jax.tree_util.GetAttrKey(name) for name in traced)
        return tuple(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple, children: Iterable[Any]) -> T:
        value = object.__new__(cls)
        for name, child in zip(traced + fixed, (*children, *structure), strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
