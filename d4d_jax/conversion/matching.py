"""Brings the tensors of a foreign file and the leaves of a network together, either way.

Nothing is computed before an array is asked for, so a checkpoint can pass through tensor by tensor.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from d4d_jax.conversion.rules import Layout, Shape, Table, find
from d4d_jax.typing import PyTree

#: Problems of one kind that the message of an error shows.
_SHOWN = 12


class ConversionError(ValueError):
    """Weights that do not fit.

    Attributes:
        what: the sentence without the problems.
        problems: one line for every tensor concerned.
    """

    def __init__(self, what: str, problems: Sequence[str]):
        self.what = what
        self.problems = tuple(problems)
        shown = "".join(f"\n  {line}" for line in problems[:_SHOWN])
        rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        super().__init__(f"{what}: {_count(problems, 'problem')}:{shown}{rest}")


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the tensors.

    Attributes:
        matched: number of arrays that were converted.
        parameters: numbers in them.
        new: our leaves that the source lacks and that keep their initial values.
        unused: tensors of the source that are not needed.
        absent: regular expressions of names that such foreign files have and this one has not.
        prefix: what stood before every name of the source.
    """

    matched: int
    parameters: int
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    prefix: str = ""

    def __str__(self) -> str:
        behind = f' behind the prefix "{self.prefix}"' if self.prefix else ""
        lines = [f"{self.matched} tensors with {self.parameters:,} parameters{behind}"]
        titles = {"new": "keep their initial values", "unused": "not used", "absent": "not written"}
        for field, title in titles.items():
            names = getattr(self, field)
            if names:
                shown = ", ".join(names[:_SHOWN])
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"{len(names)} {title}: {shown}{rest}")
        return "\n".join(lines)


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, each computed when it is asked for; the shapes are known before."""

    def __init__(self, shapes: Mapping[str, Shape], compute: Callable[[str], np.ndarray]):
        self.shapes = dict(shapes)
        self._compute = compute

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def to_ours(
    state: Mapping[str, Any],
    table: Table,
    template: Mapping[str, Any],
    *,
    allow_new: Sequence[str] = (),
    source: str = "The state dict",
) -> tuple[Arrays, Report]:
    """The leaves of a network, as float32, from foreign tensors.

    Args:
        state: foreign tensors by name.
        table: names and layouts.
        template: arrays or shapes of our leaves by path.
        allow_new: regular expressions of paths. A matching leaf that `state` lacks is taken from
            `template`, which has to hold its array.
        source: what the error calls the state dict.

    Raises:
        ConversionError: everything that does not fit, in one error.
    """
    places, problems = _places(template, table)
    wanted = {name for name, _ in places.values()}
    prefix, names, outside = _names(state, table, wanted, problems)
    shapes = shapes_of(state)
    new = []
    sources: dict[str, tuple[str, Layout]] = {}
    for path, leaf in template.items():
        if path in places and places[path][0] in names:
            name, layout = places[path]
            sources[path] = names[name], layout
            problems += _misfit(names[name], shapes[names[name]], path, leaf, layout)
        elif _matches(path, allow_new):
            new.append(path)
            if not hasattr(leaf, "__array__"):
                problems.append(f"{path} {_show(leaf.shape)} is new and has no initial values")
        elif path in places:
            name = prefix + places[path][0]
            problems.append(f"{name} is missing, for {path} {_show(leaf.shape)}")
        else:
            problems.append(f"{path} {_show(leaf.shape)} has no name in this format")
    unknown = [name for name in names if name not in wanted and not table.is_unused(name)]
    problems += [f"{names[name]} {_show(shapes[names[name]])} is unknown" for name in unknown]
    if problems:
        raise ConversionError(f"{source} does not fit", problems)

    def compute(path: str) -> np.ndarray:
        if path not in sources:
            return np.asarray(template[path], np.float32)
        name, layout = sources[path]
        tensor = _floating(np.asarray(state[name]), f"{source} has {name}")
        return layout.to_ours(tensor).astype(np.float32, copy=False)

    used = {name for name, _ in sources.values()}
    unused = [name for name in [*names.values(), *outside] if name not in used]
    arrays = Arrays({path: tuple(leaf.shape) for path, leaf in template.items()}, compute)
    count = sum(math.prod(arrays.shapes[path]) for path in sources)
    return arrays, Report(len(sources), count, tuple(new), tuple(unused), prefix=prefix)


def to_foreign(
    leaves: Mapping[str, Any],
    table: Table,
    *,
    template: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    source: str = "The parameters",
) -> tuple[Arrays, Report]:
    """Foreign tensors, as float32, from the leaves of a network.

    Args:
        leaves: our arrays by path.
        table: names and layouts.
        template: arrays or shapes by path, which `leaves` have to be complete by; or None.
        drop: regular expressions of paths that are left out.
        source: what the error calls the parameters.

    Raises:
        ConversionError: leaves that the format has no name for, or that do not fit each other.
    """
    shapes = shapes_of(leaves)
    dropped = [path for path in shapes if _matches(path, drop)]
    kept = {path: shape for path, shape in shapes.items() if path not in dropped}
    places, problems = _places(kept, table)
    if template is not None:
        wanted = {p: s for p, s in shapes_of(template).items() if not _matches(p, drop)}
        problems += _differences({path: kept[path] for path in places}, wanted)
    for path in kept.keys() - places.keys():
        problems.append(f"{path} {_show(kept[path])} has no name in this format")
    parts: dict[str, list[tuple[int, str, Layout]]] = defaultdict(list)
    for path, (name, layout) in places.items():
        parts[name].append((layout.part, path, layout))
    foreign = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        expected = [layout.foreign_shape(kept[path]) for _, path, layout in pieces]
        if None in expected or len(set(expected)) > 1:
            given = " and ".join(f"{path} {_show(kept[path])}" for _, path, _ in pieces)
            problems.append(f"{name} cannot be made of {given}")
        else:
            foreign[name] = _whole(pieces[0][2], expected[0])
    if problems:
        raise ConversionError(f"{source} cannot be written in this format", sorted(problems))

    def compute(name: str) -> np.ndarray:
        pieces = [
            layout.to_foreign(np.asarray(leaves[path], np.float32))
            for _, path, layout in parts[name]
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    count = sum(math.prod(shape) for shape in foreign.values())
    report = Report(len(foreign), count, unused=tuple(dropped), absent=table.unused)
    return Arrays(foreign, compute), report


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves of nested dicts by path, such as "mid/residual_0/conv_in/kernel"."""
    return flatten_dict(tree, sep="/")


def nest(leaves: Mapping[str, Any]) -> PyTree:
    """Nested dicts of leaves by path."""
    return unflatten_dict(dict(leaves), sep="/")


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Shape]:
    """The shape of every array, or shape; nothing is computed."""
    if isinstance(arrays, Arrays):
        return arrays.shapes
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _places(paths: Iterable[str], table: Table) -> tuple[dict[str, tuple[str, Layout]], list[str]]:
    """Foreign name and layout of every path that has one; and what is wrong with them.

    Every part of a foreign tensor has to belong to exactly one leaf.
    """
    places = {path: place for path in paths if (place := find(table.rules, path)) is not None}
    owners: dict[str, list[str]] = defaultdict(list)
    for path, (name, _) in places.items():
        owners[name].append(path)
    problems = []
    for name, paths in owners.items():
        layouts = [places[path][1] for path in paths]
        if sorted(layout.part for layout in layouts) != list(range(layouts[0].parts)):
            problems.append(
                f"{name} consists of {_count(range(layouts[0].parts), 'part')}, and its leaves are"
                f" {', '.join(paths)}"
            )
    return places, problems


def _misfit(name: str, given: Shape, path: str, leaf: Any, layout: Layout) -> list[str]:
    """What is wrong with the shape of a foreign tensor, for a leaf of ours."""
    expected = _whole(layout, layout.foreign_shape(tuple(leaf.shape)))
    if expected == given:
        return []
    return [
        f"{name} is {_show(given)} instead of {_show(expected)}, for {path} {_show(leaf.shape)}"
    ]


def _floating(tensor: np.ndarray, what: str) -> np.ndarray:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{what} as {tensor.dtype}: quantised weights do not fit.")
    return tensor


def _differences(given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[str]:
    """What distinguishes our leaves from those of the network."""
    differences = []
    for path, shape in {**wanted, **given}.items():
        if path not in wanted:
            differences.append(f"{path} {_show(shape)} is unknown to the network")
        elif path not in given:
            differences.append(f"{path} {_show(shape)} is missing")
        elif shape != wanted[path]:
            differences.append(f"{path} is {_show(shape)} instead of {_show(wanted[path])}")
    return differences


def _names(
    state: Iterable[str], table: Table, wanted: set[str], problems: list[str]
) -> tuple[str, dict[str, str], list[str]]:
    """The prefix of the wanted names, {name in the table's spelling: name}, and names without it.

    State dicts are often nested ("state_dict."), wrapped ("module.") or part of a larger model
    ("first_stage_model."): the prefix is the one that makes most of the names known.
    """
    spelt = {name: table.spell(name) for name in state}
    votes: Counter[str] = Counter()
    for name in spelt.values():
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                votes["".join(f"{part}." for part in parts[:cut])] += 1
    best = [prefix for prefix, count in votes.items() if count == max(votes.values())]
    prefix = "" if "" in best or not best else best[0]
    if len(best) > 1 and prefix:
        listed = ", ".join(f'"{name}"' for name in sorted(best))
        problems.append(
            f"the same names are there more than once, behind {listed}; keep one of them"
        )
    names: dict[str, str] = {}
    outside = []
    for name, spelling in spelt.items():
        if not spelling.startswith(prefix):
            outside.append(name)
        elif spelling.removeprefix(prefix) in names:
            other = names[spelling.removeprefix(prefix)]
            problems.append(f"{name} and {other} are two names of the same tensor")
        else:
            names[spelling.removeprefix(prefix)] = name
    return prefix, names, outside


def _whole(layout: Layout, part: Shape | None) -> Shape | None:
    """Shape of the torch tensor that has `parts` parts of this shape."""
    return part and (part[0] * layout.parts, *part[1:])


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the path, or its first parts."""
    return any(re.match(f"(?:{pattern})(?:/|$)", path) for pattern in patterns)


def _show(shape: Shape | None) -> str:
    return "a shape of another rank" if shape is None else f"({', '.join(map(str, shape))})"


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"
