"""Hostile input for a daemon: frames on its socket, and what it may find when it takes over what another has left.

A frame's row tells the code of the one answer (0: a result, None: no answer), a part of it, and the id in it. The rows
are carried out by hostile.py, all of them by one daemon that has a run of its own to go on with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from wfd import protocol
from wfd.paths import Home
from wfd.protocol import (
    INVALID_DEFINITION,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    NO_SUCH_RUN,
    PARSE_ERROR,
    UNSUPPORTED_PROTOCOL,
)


class Frame(NamedTuple):
    """A line as it is sent, the code of its answer, a part of it, and the id in it."""

    name: str
    line: bytes
    code: int | None
    words: str
    id: object = 1


class Found(NamedTuple):
    """What is in the place of a file of an unfinished run, and why the daemon refuses the run ("": it goes on with it)."""

    name: str
    put: Callable[[Home, str], object]
    words: str
    needs_root: bool = False


class Status(NamedTuple):
    """A status file whose attempt nobody keeps any more, and the event that tells what has become of that attempt."""

    name: str
    content: bytes | Callable[[str], object]
    event: str
    fields: dict[str, object]


def _frame(method: str, **params: object) -> bytes:
    return protocol.request(method, params)[:-1]


def _raw(members: str) -> bytes:
    """A request with these members, as they are."""
    return b'{"jsonrpc":"2.0","id":1,%b}' % members.encode("utf-8", "surrogatepass")


_ENVIRONMENT = {"env": {}, "umask": 18, "limits": {}}
_DEFINITION = {"workflow_id": "w", "steps": [{"id": "a", "command": "true"}]}


def _submit(**params: object) -> bytes:
    good = {"run_id": "new", "definition": _DEFINITION, "base_dir": "/", "cwd": "/", "environment": _ENVIRONMENT}
    return _frame("submit", **{**good, **params})


def _environment(**fields: object) -> bytes:
    return _submit(environment={**_ENVIRONMENT, **fields})


FRAMES: tuple[Frame, ...] = (
    # What is no request at all.
    Frame("UTF-16", _frame("list").decode().encode("utf-16"), PARSE_ERROR, "not JSON", None),
    Frame("a byte order mark", b"\xef\xbb\xbf" + _frame("list"), PARSE_ERROR, "not JSON", None),
    Frame("a greeting in TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", PARSE_ERROR, "not JSON", None),
    Frame("zeros", bytes(70_000), PARSE_ERROR, "not JSON", None),
    Frame("a carriage return", b"\r", PARSE_ERROR, "not JSON", None),
    Frame("a header of another protocol", b"Content-Length: 63\r", PARSE_ERROR, "not JSON", None),
    Frame("two requests in a line", _frame("list") + _frame("list"), PARSE_ERROR, "not JSON", None),
    Frame("objects without end", b'{"a":' * 50_000, PARSE_ERROR, "not JSON", None),
    Frame("a batch", b"[" + _frame("list") + b"]", INVALID_REQUEST, "batches are not supported", None),
    Frame("a text", b'"list"', INVALID_REQUEST, "not a JSON object", None),
    Frame("infinity", _raw('"method":"list","params":{"x":Infinity}'), PARSE_ERROR, "not JSON", None),
    Frame("an id of 5,000 digits", b'{"jsonrpc":"2.0","id":%b,"method":"list"}' % (b"9" * 5_000), PARSE_ERROR,
          "not JSON", None),
    # Ids.
    Frame("an id of 4,000 digits", b'{"jsonrpc":"2.0","id":%b,"method":"list"}' % (b"9" * 4_000), 0, "", int("9" * 4_000)),
    Frame("an id that is a list", b'{"jsonrpc":"2.0","id":[1],"method":"list"}', INVALID_REQUEST, "id must be", None),
    Frame("an id beyond floats", b'{"jsonrpc":"2.0","id":1e999,"method":"list"}', INVALID_REQUEST, "id must be", None),
    Frame("a lone surrogate for an id", b'{"jsonrpc":"2.0","id":"\\ud800","method":"list"}', 0, "", "\ud800"),
    Frame("an id twice", b'{"jsonrpc":"2.0","id":2,"id":3,"method":"list"}', 0, "", 3),
    Frame("no id", b'{"jsonrpc":"2.0","method":"list"}', None, ""),
    Frame("no id, and no such method", b'{"jsonrpc":"2.0","method":"lst"}', None, ""),
    Frame("no id, and no such param", b'{"jsonrpc":"2.0","method":"list","params":{"x":1}}', None, ""),
    # Methods and params.
    Frame("no method", _raw('"method":""'), METHOD_NOT_FOUND, "no method ''"),
    Frame("a method of Python's", _raw('"method":"__init__"'), METHOD_NOT_FOUND, "no method '__init__'"),
    Frame("a method that colours", _raw('"method":"\\u001b[31m"'), METHOD_NOT_FOUND, r"\x1b[31m"),
    Frame("a method of a megabyte", _raw(f'"method":"{"x" * (1 << 20)}"'), METHOD_NOT_FOUND, "there are hello, submit"),
    Frame("a method that is an object", _raw('"method":{}'), INVALID_REQUEST, '"method"'),
    Frame("params that are a text", _raw('"method":"list","params":"all"'), INVALID_PARAMS, "params must be an object"),
    Frame("a param nested deep", _raw(f'"method":"list","params":{{"x":{"[" * 500}{"]" * 500}}}'), INVALID_PARAMS, "'x'"),
    Frame("a param of no name", _raw('"method":"list","params":{"":1}'), INVALID_PARAMS, "unknown param ''"),
    Frame("a run that is null", _raw('"method":"status","params":{"run_id":null}'), INVALID_PARAMS, "must be a string"),
    Frame("a protocol without end", _frame("hello", protocol_min=10**100, protocol_max=10**200), UNSUPPORTED_PROTOCOL,
          "speaks"),
    Frame("protocols backwards", _frame("hello", protocol_min=9, protocol_max=1), UNSUPPORTED_PROTOCOL, "not 9 to 1"),
    Frame("a stop that is half meant", _frame("shutdown", cancel_runs=None), INVALID_PARAMS, "must be true or false"),
    # Runs.
    Frame("a run that is a directory up", _frame("status", run_id=".."), NO_SUCH_RUN, "there is no run .."),
    Frame("a run that is a file", _frame("status", run_id="/etc/passwd"), NO_SUCH_RUN, "there is no run /etc/passwd"),
    Frame("a run through a run", _frame("cancel", run_id="live/../live", request="q"), NO_SUCH_RUN, "there is no run"),
    Frame("a run in wide letters", _frame("watch", run_id="\uff4c\uff49\uff56\uff45", from_seq=1), NO_SUCH_RUN,
          "there is no run"),
    Frame("a run that is a surrogate", _raw('"method":"status","params":{"run_id":"\\udcff"}'), NO_SUCH_RUN,
          "there is no run"),
    Frame("the latest run", _frame("retry", run_id="@latest", request="q"), NO_SUCH_RUN, "there is no run @latest"),
    Frame("line 10³⁰", _frame("watch", run_id="over", from_seq=10**30), 0, "SUCCEEDED"),
    Frame("line -10³⁰", _frame("watch", run_id="over", from_seq=-(10**30)), 0, "SUCCEEDED"),
    Frame("a cancel of nobody", _frame("cancel", run_id="over", request=""), 0, "SUCCEEDED"),
    Frame("a cancel that is a surrogate", _raw('"method":"cancel","params":{"run_id":"over","request":"\\ud800"}'), 0, ""),
    Frame("a retry of what runs", _frame("retry", run_id="live", request="q"), protocol.NOT_FINISHED, "is not over"),
    Frame("a retry of what has succeeded", _frame("retry", run_id="over", request="q"), protocol.NOT_FINISHED, "SUCCEEDED"),
    # Submissions.
    Frame("a new run's path", _submit(run_id="../new"), INVALID_PARAMS, "is no run id"),
    Frame("a new run that hides", _submit(run_id=".new"), INVALID_PARAMS, "is no run id"),
    Frame("a new run that ends in a dot", _submit(run_id="new."), INVALID_PARAMS, "is no run id"),
    Frame("a new run with a newline", _submit(run_id="new\n"), INVALID_PARAMS, "is no run id"),
    Frame("a run that is there", _submit(run_id="over", definition={**_DEFINITION, "max_parallel": 1}),
          protocol.RUN_EXISTS, "has another definition"),
    Frame("a relative directory", _submit(cwd="tmp"), INVALID_PARAMS, "cwd must be an absolute path"),
    Frame("a surrogate of no byte in a directory", _submit(cwd="/\ud800"), INVALID_PARAMS, "cwd must be an absolute path"),
    Frame("a base that is relative", _submit(base_dir="."), INVALID_DEFINITION, "base_dir"),
    Frame("a base with NUL", _submit(base_dir="/\0"), INVALID_DEFINITION, "base_dir"),
    Frame("a base of a megabyte", _submit(base_dir="/" + "x" * (1 << 20)), INVALID_DEFINITION, "at most 4095"),
    Frame("a definition nested deep", _submit(definition={"a": json.loads("[" * 300 + "]" * 300)}),
          INVALID_DEFINITION, "$.a: unknown field"),
    Frame("a definition that goes in circles", _submit(definition={"workflow_id": "w", "steps": [
        {"id": "a", "command": "true", "depends_on": ["a"]}]}), INVALID_DEFINITION, "depends on itself"),
    Frame("one field too many", _submit(priority=1), INVALID_PARAMS, "unknown param 'priority'"),
    Frame("a variable with NUL", _environment(env={"A\0": ""}), INVALID_PARAMS, "no NUL"),
    Frame("a variable that is a surrogate of no byte", _environment(env={"A": "\ud800"}), INVALID_PARAMS,
          "no lone surrogate"),
    Frame("a variable that is null", _environment(env={"A": None}), INVALID_PARAMS, "names to strings"),
    Frame("a umask that is a fraction", _environment(umask=18.0), INVALID_PARAMS, "environment.umask"),
    Frame("a umask below zero", _environment(umask=-1), INVALID_PARAMS, "environment.umask"),
    Frame("a limit below none", _environment(limits={"nofile": -2}), INVALID_PARAMS, "environment.limits"),
    Frame("a limit that is true", _environment(limits={"nofile": True}), INVALID_PARAMS, "environment.limits"),
    Frame("an environment that says more", _environment(argv=[]), INVALID_PARAMS, "environment must be"),
)  # fmt: skip


# -- what a daemon takes over -------------------------------------------------------------------------------------------


def _environment_is(content: bytes | Callable[[str], object]) -> Callable[[Home, str], None]:
    def put(home: Home, run_id: str) -> None:
        path = home.run(run_id).environment
        os.unlink(path)
        if isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            content(path)

    return put


def _marker_is(make: Callable[[str], object]) -> Callable[[Home, str], None]:
    def put(home: Home, run_id: str) -> None:
        os.unlink(f"{home.live}/{run_id}")
        make(f"{home.live}/{run_id}")

    return put


def _give_away(name: str) -> Callable[[Home, str], None]:
    return lambda home, run_id: os.chown(f"{home.run(run_id).directory}/{name}", 65534, 65534)


def _linked(home: Home, run_id: str) -> None:
    os.link(home.run(run_id).events, f"{home.directory}/name-of-{run_id}")


TAKEN_OVER: tuple[Found, ...] = (
    Found("nothing unusual", lambda home, run_id: None, ""),
    Found("a log of two names", _linked, ""),
    Found("an empty environment", _environment_is(b""), "environment.json is not what was written"),
    Found("an environment that is null", _environment_is(b"null"), "environment.json is not what was written"),
    Found("an environment of nobody", _environment_is(b'{"env":{}}'), "environment.json is not what was written"),
    Found("an environment nested without end", _environment_is(b"[" * 100_000), "environment.json is not what was written"),
    Found("an environment that is no text", _environment_is(b"\xff\xfe\0"), "environment.json is not what was written"),
    Found("a umask of four digits", _environment_is(b'{"env":{},"umask":512,"limits":{}}'), "environment.umask"),
    Found("NUL in a variable", _environment_is(b'{"env":{"A":"\\u0000"},"umask":18,"limits":{}}'), "environment.env"),
    Found("no environment", _environment_is(lambda path: None), "environment.json is missing"),
    Found("a FIFO for an environment", _environment_is(os.mkfifo), "environment.json is not a plain file"),
    Found("a directory for an environment", _environment_is(os.mkdir), "environment.json is not a plain file"),
    Found("/dev/zero for an environment", _environment_is(lambda path: os.symlink("/dev/zero", path)),
          "environment.json cannot be opened"),
    Found("a link to itself for an environment", _environment_is(lambda path: os.symlink(path, path)),
          "environment.json cannot be opened"),
    Found("a directory for a marker", _marker_is(os.mkdir), ""),
    Found("a FIFO for a marker", _marker_is(os.mkfifo), ""),
    Found("a link to nothing for a marker", _marker_is(lambda path: os.symlink("nothing", path)), ""),
    Found("a log of another owner", _give_away("events.ndjson"), "events.ndjson belongs to uid 65534", True),
    Found("a run of another owner", _give_away("."), "its directory belongs to uid 65534", True),
    Found("an environment of another owner", _give_away("environment.json"), "environment.json belongs to uid 65534", True),
)  # fmt: skip

_LOST: tuple[str, dict[str, object]] = ("attempt_lost", {"why": "killed"})
_NEVER: tuple[str, dict[str, object]] = ("attempt_not_started", {"why": "never_began"})

# {pid}: of a stranger, who must not be signalled.
STATUSES: tuple[Status, ...] = (
    Status("an end", b"status 1\npid {pid}\nexit 0\n", "attempt_exited", {"exit_code": 0}),
    Status("an end of 255", b"status 1\npid {pid}\nexit 255\n", "attempt_exited", {"exit_code": 255}),
    Status("a directory that was not there", b"status 1\nerror cwd\n", "attempt_not_started", {"why": "cwd"}),
    Status("nothing", b"", *_NEVER),
    Status("half of the first line", b"stat", *_NEVER),
    Status("no more than the first line", b"status 1\n", *_NEVER),
    Status("half a pid", b"status 1\npid {pid}", *_NEVER),
    Status("half an end", b"status 1\npid {pid}\nexit 0", *_LOST),
    Status("a stranger's pid", b"status 1\npid {pid}\n", *_LOST),
    Status("an end of 999", b"status 1\npid {pid}\nexit 999\n", *_LOST),
    Status("an end below zero", b"status 1\npid {pid}\nexit -1\n", *_LOST),
    Status("an end of many digits", b"status 1\npid {pid}\nexit " + b"9" * 5_000 + b"\n", *_LOST),
    Status("two pids", b"status 1\npid {pid}\npid {pid}\n", *_LOST),
    Status("two ends", b"status 1\npid {pid}\nexit 1\nexit 0\n", *_LOST),
    Status("an end before the pid", b"status 1\nexit 0\npid {pid}\n", *_LOST),
    Status("pid 0, the daemon's own group", b"status 1\npid 0\n", *_LOST),
    Status("pid 1", b"status 1\npid 1\n", *_LOST),
    Status("pid -1, everybody", b"status 1\npid -1\n", *_LOST),
    Status("pid 2147483647", b"status 1\npid 2147483647\n", *_LOST),
    Status("pid 4294967297", b"status 1\npid 4294967297\n", *_LOST),
    Status("pid of many digits", b"status 1\npid " + b"9" * 400 + b"\n", *_LOST),
    Status("a later version", b"status 2\npid {pid}\nexit 0\n", *_LOST),
    Status("Windows ends of lines", b"status 1\r\npid {pid}\r\nexit 0\r\n", *_LOST),
    Status("one line twice", b"status 1\nstatus 1\nexit 0\n", *_LOST),
    Status("something behind it", b"status 1\npid {pid}\nexit 0\nhello\n", *_LOST),
    Status("zeros", bytes(4_096), *_LOST),
    Status("no end of text", b"status 1\n" + b"pid {pid}\n" * 2_000, *_LOST),
    Status("bytes of no kind", bytes(range(256)), *_LOST),
    Status("a directory", os.mkdir, *_LOST),
    Status("a FIFO", os.mkfifo, *_LOST),
    Status("a link", lambda path: os.symlink("/dev/zero", path), *_LOST),
    Status("a link to nothing", lambda path: os.symlink("/no/such", path), *_LOST),
)  # fmt: skip
