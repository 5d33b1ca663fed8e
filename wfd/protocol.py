"""What the daemon and its clients say to each other: JSON-RPC 2.0, one object a line, over a Unix socket.

    -> {"jsonrpc":"2.0","id":1,"method":"status","params":{"run_id":"20261123-072412-k3fq"}}
    <- {"jsonrpc":"2.0","id":1,"result":{…}}
    <- {"jsonrpc":"2.0","id":1,"error":{"code":-32001,"message":"…","data":{…}}}
    <- {"jsonrpc":"2.0","method":"event","params":{"run_id":"…","line":{…}}}        (after a watch; no id, no answer)

Methods and params (all of params are required unless marked ?):

    hello     {"protocol_min":1,"protocol_max":1}          -> {"protocol":1,"pid":…,"home":…,"socket":…,"version":…,…}
    submit    {"run_id":…,"definition":{…},"base_dir":…,"cwd":…,"environment":{"env":{…},"umask":18,"limits":{…}}}
                                                           -> {"run_id":…,"workflow_id":…,"state":…,"created":true}
    status    {"run_id":…}                                 -> the object of `status --json`
    list      {}                                           -> {"runs":[…]}     the live ones; the others are on disk
    cancel    {"run_id":…,"request":…}                     -> {"run_id":…,"state":…}
    retry     {"run_id":…,"request":…}                     -> {"run_id":…,"state":…}
    watch     {"run_id":…,"from_seq":1,"only_end"?:false}  -> {"run_id":…,"state":…,"last_seq":…}, then the events
                                                              (only_end: only the one that ends the run, if that is to come)
    shutdown  {"cancel_runs"?:false}                       -> {}               and the daemon ends

A request that changes something carries an id that the client made (`run_id`, `request`), so that repeating it changes
nothing. Replies come in the order of the requests of one connection. Lines are at most MAX_FRAME_BYTES long.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from wfd.values import Value

PROTOCOL_MIN = 1
PROTOCOL_MAX = 1

# A definition of 100,000 steps is about 20 MB; what is longer than this is no request but an attack or a mistake.
MAX_FRAME_BYTES = 64 << 20

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
NO_SUCH_RUN = -32001
RUN_EXISTS = -32002  # the same run id with another definition
INVALID_DEFINITION = -32003  # data: {"problems": [{"path", "message"}, …]}
DAMAGED = -32004  # the run is quarantined
STALLED = -32005  # not durable (disk full, …): nothing was changed, try again later
UNSUPPORTED_PROTOCOL = -32006
NOT_FINISHED = -32007  # retry of a run that still runs
READ_THE_LOG = -32008  # finished, and too long to be folded in the daemon's loop: the client reads the log itself
SHUTTING_DOWN = -32009


class ProtocolError(Exception):
    """An answer that is an error: `code` is one of the constants above. is_told: a notification is not answered even
    when it cannot be carried out, but a line in which no request can be read is."""

    def __init__(self, code: int, message: str, data: object = None, request_id: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data
        self.request_id = request_id
        self.is_told = request_id is not None or code in (PARSE_ERROR, INVALID_REQUEST)


class Request(Value):
    """One request. id None: a notification, which gets no answer."""

    __slots__ = ()
    id: str | int | None
    method: str
    params: dict[str, object]


# For each method: the params it takes, their types, and whether they may be left out.
PARAMS: dict[str, dict[str, tuple[type, bool]]] = {
    "hello": {"protocol_min": (int, False), "protocol_max": (int, False)},
    "submit": {
        "run_id": (str, False),
        "definition": (dict, False),
        "base_dir": (str, False),
        "cwd": (str, False),
        "environment": (dict, False),
    },
    "status": {"run_id": (str, False)},
    "list": {},
    "cancel": {"run_id": (str, False), "request": (str, False)},
    "retry": {"run_id": (str, False), "request": (str, False)},
    "watch": {"run_id": (str, False), "from_seq": (int, False), "only_end": (bool, True)},
    "shutdown": {"cancel_runs": (bool, True)},
}

_encode: Callable[[object], str] = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode


def request(method: str, params: dict[str, object], request_id: str | int = 1) -> bytes:
    """A request's line."""
    return _line({"jsonrpc": "2.0", "id": request_id, "method": method, "params": params})


def result(request_id: str | int | None, value: object) -> bytes:
    """A reply's line."""
    return _line({"jsonrpc": "2.0", "id": request_id, "result": value})


def error(request_id: object, problem: ProtocolError) -> bytes:
    """An error's line."""
    body: dict[str, object] = {"code": problem.code, "message": problem.message}
    if problem.data is not None:
        body["data"] = problem.data
    return _line({"jsonrpc": "2.0", "id": request_id, "error": body})


_EVENT_BEGIN = b'{"jsonrpc":"2.0","method":"event",'
_LINE_KEY = b',"line":'
_EVENT_END = b"}}"


def notifications(run_id: str, lines: bytes) -> bytes:
    """What a watcher is sent of these log lines (whole ones), each passed on byte by byte."""
    begin = b'%b"params":{"run_id":%b%b' % (_EVENT_BEGIN, _encode(run_id).encode("ascii"), _LINE_KEY)
    end = _EVENT_END + b"\n"
    # Joined at once: line 1 may be megabytes, and each copy of it stands in the peak of the daemon's memory.
    return b"".join((begin, lines[:-1].replace(b"\n", end + begin), end))


def line_of(frame: bytes) -> bytes:
    """The log line (without its newline) in a watcher's notification: the very bytes of the log, so that their checksum can
    be checked. Raises ProtocolError when the frame is no such notification."""
    # The first key of that name is ours: a run id holds no quotes.
    before, key, rest = frame.partition(_LINE_KEY)
    if not (key and before.startswith(_EVENT_BEGIN) and rest.endswith(_EVENT_END)):
        raise ProtocolError(INVALID_REQUEST, "what follows a watch is not an event")
    return rest[: -len(_EVENT_END)]


def parse_request(line: bytes) -> Request:
    """The request in a line (without its newline). Raises ProtocolError, which is the answer."""
    record = _parse(line)
    request_id = record.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int, type(None))):
        raise ProtocolError(INVALID_REQUEST, "id must be a string or a whole number")
    method, params = record.get("method"), record.get("params", {})
    if record.get("jsonrpc") != "2.0" or not isinstance(method, str):
        raise ProtocolError(INVALID_REQUEST, 'a request has "jsonrpc":"2.0" and a "method"', None, request_id)
    if method not in PARAMS:
        known = ", ".join(PARAMS)
        raise ProtocolError(METHOD_NOT_FOUND, f"no method {method!r}; there are {known}", None, request_id)
    problem = _params_problem(method, params)
    if problem or not isinstance(params, dict):
        raise ProtocolError(INVALID_PARAMS, f"{method}: {problem}", None, request_id)
    return Request(request_id, method, params)


def _params_problem(method: str, params: object) -> str:
    if not isinstance(params, dict):
        return "params must be an object"
    wanted = PARAMS[method]
    for name in params:
        if name not in wanted:
            return f"unknown param {name!r}"
    for name, (kind, optional) in wanted.items():
        if name not in params:
            if not optional:
                return f"the param {name!r} is missing"
        elif type(params[name]) is not kind:
            return f"the param {name!r} must be {_KIND_NAMES[kind]}"
    return ""


_KIND_NAMES: dict[type, str] = {int: "a whole number", str: "a string", dict: "an object", bool: "true or false"}


def parse_message(line: bytes) -> dict[str, object]:
    """What a client hears: a reply or a notification. Raises ProtocolError when it is neither."""
    record = _parse(line)
    if record.get("jsonrpc") != "2.0" or record.keys().isdisjoint({"result", "error", "method"}):
        raise ProtocolError(INVALID_REQUEST, "the answer is not JSON-RPC 2.0")
    return record


def _parse(line: bytes) -> dict[str, object]:
    try:
        record = _decode(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ProtocolError(PARSE_ERROR, "the line is not JSON") from None
    if not isinstance(record, dict):
        raise ProtocolError(INVALID_REQUEST, "the line is not a JSON object (batches are not supported)")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


# `json.loads` sets up a decoder for each call that names parse_constant.
_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _line(record: dict[str, object]) -> bytes:
    return _encode(record).encode("ascii") + b"\n"
