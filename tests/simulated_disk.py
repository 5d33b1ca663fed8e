"""A disk that forgets: what was written, what was synced, and what a power cut may leave of the difference.

Theory
* A file has two contents, `data` (the page cache: what everybody reads) and `synced` (the medium). fsync copies one over
  the other. A power cut leaves what was synced, and of the rest any part: none, all, a beginning, a beginning and zeros,
  or all with a hole of rubbish in it.
* A directory has two sets of names likewise. fsync of a *file* does not make its name durable; only fsync of its
  directory does. Of the changes since then a power cut keeps a beginning, or any selection. A rename is one change.
* A failed fsync drops the dirty pages: from then on the file's fsync succeeds and does nothing (FACTS, "The disk"). Here
  such a file never becomes durable again, which is harsher than the kernel, and right for a program that must not try.
* A name says nothing of the inode behind it: one that was never synced itself may be gone although its name is durable
  (ext2, and ext4 without a journal, where fsck then clears the name).
* Room is counted in blocks, so that what fits into a file's last block is written even when the disk is full.

All chance comes from the one `Chance` of a history, which uses nothing but random.Random.random: the same on every Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

# Small beside real ones, so that a log of a few kilobytes takes several.
BLOCK_BYTES = 512
# No digits: a status file has no checksum, and no disk turns one number into another.
_RUBBISH = b'\0\0\0\0\xff\n{"'

_T = TypeVar("_T")


class Chance:
    """The only source of chance of a history."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def hit(self, probability: float) -> bool:
        return self.random() < probability

    def below(self, limit: int) -> int:
        """A whole number from 0 to limit - 1."""
        return int(self.random() * limit)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[_T]) -> _T:
        return items[int(self.random() * len(items))]


class File:
    """An inode.

    intact    so many first bytes are the same in `data` and `synced`
    promised  what the last fsync that said so has made durable; what else a power cut left on the medium is luck
    lock      who holds flock(LOCK_EX)
    is_made   it is on the medium at all
    """

    __slots__ = ("data", "intact", "is_lying", "is_made", "lock", "promised", "synced")

    def __init__(self) -> None:
        self.data = bytearray()
        self.synced = self.promised = b""
        self.intact = 0
        self.is_lying = self.is_made = False
        self.lock: object = None

    @property
    def is_dirty(self) -> bool:
        return not self.intact == len(self.data) == len(self.synced)

    def sync(self) -> None:
        if not self.is_lying:
            self.synced = self.promised = bytes(self.data)
            self.intact = len(self.synced)
            self.is_made = True

    def fail_to_sync(self, chance: Chance) -> None:
        """EIO: some of the dirty pages reached the medium, the others are forgotten, and nobody will be told again."""
        self.synced = self.left_by_power_cut(chance)
        self.intact = 0
        self.is_lying = True

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.intact = min(self.intact, size)

    def left_by_power_cut(self, chance: Chance) -> bytes:
        if self.is_lying or not self.is_dirty or chance.hit(0.2):
            return self.synced
        if chance.hit(0.25):
            return bytes(self.data)
        base, tail = bytes(self.data[: self.intact]), bytes(self.data[self.intact :])
        if not tail:
            return self.synced[: chance.between(len(base), len(self.synced))]
        start = chance.below(len(tail) + 1)
        end = chance.between(start, len(tail))
        way = chance.below(4)
        if way == 0:
            return base + tail[:start]
        if way == 1:
            return base + tail[:start] + b"\0" * (len(tail) - start)
        if way == 2:
            before, rubbish = base + tail[:start], bytes(chance.pick(_RUBBISH) for _ in range(end - start))
            if before[-1:].isdigit() and rubbish[:1] == b"\n":
                # Nor does any end a number before its last digit.
                rubbish = b"\0" + rubbish[1:]
            return before + rubbish + tail[end:]
        return base + b"\0" * start + tail[start:]


class Directory:
    """An inode that holds names. pending: the changes since the last fsync, each of which happens whole or not at all.
    is_made: as of a file."""

    __slots__ = ("is_made", "names", "pending", "synced")

    def __init__(self) -> None:
        self.is_made = False
        self.names: dict[str, Node] = {}
        self.synced: dict[str, Node] = {}
        self.pending: list[tuple[tuple[str, Node | None], ...]] = []

    def change(self, *changes: tuple[str, Node | None]) -> None:
        self.pending.append(changes)
        _apply(self.names, changes)

    def sync(self) -> None:
        self.synced = dict(self.names)
        self.pending = []
        self.is_made = True

    def left_by_power_cut(self, chance: Chance) -> dict[str, Node]:
        names = dict(self.synced)
        is_in_order = chance.hit(0.5)
        for change in self.pending:
            if chance.hit(0.6):
                _apply(names, change)
            elif is_in_order:
                break
        return {name: node for name, node in names.items() if node.is_made or chance.hit(0.7)}


Node = File | Directory


def _apply(names: dict[str, Node], changes: tuple[tuple[str, Node | None], ...]) -> None:
    for name, node in changes:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A tree of them. free: blocks that are left, or None for plenty."""

    def __init__(self) -> None:
        self.root = Directory()
        self.free: int | None = None
        self._directories: dict[str, Directory] = {}

    def directory(self, path: str) -> Directory:
        """Raises FileNotFoundError, NotADirectoryError."""
        found = self._directories.get(path)
        if found is not None:
            return found
        node: Node | None = self.root
        for name in path.split("/")[1:]:
            if not isinstance(node, Directory):
                raise NotADirectoryError(20, "Not a directory", path)
            node = node.names.get(name)
            if node is None:
                raise FileNotFoundError(2, "No such file or directory", path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(20, "Not a directory", path)
        self._directories[path] = node
        return node

    def find(self, path: str) -> Node | None:
        parent, _, name = path.rpartition("/")
        try:
            return self.directory(parent).names.get(name)
        except FileNotFoundError:
            return None

    def find_durable(self, path: str) -> Node | None:
        """What is found under this path if the power is cut in this instant and nothing unsynced survives."""
        node: Node | None = self.root
        for name in path.split("/")[1:]:
            if not isinstance(node, Directory):
                return None
            node = node.synced.get(name)
            if node is not None and not node.is_made:
                return None
        return node

    def durable_bytes(self, path: str) -> bytes | None:
        node = self.find_durable(path)
        return node.synced if isinstance(node, File) else None

    def make_directory(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        self.directory(parent).change((name, Directory()))

    def remove(self, path: str) -> None:
        """A name, and all that is below it."""
        parent, _, name = path.rpartition("/")
        directory = self.directory(parent)
        node = directory.names.get(name)
        if node is None:
            raise FileNotFoundError(2, "No such file or directory", path)
        directory.change((name, None))
        if self.free is not None:
            self.free += sum(_blocks(len(file.data)) for file in _files(node))
        if isinstance(node, Directory):
            self._directories = {}

    def rename(self, old: str, new: str) -> None:
        """Within one directory."""
        parent, _, name = old.rpartition("/")
        directory = self.directory(parent)
        node = directory.names.get(name)
        if node is None:
            raise FileNotFoundError(2, "No such file or directory", old)
        new_name = new.rpartition("/")[2]
        replaced = directory.names.get(new_name)
        if self.free is not None and isinstance(replaced, File):
            self.free += _blocks(len(replaced.data))
        directory.change((name, None), (new_name, node))
        if isinstance(node, Directory):
            self._directories = {}

    def append(self, file: File, data: bytes) -> int:
        """How many of the bytes found room."""
        size = len(file.data)
        if self.free is not None:
            needed = _blocks(size + len(data)) - _blocks(size)
            if needed > self.free:
                data = data[: (_blocks(size) + self.free) * BLOCK_BYTES - size]
                needed = self.free
            self.free -= needed
        file.data += data
        return len(data)

    def cut_power(self, chance: Chance) -> None:
        """Forget what was not synced, or parts of it."""
        self._directories = {}
        nodes: list[Node] = [self.root]
        while nodes:
            node = nodes.pop()
            if isinstance(node, Directory):
                node.names = node.left_by_power_cut(chance)
                node.sync()
                nodes.extend(node.names.values())
            else:
                node.synced = node.left_by_power_cut(chance)
                node.data = bytearray(node.synced)
                node.is_made = True
                node.intact, node.promised, node.is_lying, node.lock = len(node.data), b"", False, None


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _files(node: Node) -> Iterator[File]:
    if isinstance(node, File):
        yield node
    else:
        for inner in node.names.values():
            yield from _files(inner)
