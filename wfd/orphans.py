"""What dead shims leave behind, and how it is found: on Linux, as long as the daemon lives.

A process that calls setsid is in its attempt's group no longer, and once its parent is dead nothing leads from it to the
attempt. So the daemon is the subreaper (prctl(2)) of all that it starts: whoever loses its parent becomes its child.

Rules
* What is alive of an attempt whose shim we have reaped is one of our children, or below one, and that child is no shim.
  So while our children are our shims and nothing else there is nothing to look for. To know that costs one short read
  in a turn that has reaped something.
* Whose an orphan is, its group tells, and if it has left that, its environment (`WFD_RUN_ID`, …). One that has taken
  these out, or is not to be looked into, is nobody's and is left alone.
* The number of a child, or of its group, cannot become anybody else's before the child is reaped, and only we reap. So
  what was listed after the last reaping may be signalled.
* What is below a living orphan becomes ours when that one is dead: whoever ends orphans looks until there are none.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from wfd import machine


class Orphans:
    """Those of our children that are no shims. shims: the pids of the others, as somebody else keeps them."""

    def __init__(self, shims: Collection[int]) -> None:
        self._shims = shims
        self._is_keeping = False
        self._listing: int | None = None
        self._are_there = False
        self._environments: dict[int, frozenset[bytes]] = {}

    def keep(self) -> None:
        """To be called before a shim is started: from then on orphans are ours, where that can be. Raises OSError."""
        if not self._is_keeping:
            self._listing = machine.keep_orphans()
            self._is_keeping = True

    @property
    def are_kept(self) -> bool:
        return self._listing is not None

    def look(self) -> None:
        """Are there any? To be asked when children were reaped, and when somebody wants to know it of a living attempt."""
        if self._listing is not None:
            try:
                self._are_there = machine.count_children(self._listing) > len(self._shims)
            except OSError:
                # Then it is to be found out by whoever asks for one attempt's, and can wait.
                self._are_there = True

    def of(self, group: int | None, marks: Mapping[bytes, bytes]) -> tuple[list[int], list[int]] | None:
        """Those in an attempt's group, and those elsewhere that carry its marks; zombies, too. None if there may be
        others, so that one has to ask again. Raises OSError."""
        members: list[int] = []
        others: list[int] = []
        if self._listing is None or not self._are_there:
            return members, others
        wanted = machine.as_variables(marks)
        for pid in machine.children(self._listing):
            if pid in self._shims:
                continue
            if os.getpgid(pid) == group:
                members.append(pid)
                continue
            environment = self._environment(pid)
            if environment is None:
                # If it died just now, its children have become ours since we read the list.
                return None
            if wanted <= environment:
                others.append(pid)
        return members, others

    def _environment(self, pid: int) -> frozenset[bytes] | None:
        """As it was when the orphan was first seen: most will stay as long as their step does."""
        found = self._environments.get(pid)
        if found is None:
            found = machine.environment_of(pid)
            if found:
                self._environments[pid] = found
        return found

    def forget(self, pid: int) -> None:
        """It was reaped."""
        self._environments.pop(pid, None)
