"""Values: records that never change, equal to those of their own kind with equal fields.

A class that inherits from `Value` and annotates its fields is to its users what a frozen dataclass is, and to a type
checker as well. It has its own `__slots__ = ()`, or its instances would carry a dict.

Theory. A value is the tuple of its fields. So it is made in one step (a frozen dataclass sets field by field through
object.__setattr__, which takes five times as long), and nothing has to be generated when its class is: importing
dataclasses, with the inspect and ast that come with it, costs a process twice what starting Python does.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import Any, Literal, Self, dataclass_transform
else:

    def dataclass_transform(frozen_default):
        """What typing's does at run time."""
        return lambda kind: kind


_new, _equal = tuple.__new__, tuple.__eq__
# What reads the first, the second, … item of a tuple, as a named tuple has it: twice as fast as a property.
_Places = namedtuple("_Places", "a b c d e f g h i j k l")
_GETTERS = [vars(_Places)[name] for name in _Places._fields]


@dataclass_transform(frozen_default=True)
class Value(tuple[object, ...]):
    """What all values share. `_fields` are the names of a kind's fields, in their order, `_defaults` the values of the
    last of them."""

    __slots__ = ()
    if TYPE_CHECKING:
        _fields: tuple[str, ...]
        _defaults: tuple[object, ...]

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(cls.__annotations__)
        cls._defaults = tuple(vars(cls)[name] for name in cls._fields if name in vars(cls))
        for name, getter in zip(cls._fields, _GETTERS, strict=False):
            setattr(cls, name, getter)

    def __new__(cls, *values: object, **named: object) -> Self:
        if named or len(values) != len(cls._fields):
            values = cls._complete(values, named)
        return _new(cls, values)

    @classmethod
    def _complete(cls, values: tuple[object, ...], named: dict[str, object]) -> tuple[object, ...]:
        """All fields, of which some were given by name and some were left out."""
        fields = cls._fields
        given = dict(zip(fields, values, strict=False))
        wrong = [*named.keys() & given.keys(), *named.keys() - set(fields), *map(str, values[len(fields) :])]
        given = {**dict(zip(fields[-len(cls._defaults) :], cls._defaults, strict=False)), **given, **named}
        wrong += [name for name in fields if name not in given]
        if wrong:
            raise TypeError(f"{cls.__name__} has the fields {', '.join(fields)}; wrong or missing: {', '.join(wrong)}")
        return tuple([given[name] for name in fields])

    @classmethod
    def _from(cls, fields: dict[str, Any]) -> Self:
        """The value with these fields, all of them."""
        return _new(cls, map(fields.__getitem__, cls._fields))

    def _replace(self, **named: object) -> Self:
        """The same with other values in some fields."""
        return type(self)(**{**dict(zip(self._fields, self, strict=True)), **named})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def __bool__(self) -> Literal[True]:
        return True  # One without fields is no less there.

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({shown})"

    def __getnewargs__(self) -> tuple[object, ...]:
        return tuple(self)  # For copy and pickle.
