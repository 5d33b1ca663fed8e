"""The daemon's loop without a daemon: in the process of the test, so that a bug put into it (mutations.txt) counts."""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import tempfile
import unittest
from typing import Any
from unittest import mock

from tests import logs
from wfd import machine, protocol
from wfd.paths import Home
from wfd.supervisor import Supervisor


class LoopTest(unittest.TestCase):
    """home: where the loops find their runs."""

    def setUp(self) -> None:
        # A process that keeps orphans does so until its end: whatever any later test leaves, with a daemon that it kills or
        # otherwise, would become a child of the tests' own process, and be a zombie there.
        self.enterContext(mock.patch.object(machine, "keep_orphans", lambda: None))
        self.home = self.fresh_home()

    def fresh_home(self) -> Home:
        return logs.home(self.enterContext(tempfile.TemporaryDirectory()))

    def loop(self, max_parallel: int = 1, boot_id: str = "boot-1") -> Supervisor:
        """Another daemon of the home, which has not looked at any run yet."""
        selector = self.enterContext(contextlib.closing(selectors.DefaultSelector()))
        loop = Supervisor(self.home, "", selector, boot_id, "host", max_parallel)
        self.addCleanup(self.end, loop)
        return loop

    def end(self, loop: Supervisor) -> None:
        """Let go of what it has open. Its runs are left as a kill would leave them."""
        loop.server.close_all()
        while loop.live:
            loop.live.popitem()[1].journal.close()

    def client(self, loop: Supervisor, method: str, **params: object) -> socket.socket:
        """One that has asked, and has its answer after the next turn."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        loop.server.welcome(theirs)
        ours.sendall(protocol.request(method, params))
        ours.settimeout(10)
        return ours

    def ask(self, loop: Supervisor, method: str, **params: object) -> dict[str, Any]:
        """The answer to a request, after one turn that does nothing but what follows from it: a result or an error."""
        ours = self.client(loop, method, **params)
        with ours, ours.makefile("rb") as answers:
            loop.turn(loop.now_ms)
            ours.setblocking(False)
            return json.loads(answers.readline())  # type: ignore[no-any-return]
