"""Which of many points a means tries, when it cannot try all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def spread(points: Sequence[T], count: int, chance: Random, kind: Callable[[T], Hashable]) -> list[T]:
    """So many of the points (all, if there are no more), of each kind as many as of any other as long as it has some."""
    kinds: dict[Hashable, list[T]] = defaultdict(list)
    for point in points:
        kinds[kind(point)].append(point)
    for each in kinds.values():
        chance.shuffle(each)
    chosen: list[T] = []
    while len(chosen) < count and any(kinds.values()):
        one_of_each = [each.pop() for each in kinds.values() if each]
        chosen += chance.sample(one_of_each, len(one_of_each))
    return chosen[:count]
