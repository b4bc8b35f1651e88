"""Names for swappable components: family -> name -> constructor.

A component registers itself where it is defined::

    @register("stepper", "ddim")
    @dataclasses.dataclass(frozen=True)
    class DDIM: ...

and a config builds it by name: `build("stepper", {"name": "ddim", "eta": 0.0})`. A name of the form
`"package.module:Attr"` names a component of somebody else's code, which needs no registration.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_FAMILIES: dict[str, dict[str, Callable[..., Any]]] = {}

T = TypeVar("T", bound=Callable[..., Any])


def register(family: str, name: str) -> Callable[[T], T]:
    """Decorator that files a class or function under `family` and `name`.

    Raises:
        ValueError: the family already has another component of that name.
    """

    def decorate(constructor: T) -> T:
        members = _FAMILIES.setdefault(family, {})
        known = members.get(name)
        if known is not None and _origin(known) != _origin(constructor):
            raise ValueError(
                f"{family} {name!r} is already {_origin(known)}; choose another name for"
                f" {_origin(constructor)}."
            )
        members[name] = constructor
        return constructor

    return decorate


def names(family: str) -> tuple[str, ...]:
    """The registered names of a family, sorted."""
    return tuple(sorted(_FAMILIES.get(family, {})))


def lookup(family: str, name: str) -> Callable[..., Any]:
    """The constructor called `name`: a registered one, or `"package.module:Attr"`.

    Raises:
        ValueError: nothing is registered under that name, or the module has no such attribute.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"Cannot load the {family} {name!r}: {error}.") from error
    try:
        return _FAMILIES.get(family, {})[name]
    except KeyError:
        known = ", ".join(names(family)) or "none (import the module that defines them)"
        raise ValueError(
            f'Unknown {family} {name!r}; known: {known}; or name your own as "package.module:Attr".'
        ) from None


def build(family: str, spec: Mapping[str, Any]) -> Any:
    """Calls the constructor `spec["name"]` of `family` with the rest of `spec` as arguments.

    Raises:
        ValueError: no or unknown name, or an argument that the constructor does not take.
    """
    arguments = dict(spec)
    if "name" not in arguments:
        raise ValueError(f"The {family} needs a 'name'; got only {sorted(arguments)}.")
    name = arguments.pop("name")
    constructor = lookup(family, name)
    try:
        inspect.signature(constructor).bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"Bad arguments for the {family} {name!r}: {error}; it takes"
            f" {inspect.signature(constructor)}."
        ) from error
    return constructor(**arguments)


def _origin(constructor: Callable[..., Any]) -> str:
    return f"{constructor.__module__}:{constructor.__qualname__}"
