"""Clients of a simulated daemon, the sockets between them, and the selector.

A `Caller` repeats one request until it is acknowledged, through daemons that die before, during and after it; sometimes
it repeats it once more afterwards. A `Watcher` follows a run for ever and must see every line once, in order. What a
client hears it tells the history at once, in the very call in which the daemon sends it: nothing later excuses an answer
that was not true yet.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tests.simulated_kernel import NEVER, Broken, Kernel

_READ, _WRITE = 1, 2
# Errors that say "not now": stalled, shutting down, no such run (yet), not finished (yet).
_LATER = frozenset({-32005, -32009, -32001, -32007})
_DAMAGED = -32004
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_EVENT = b'{"jsonrpc":"2.0","method":"event","params":{"run_id":"%b","line":'


class SimulatedSocket:
    """The daemon's end. room: bytes that the peer's end takes at once, None for any number."""

    def __init__(self, kernel: Kernel, client: Client) -> None:
        self._kernel = kernel
        self._client = client
        self.inbound = bytearray()
        self.has_eof = False
        self.room: int | None = None

    def setblocking(self, flag: bool) -> None:
        pass

    def recv(self, size: int) -> bytes:
        kernel = self._kernel
        kernel.enter("recv", self._client.name)
        if not self.inbound:
            if self.has_eof:
                return b""
            raise BlockingIOError(errno.EAGAIN, "simulated EAGAIN")
        if len(self.inbound) > 1 and kernel.chance.hit(0.05):
            size = 1 + kernel.chance.below(len(self.inbound))
        data = bytes(self.inbound[:size])
        del self.inbound[:size]
        return data

    def send(self, data: bytes) -> int:
        kernel = self._kernel
        kernel.enter("send", self._client.name)
        if self.has_eof:
            raise BrokenPipeError(errno.EPIPE, "simulated EPIPE")
        if self.room is None:
            self._client.receive(bytes(data))
            return len(data)
        sent = min(len(data), self.room)
        if not sent:
            raise BlockingIOError(errno.EAGAIN, "simulated EAGAIN")
        self.room -= sent
        self._client.receive(bytes(data[:sent]))
        return sent

    def close(self) -> None:
        if self._client.socket is self and not self._kernel.is_dead:
            self._client.hang_up()


class SimulatedSelector:
    """What the daemon waits with. `arrivals`: connections that nobody has accepted yet."""

    def __init__(self, kernel: Kernel, welcome: Callable[[SimulatedSocket], None]) -> None:
        self._kernel = kernel
        self._welcome = welcome
        self._keys: dict[SimulatedSocket, tuple[int, Any]] = {}
        self.arrivals: list[SimulatedSocket] = []

    def register(self, fileobj: SimulatedSocket, mask: int, data: Any) -> None:
        assert fileobj not in self._keys
        self._keys[fileobj] = mask, SimpleNamespace(fileobj=fileobj, data=data)

    def modify(self, fileobj: SimulatedSocket, mask: int, data: Any) -> None:
        del self._keys[fileobj]
        self.register(fileobj, mask, data)

    def unregister(self, fileobj: SimulatedSocket) -> None:
        del self._keys[fileobj]

    def select(self, timeout: float | None) -> list[tuple[Any, int]]:
        """Time passes here, event by event, until something is ready. Between any two the daemon may be killed."""
        kernel = self._kernel
        limit_ms = NEVER if timeout is None else kernel.now_ms + int(timeout * 1000 + 0.5)
        while True:
            kernel.enter("select", timeout)
            arrivals, self.arrivals = self.arrivals, []
            for arrival in arrivals:
                if not arrival.has_eof:
                    self._welcome(arrival)
            ready, has_news = self._ready()
            # That somebody has hung up may be heard together with what comes next, instead of at once.
            if has_news or kernel.is_woken or (ready and not (kernel.has_events and kernel.chance.hit(kernel.late_hang_up))):
                kernel.is_woken = False
                return ready
            if kernel.now_ms > kernel.give_up_ms or (limit_ms == NEVER and not kernel.has_events):
                raise Broken("the daemon waits for something that will never come")
            if not kernel.happen(limit_ms):
                return ready

    def _ready(self) -> tuple[list[tuple[Any, int]], bool]:
        """What is ready; and whether any of it is more than the end of a connection."""
        ready, has_news = [], False
        for socket, (mask, key) in self._keys.items():
            mask &= (_READ if socket.inbound or socket.has_eof else 0) | (_WRITE if socket.room != 0 else 0)
            if mask:
                ready.append((key, mask))
                has_news |= bool(socket.inbound) or mask != _READ
        return ready, has_news


def _request(method: str, params: dict[str, object]) -> bytes:
    return _ENCODER.encode({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n"


class Client:
    """Somebody at a terminal. `world` connects it, and hears what it hears."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.kernel = world.kernel
        self.name = name
        self.socket: SimulatedSocket | None = None
        self._inbox = b""
        self._serial = 0

    def wake_in(self, delay_ms: int) -> None:
        """Do the next thing then, unless something has changed meanwhile."""
        self._serial += 1
        serial = self._serial
        self.kernel.after(delay_ms, lambda: self.wake() if serial == self._serial else None)

    def wake(self) -> None:
        raise NotImplementedError

    def ask(self, line: bytes) -> bool:
        """Send a request, on a new connection if need be. False when nobody listens."""
        if self.socket is None:
            self.socket = self.world.connect(self)
            self._inbox = b""
        if self.socket is None:
            return False
        self.kernel.note(f"client {self.name} asks")
        self.socket.inbound += line
        return True

    def let_go(self) -> None:
        """Close the connection."""
        if self.socket is not None:
            self.socket.has_eof = True
            self.socket = None

    def hang_up(self) -> None:
        """The daemon has closed it, or is dead."""
        if self.socket is not None:
            self.socket = None
            self.on_end()

    def on_end(self) -> None:
        self.wake_in(self.kernel.chance.between(5, 400))

    def receive(self, data: bytes) -> None:
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            self.on_message(line)

    def on_message(self, line: bytes) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Error:
    """A refusal."""

    code: int
    message: str


class Caller(Client):
    """Repeats one request until it is acknowledged. `is_done` then; `answer` is the first."""

    def __init__(self, world: World, name: str, method: str, params: dict[str, object]) -> None:
        super().__init__(world, name)
        self.method = method
        self.params = params
        self.line = _request(method, params)
        self.is_done = False
        self.patience = 400

    def wake(self) -> None:
        # Nothing was heard for a while: perhaps the request is lost. A new connection, the same request.
        self.let_go()
        self.ask(self.line)
        self.wake_in(self.kernel.chance.between(300, 3_000))

    def on_message(self, line: bytes) -> None:
        record = json.loads(line)
        self.let_go()
        if "result" in record:
            self.kernel.note(f"client {self.name} hears {record['result'].get('state', 'yes')}")
            was_done, self.is_done = self.is_done, True
            self._serial += 1
            self.world.acknowledged(self, record["result"])
            if not was_done and self.kernel.chance.hit(0.2):
                self.wake_in(self.kernel.chance.below(1_500))
            return
        error = Error(record["error"]["code"], record["error"]["message"])
        self.kernel.note(f"client {self.name} is refused: {error.message}")
        self._refused(error)

    def _refused(self, error: Error) -> None:
        if error.code == _DAMAGED:
            self.world.refused_as_damaged(self, error)
            self.is_done = True
        elif error.code not in _LATER:
            raise Broken(f"{self.method} of {self.params['run_id']} was refused: {error.message}")
        elif self.world.may_give_up(self, error):
            self.is_done = True
        if self.is_done:
            self._serial += 1
        else:
            self.wake_in(self.kernel.chance.between(50, 900))


class Watcher(Client):
    """Sees a run's log come into being."""

    def __init__(self, world: World, name: str, run_id: str, room: int | None) -> None:
        super().__init__(world, name)
        self.run_id = run_id
        self.lines: list[bytes] = []
        self.is_refused = False
        self._room = room
        self._prefix = _EVENT % run_id.encode()

    def wake(self) -> None:
        line = _request("watch", {"run_id": self.run_id, "from_seq": len(self.lines) + 1})
        if self.socket is None and not self.ask(line):
            self.wake_in(self.kernel.chance.between(50, 600))
        if self.socket is not None and self._room is not None:
            # A slow terminal takes a little at a time.
            self.socket.room = self._room
            self.wake_in(60)

    def on_message(self, line: bytes) -> None:
        if line.startswith(self._prefix):
            self.lines.append(line[len(self._prefix) : -2])
            self.world.shown(self)
            return
        record = json.loads(line)
        if "error" in record:
            error = Error(record["error"]["code"], record["error"]["message"])
            self.let_go()
            if error.code == _DAMAGED:
                self.world.refused_as_damaged(self, error)
                self.is_refused = True
            elif error.code not in _LATER:
                raise Broken(f"watch of {self.run_id} was refused: {error.message}")
            else:
                self.wake_in(self.kernel.chance.between(50, 600))


class World:
    """What clients need of the history that they live in."""

    kernel: Kernel

    def connect(self, client: Client) -> SimulatedSocket | None:
        raise NotImplementedError

    def acknowledged(self, caller: Caller, result: dict[str, Any]) -> None:
        raise NotImplementedError

    def refused_as_damaged(self, client: Client, error: Error) -> None:
        raise NotImplementedError

    def may_give_up(self, caller: Caller, error: Error) -> bool:
        raise NotImplementedError

    def shown(self, watcher: Watcher) -> None:
        raise NotImplementedError
