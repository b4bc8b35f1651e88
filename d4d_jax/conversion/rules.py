"""Names and layouts of weights elsewhere, written as rules over the names here.

A rule's regular expression matches the first parts of one of our parameter paths, such as
"down_0/residual_1" of "down_0/residual_1/conv_in/kernel"; the rule gives the first parts of the
foreign name and says how to go on: by the rules of what is inside, or, at the end of the path, by
the layout of the tensor. Every path has one foreign name, so the same rules serve both ways.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of torch lies in one of our leaves.

    Attributes:
        axes: where our axes are in the torch tensor; () when all stay in their places.
        units: axes of size 1 that the torch tensor has at its end and our leaf has not.
        part: which of `parts` equal parts of the torch tensor, along its first axis, our leaf is.
        parts: number of leaves that torch keeps in one tensor.
        doubled: input channels [begin, end), on the torch tensor's second axis, whose weights are
            twice as large in our leaf.
    """

    axes: tuple[int, ...] = ()
    units: int = 0
    part: int = 0
    parts: int = 1
    doubled: tuple[int, int] | None = None

    def foreign_shape(self, shape: Shape) -> Shape | None:
        """Shape of this leaf's part of the torch tensor; None when a leaf cannot have `shape`."""
        if self.axes:
            if len(shape) != len(self.axes):
                return None
            shape = tuple(shape[axis] for axis in np.argsort(self.axes))
        return shape + (1,) * self.units

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our leaf of a torch tensor of fitting shape: a view unless numbers change."""
        if self.parts > 1:
            size = len(tensor) // self.parts
            tensor = tensor[self.part * size : (self.part + 1) * size]
        tensor = self._scaled(tensor, 2.0)
        tensor = tensor.reshape(tensor.shape[: tensor.ndim - self.units])
        return tensor.transpose(self.axes) if self.axes else tensor

    def to_foreign(self, leaf: np.ndarray) -> np.ndarray:
        """This leaf's part of the torch tensor: a view unless numbers change."""
        tensor = leaf.transpose(np.argsort(self.axes)) if self.axes else leaf
        return self._scaled(tensor.reshape(tensor.shape + (1,) * self.units), 0.5)

    def _scaled(self, tensor: np.ndarray, factor: float) -> np.ndarray:
        if self.doubled is None:
            return tensor
        tensor = tensor.copy()
        tensor[:, slice(*self.doubled)] *= factor
        return tensor


class Rule(NamedTuple):
    """`ours` matches whole parts of a path; `foreign` is their name elsewhere.

    An empty `ours` puts a name in front of whatever follows. `foreign` is a template of
    `re.Match.expand`, or a function of the matched numbers. `then` holds the rules of what follows,
    or the layout of the tensor.
    """

    ours: str
    foreign: str | Callable[..., str]
    then: "Layout | tuple[Rule, ...]"


Rules = tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """All there is to know of a foreign file.

    Attributes:
        rules: names and layouts.
        unused: regular expressions of names that such files have and no network here needs.
        spellings: (regular expression, replacement) for names that some of these files spell
            differently; on the way back the spelling of the rules is written.
    """

    rules: Rules
    unused: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def spell(self, name: str) -> str:
        """A foreign name in the spelling of the rules."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def is_unused(self, name: str) -> bool:
        """Whether this is a name that no network here needs."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


def find(rules: Rules, path: str) -> tuple[str, Layout] | None:
    """Foreign name and layout of the leaf at `path`; None when no rule fits."""
    for rule in rules:
        match = re.match(f"(?:{rule.ours})(?:/|$)" if rule.ours else "", path)
        if match is None:
            continue
        if callable(rule.foreign):
            name = rule.foreign(*map(int, match.groups()))
        else:
            name = match.expand(rule.foreign)
        if isinstance(rule.then, Layout):
            if match.end() == len(path):
                return name, rule.then
            continue
        inner = find(rule.then, path[match.end() :])
        if inner is not None:
            return f"{name}.{inner[0]}", inner[1]
    return None


SAME = Layout()
#: (o, i) here is (i, o); the number counts trailing axes of size 1, as of a 1x1 convolution.
LINEAR, LINEAR_1, LINEAR_2 = (Layout(axes=(1, 0), units=units) for units in range(3))
CONV = Layout(axes=(2, 3, 1, 0))  # OIHW here is HWIO
FRAME_CONV = Layout(axes=(2, 3, 1, 0), units=1)  # (o, i, 3, 1, 1) here is (3, 1, i, o)


def layer(kernel: Layout) -> Rules:
    """Rules of a layer with a kernel and a bias."""
    return Rule("kernel", "weight", kernel), Rule("bias", "bias", SAME)


def fused(kernel: str, bias: str | None = None) -> Rules:
    """Rules of query, key and value that torch keeps in one kernel, and one bias, in this order."""
    rules = []
    for part, name in enumerate(("query", "key", "value")):
        rules.append(Rule(f"{name}/kernel", kernel, Layout(axes=(1, 0), part=part, parts=3)))
        if bias is not None:
            rules.append(Rule(f"{name}/bias", bias, Layout(part=part, parts=3)))
    return tuple(rules)


NORM = (Rule("scale", "weight", SAME), Rule("bias", "bias", SAME))
DENSE = layer(LINEAR)
CONVOLUTION = layer(CONV)
