"""The Unix socket: accept, authorise, frame, reply.

Rules
* Only a peer with the daemon's own uid is listened to; the kernel tells (SO_PEERCRED, LOCAL_PEERCRED), besides the modes
  of directory and socket.
* A connection has one request in hand at a time; the next is taken out of its inbox when `answer` has been called. So
  replies keep the order, and a thousand requests sent at once cost one answer's memory.
* Nothing here blocks. A connection whose peer does not read is not read from either, once OUTBOX_LIMIT_BYTES wait for
  it, and it is closed when it takes nothing for STUCK_SEC: it slows nobody and its memory is bounded.
* All peers together are bounded, too: beyond HELD_LIMIT_BYTES whoever holds most is let go of.
* This file knows frames, not their meaning: it hands lines to the supervisor and sends what it is given.
"""

from __future__ import annotations

import operator
import os
import selectors
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

from wfd.protocol import MAX_FRAME_BYTES, PARSE_ERROR, STALLED, ProtocolError, error

# Above this a connection is not read from and gets no more events until it has taken some.
OUTBOX_LIMIT_BYTES = 1 << 20
# What the daemon holds of all its peers, half requests and answers that nobody takes: a few of the largest requests at
# once. Without it, a thousand peers would have 64 MiB each. From half of it on a watcher gets no more before it has taken
# what it has, so that those who only read slowly are not let go of.
HELD_LIMIT_BYTES = 4 * MAX_FRAME_BYTES
# A peer that takes nothing for so long while something waits for it is dropped. A viewer reconnects where it was.
STUCK_SEC = 60
# A client needs one; a thousand watchers are a test, more are a mistake. Below the usual limit of 1,024 descriptors
# with room for the journals of live runs.
MAX_CONNECTIONS = 1_200
# While descriptors are short, accepting waits so long instead of spinning.
_ACCEPT_PAUSE_MS = 200
_BACKLOG = 128
_RECEIVE_BYTES = 1 << 16


class Connection:
    """One client. inbox, outbox: bytes not taken yet, by us and by it; is_busy: a request is in hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.held = 0
        self.searched = 0
        self.progress_ms = 0
        self.mask = 0
        self.is_busy = False
        self.is_splitting = False
        self.is_closing = False
        self.is_closed = False

    @property
    def is_full(self) -> bool:
        return len(self.outbox) >= OUTBOX_LIMIT_BYTES


class Server:
    """All connections of the daemon."""

    def __init__(self, selector: selectors.BaseSelector, now_ms: Callable[[], int]) -> None:
        self._selector = selector
        self._now_ms = now_ms
        self._listeners: list[socket.socket] = []
        self._resume_accept_ms: int | None = None
        self._with_output: dict[Connection, None] = {}
        self._held = 0
        self.connections: dict[Connection, None] = {}
        self.on_line: Callable[[Connection, bytes], None] = lambda connection, line: None
        self.on_room: Callable[[Connection], None] = lambda connection: None
        self.on_close: Callable[[Connection], None] = lambda connection: None

    @property
    def is_crowded(self) -> bool:
        return self._held > HELD_LIMIT_BYTES // 2

    def listen(self, listener: socket.socket) -> None:
        """Accept clients from this bound socket from now on."""
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._listeners.append(listener)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def welcome(self, sock: socket.socket) -> Connection:
        """Serve an already connected socket."""
        sock.setblocking(False)
        connection = Connection(sock)
        self.connections[connection] = None
        self._watch(connection)
        return connection

    def deadline_ms(self) -> int | None:
        """When `tick` has something to do, or None."""
        stuck = [connection.progress_ms + STUCK_SEC * 1000 for connection in self._with_output]
        if self._resume_accept_ms is not None:
            stuck.append(self._resume_accept_ms)
        return min(stuck, default=None)

    def tick(self) -> None:
        """Drop stuck peers; accept again after a pause."""
        now_ms = self._now_ms()
        for connection in [c for c in self._with_output if c.progress_ms + STUCK_SEC * 1000 <= now_ms]:
            self.close(connection)
        if self._resume_accept_ms is not None and self._resume_accept_ms <= now_ms:
            self._resume_accept_ms = None
            for listener in self._listeners:
                try:
                    self._selector.register(listener, selectors.EVENT_READ, self._accept)
                except KeyError:
                    continue
                except OSError:
                    self._resume_accept_ms = now_ms + _ACCEPT_PAUSE_MS

    def send(self, connection: Connection, data: bytes) -> None:
        """Queue bytes for a peer and try to send them at once."""
        if connection.is_closed:
            return
        if not connection.outbox:
            connection.progress_ms = self._now_ms()
        connection.outbox += data
        self._flush(connection)

    def answer(self, connection: Connection, data: bytes) -> None:
        """Send the reply to the request in hand (b"" for a notification), and go on with the next."""
        connection.is_busy = False
        self.send(connection, data)
        self._split(connection)

    def close(self, connection: Connection) -> None:
        """Let go of a connection now."""
        if connection.is_closed:
            return
        connection.is_closed = True
        if connection.mask:
            # A change that the system has refused leaves it unknown to the selector.
            with suppress(KeyError):
                self._selector.unregister(connection.socket)
        connection.socket.close()
        self.connections.pop(connection, None)
        self._with_output.pop(connection, None)
        self._held -= connection.held
        self.on_close(connection)

    def close_when_sent(self, connection: Connection, last: bytes = b"") -> None:
        """Send what waits and these last bytes, read no more, then close."""
        connection.is_closing = True
        connection.inbox.clear()
        self.send(connection, last)

    def close_all(self) -> None:
        """Stop listening and let go of everyone, after one last try to send what waits."""
        for listener in self._listeners:
            with suppress(KeyError):
                self._selector.unregister(listener)
            listener.close()
        for connection in list(self.connections):
            self._flush(connection)
            self.close(connection)

    # -- readiness ------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, mask: int) -> None:
        while len(self.connections) < MAX_CONNECTIONS:
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError:
                # No descriptors: the backlog keeps them waiting, and the selector would report it without end.
                break
            if peer_uid(sock) != os.geteuid():
                sock.close()
                continue
            self.welcome(sock)
        self._resume_accept_ms = self._now_ms() + _ACCEPT_PAUSE_MS
        for other in self._listeners:
            with suppress(KeyError):
                self._selector.unregister(other)

    def ready(self, connection: Connection, mask: int) -> None:
        """The selector's call: the peer's bytes have come, or there is room for ours."""
        if mask & selectors.EVENT_WRITE:
            self._flush(connection)
        # Sending may have let in the next request, or closed the connection: then it is not to be read any more.
        if mask & connection.mask & selectors.EVENT_READ and not connection.is_closed:
            self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close(connection)
            return
        if not data:
            # The peer will ask no more, but may still read what it has asked for (`printf … | socat - UNIX:wfd.sock`).
            self.close_when_sent(connection)
            return
        try:
            connection.inbox += data
        except MemoryError:
            self.close(connection)
            return
        self._split(connection)

    def _split(self, connection: Connection) -> None:
        """Hand over the whole lines, one after another, as long as the peer takes the answers."""
        if connection.is_splitting:
            # on_line has answered at once: the loop below goes on, or a thousand bad lines would be as many frames deep.
            return
        inbox = connection.inbox
        connection.is_splitting = True
        while not (connection.is_busy or connection.is_closing or connection.is_closed or connection.is_full):
            end = inbox.find(b"\n", connection.searched)
            if end < 0:
                connection.searched = len(inbox)
                break
            try:
                with memoryview(inbox) as view:
                    # A slice of the bytearray itself would be a copy of its own: 64 MiB may be a lot.
                    line = bytes(view[:end])
            except MemoryError:
                self.close(connection)
                break
            del inbox[: end + 1]
            connection.searched = 0
            connection.is_busy = True
            self.on_line(connection, line)
        connection.is_splitting = False
        if len(inbox) > MAX_FRAME_BYTES and connection.searched == len(inbox):
            problem = ProtocolError(PARSE_ERROR, f"a line is longer than {MAX_FRAME_BYTES} bytes")
            self.close_when_sent(connection, error(None, problem))
        self._watch(connection)

    def _flush(self, connection: Connection) -> None:
        outbox = connection.outbox
        was_full = connection.is_full
        try:
            while outbox:
                sent = connection.socket.send(outbox)
                del outbox[:sent]
                connection.progress_ms = self._now_ms()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close(connection)
            return
        if outbox:
            self._with_output[connection] = None
        else:
            self._with_output.pop(connection, None)
            if connection.is_closing:
                self.close(connection)
                return
        self._watch(connection)
        if was_full and not connection.is_full:
            self._split(connection)
        if not outbox and not connection.is_closed:
            self.on_room(connection)

    def _hold(self, connection: Connection) -> None:
        """Count what is held of a peer, and let go of those that hold most when it is too much of all together."""
        held = len(connection.inbox) + len(connection.outbox)
        self._held += held - connection.held
        connection.held = held
        while self._held > HELD_LIMIT_BYTES:
            largest = max(self.connections, key=operator.attrgetter("held"))
            if largest.outbox:
                self.close(largest)
            else:
                why = f"the daemon holds more than {HELD_LIMIT_BYTES} bytes of unfinished requests: try again later"
                self.close_when_sent(largest, error(None, ProtocolError(STALLED, why)))

    def _watch(self, connection: Connection) -> None:
        """Tell the selector what this connection waits for."""
        if not connection.is_closed:
            self._hold(connection)
        if connection.is_closed:
            return
        reads = not (connection.is_full or connection.is_closing or connection.is_busy)
        mask = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if connection.outbox else 0)
        if mask == connection.mask:
            return

        def ready(_: socket.socket, mask: int) -> None:
            self.ready(connection, mask)

        try:
            if not connection.mask:
                self._selector.register(connection.socket, mask, ready)
            elif not mask:
                self._selector.unregister(connection.socket)
            else:
                self._selector.modify(connection.socket, mask, ready)
        except OSError:
            # epoll_ctl(2): ENOMEM, and ENOSPC beyond the user's number of watches.
            self.close(connection)
            return
        connection.mask = mask


def peer_uid(sock: socket.socket) -> int:
    """The effective uid of the process at the other end, as the kernel has it. -1 when it does not tell."""
    try:
        if sys.platform == "darwin":
            # struct xucred of <sys/ucred.h>: version, uid, ngroups, groups[16]; SOL_LOCAL is 0, LOCAL_PEERCRED 1.
            return int(struct.unpack("2Ih16I", sock.getsockopt(0, 1, struct.calcsize("2Ih16I")))[1])
        return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
    except OSError:
        return -1
