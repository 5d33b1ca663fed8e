"""Structure-aware mutations: a valid thing goes in, and one comes out that is almost valid, or nothing like it.

A document is changed as a tree, so that the result still is JSON and gets past the first check; a log line as an object
that is sealed again; and each of them as bytes. All that is drawn comes from the Random that is handed in: the same
Random makes the same thing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests import logs
from tests.logs import Log
from wfd import protocol

# Values that somebody has once forgotten: of another type, at a limit or just beyond it, long, empty, not printable.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, 1.0, -0.0, 1e-7, 1e308, float("inf"), float("nan"), 10**10, 10**30, 2**31, 2**63,
    10_001, 200_001, 31_622_401, "", " ", "a", "b", "true", "-x", ".", "/", "~", "/tmp", "a=b", "A", "WFD_X", "\0", "\n",
    "\x1b[1m", "\u202e", "\ud800", "\udcff", "é", "e\u0301", "ß", "SS", "手順", "x" * 201, "y" * 5_000, [], {}, [[]], [None],
    {"": 0}, ["a", "a"], {"id": "a"}, {"id": "a", "command": "true"}, {"A": "1"}, {"initial_sec": 1}, "retry", "fail", "1",
)  # fmt: skip
_KEYS = (
    "workflow_id", "steps", "max_parallel", "env", "cwd", "timeout_sec", "id", "command", "depends_on", "retries", "backoff",
    "grace_sec", "on_lost", "initial_sec", "factor", "max_sec", "jitter", "timeout_ms", "", "x", "Id", "run_id", "request",
)  # fmt: skip
# Twice what the deepest check of a definition needs, and more than Python's own stack.
_DEPTHS = (9, 90, 990, 40_000)

# What means something to a reader of JSON, of UTF-8 or of lines.
_SIGNS = (b'"', b"{", b"[", b",", b"\\", b"\xff", b"\xc0\x80", b"1e999", b"\n")

Path = tuple[Any, ...]


def places(value: object, path: Path = ()) -> Iterator[Path]:
    """The paths of all values in a document, its own () included."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def changed(document: Any, chance: random.Random) -> Any:
    """A copy of the document with one change in its structure."""
    document = json.loads(json.dumps(document))
    paths = [path for path in places(document) if path]
    if not paths:
        return chance.choice(ODD)
    path = chance.choice(paths)
    parent, name = at(document, path[:-1]), path[-1]
    chance.choice(_CHANGES)(document, parent, name, chance)
    return document


def at(document: Any, path: Path) -> Any:
    """The value at a path."""
    for name in path:
        document = document[name]
    return document


def _replace(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    parent[name] = json.loads(json.dumps(chance.choice(ODD)))


def _remove(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    del parent[name]


def _copy_from_elsewhere(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    source = at(document, chance.choice(list(places(document))))
    parent[name] = json.loads(json.dumps(source))


def _double(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    if isinstance(parent, list):
        parent.insert(name, json.loads(json.dumps(parent[name])))
    else:
        parent[chance.choice(_KEYS)] = json.loads(json.dumps(parent[name]))


def _rename(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    if isinstance(parent, dict):
        parent[chance.choice(_KEYS)] = parent.pop(name)
    else:
        chance.shuffle(parent)


def _wrap(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    parent[name] = [parent[name]] if chance.random() < 0.5 else {chance.choice(_KEYS): parent[name]}


def _nudge(document: Any, parent: Any, name: Any, chance: random.Random) -> None:
    """A number becomes its neighbour, a text loses or gains a little."""
    value = parent[name]
    if isinstance(value, (int, float)):
        parent[name] = value + chance.choice([-1, 1, 0.5, 10**6])
    elif isinstance(value, str):
        place = chance.randint(0, len(value))
        new = chance.choice(["", "a", " ", "\0", "\u0301", "\u200b"])
        parent[name] = value[:place] + new + value[place + chance.randint(0, 2) :]


_CHANGES: tuple[Callable[[Any, Any, Any, random.Random], None], ...] = (
    _replace, _replace, _remove, _copy_from_elsewhere, _double, _rename, _wrap, _nudge, _nudge,
)  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one change that knows nothing of what they mean."""
    one, two = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    return chance.choice((
        lambda: data[:one] + bytes([chance.randrange(256)]) + data[one + 1 :],
        lambda: data[:one] + data[min(two, one + 9) :],
        lambda: data[:one] + data[one : min(two, one + 40)] * 2 + data[one:],
        lambda: data[:one],
        lambda: data[:one] + bytes(chance.randint(1, 9)) + data[one:],
        lambda: data[:one] + chance.choice(_SIGNS) + data[one:],
        lambda: data[:one] + b"[" * chance.choice(_DEPTHS) + data[one:],
    ))()  # fmt: skip


# -- valid things ------------------------------------------------------------------------------------------------------


def document(chance: random.Random) -> dict[str, Any]:
    """A definition as a user writes it, valid, with any of its fields."""
    steps: list[dict[str, Any]] = []
    for number in range(chance.randint(1, 6)):
        known = [step["id"] for step in steps]
        step: dict[str, Any] = {"id": f"s{number}", "command": "true"}
        optional = {
            "depends_on": chance.sample(known, chance.randint(0, len(known))), "retries": chance.randint(0, 3),
            "timeout_sec": chance.choice([1, 0.25, 3_600]), "env": {"A": "1"}, "cwd": chance.choice(["/", "below", "."]),
            "grace_sec": chance.choice([0, 1.5]), "on_lost": chance.choice(["retry", "fail"]),
            "backoff": {"initial_sec": 0.1, "factor": 1.5, "max_sec": 2, "jitter": chance.choice([0, 0.5])},
        }  # fmt: skip
        step.update({name: value for name, value in optional.items() if chance.random() < 0.4})
        steps.append(step)
    chance.shuffle(steps)
    whole = {"max_parallel": chance.randint(1, 3), "env": {"B": "ü"}, "cwd": "/", "timeout_sec": 60}
    return {"workflow_id": "w", "steps": steps, **{name: each for name, each in whole.items() if chance.random() < 0.3}}


def frame(chance: random.Random, run_id: str, mark: dict[str, str]) -> dict[str, Any]:
    """A request that a client may send, but for the one that ends the daemon. mark: in the environment of what it starts."""
    method = chance.choice([name for name in protocol.PARAMS if name != "shutdown"])
    known = chance.choice(["over", "live", "nobody", run_id])
    # Nothing is on this PATH: whatever word becomes a command, no program is called that.
    environment = {"env": {"PATH": "/nonexistent", **mark}, "umask": 18, "limits": {"core": 0}}
    values: dict[str, Any] = {
        "protocol_min": 1, "protocol_max": 1, "run_id": run_id if method == "submit" else known, "request": f"q{run_id}",
        "from_seq": chance.choice([1, 2, 99]), "only_end": chance.choice([False, True]),
        "base_dir": "/", "cwd": "/", "environment": environment,
        "definition": document(chance) if method == "submit" else None,
    }  # fmt: skip
    params = {name: values[name] for name in protocol.PARAMS[method]}
    return {"jsonrpc": "2.0", "id": chance.choice([1, "x", 0, -5]), "method": method, "params": params}


def log(chance: random.Random) -> Log:
    """A run to which anything happens that can."""
    return logs.random_walk(chance.randrange(1 << 30), turns=chance.choice([3, 10, 40]))


# -- logs --------------------------------------------------------------------------------------------------------------


def mixed(raw: list[bytes], chance: random.Random) -> list[bytes]:
    """Whole lines in another order, missing, or too many; never none at all."""
    whole, raw = raw, list(raw)
    one, two = chance.randrange(len(raw)), chance.randrange(len(raw))
    action = chance.randrange(4)
    if action == 0:
        raw[one], raw[two] = raw[two], raw[one]
    elif action == 1:
        del raw[one]
    elif action == 2:
        raw.insert(two, raw[one])
    else:
        del raw[min(one, two) : max(one, two)]
    return raw or whole


def forged(raw: list[bytes], chance: random.Random) -> list[bytes]:
    """Lines that are changed, mixed up or made up, numbered anew if need be, and sealed again."""
    raw = list(raw)
    if chance.random() < 0.3:
        raw = mixed(raw, chance)
    records = [json.loads(line) for line in raw]
    for _ in range(chance.choice([0, 1, 1, 2])):
        index = chance.randrange(len(records))
        records[index] = _changed_line(records[index], records, chance)
    if chance.random() < 0.7:
        for number, record in enumerate(records, 1):
            record.update(seq=number, durable=min(number - 1, _whole(record.get("durable"))))
    return [_sealed(record) for record in records]


def _whole(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0


def _changed_line(record: dict[str, Any], others: list[dict[str, Any]], chance: random.Random) -> dict[str, Any]:
    name = chance.choice(list(record))
    other = chance.choice(others)
    action = chance.randrange(5)
    if action == 0 and name in other:
        return {**record, name: other[name]}
    if action == 1 and isinstance(record[name], int):
        return {**record, name: max(0, record[name] + chance.choice([-1, 1, 1_000, 10**18]))}
    if action == 2 and "workflow" in record:
        return {**record, "workflow": changed(record["workflow"], chance)}
    if action == 3:
        return {**other, **{name: record[name] for name in ("seq", "durable") if name in record}}
    if chance.random() < 0.5:
        return {**record, name: chance.choice(ODD)}
    line = changed(record, chance)
    return line if isinstance(line, dict) else record


def _sealed(record: dict[str, Any]) -> bytes:
    """The line with the checksum that belongs to it, which is its last key whatever it was before."""
    body = {name: value for name, value in record.items() if name != "crc"}
    return logs.resealed(json.dumps({**body, "crc": "00000000"}, separators=(",", ":")).encode() + b"\n")
