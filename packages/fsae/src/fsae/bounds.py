"""What the fields of configurations accept: each says it by its type, and `check` holds its value against that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fsae.errors import require


class Bound(NamedTuple):
    """In `Annotated`: what values of a type are accepted, in words, and whether one is.

    Such a type is named at its module's level: in a field's own annotation, which is a string, `holds` would find none
    of the module's names.
    """

    accepted: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Bound("1 or more", lambda value: value >= 1)]
Several = Annotated[int, Bound("2 or more", lambda value: value >= 2)]
Index = Annotated[int, Bound("0 or more", lambda value: value >= 0)]
Weight = Annotated[float, Bound("0 or more", lambda value: value >= 0)]
Positive = Annotated[float, Bound("a number above 0", lambda value: 0 < value < math.inf)]
Share = Annotated[float, Bound("a number in [0, 1]", lambda value: 0 <= value <= 1)]
Decay = Annotated[float, Bound("a number in [0, 1)", lambda value: 0 <= value < 1)]
Text = Annotated[str, Bound("given", lambda value: bool(value.strip()))]
Folder = Annotated[str, Bound("a folder's path", bool)]
Source = Annotated[str, Bound("a folder, a list, a tar or a pattern", bool)]


def check(config: Any, part: str = "") -> None:
    """Refuse a dataclass's value that its field does not accept, with a sentence that names it as PART.FIELD.

    A field accepts the choices of a `Literal` and what the `Bound` of an `Annotated` holds for; any other type is not
    looked at. Parts of a configuration are dataclasses too, and were checked when they were made.

    Raises:
        UserError: the first value that is not accepted.
    """
    for name, bounds, optional in _bounded(config.__class__):
        value = getattr(config, name)
        if not (optional and value is None):
            for accepted, holds in bounds:
                or_null = ", or null" if optional else ""
                require(holds(value), f"{part}.{name}" if part else name, value, accepted + or_null)


@dataclass(frozen=True)
class Checked:
    """A dataclass whose values are held against their fields' bounds when it is made; errors call it `part`."""

    _part: ClassVar[str] = ""

    def __init_subclass__(cls, part: str = "") -> None:
        cls._part = part

    def __post_init__(self) -> None:
        check(self, self._part)


@cache
def _bounded(config: type) -> list[tuple[str, list[Bound], bool]]:
    """Name, bounds, and whether None is accepted, of each field that has bounds."""
    hints = get_type_hints(config, include_extras=True)
    found = [(name, list(_bounds(hint)), NoneType in get_args(hint)) for name, hint in hints.items()]
    return [field for field in found if field[1]]


def _bounds(hint: Any) -> Iterator[Bound]:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        *others, last = (f'"{choice}"' for choice in parts)
        yield Bound(f"{', '.join(others)} or {last}", parts.__contains__)
    elif kind is Annotated:
        yield from (extra for extra in parts[1:] if isinstance(extra, Bound))
    elif kind in (Union, UnionType):
        for part in parts:
            yield from _bounds(part)
