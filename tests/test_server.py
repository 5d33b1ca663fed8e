"""Tests of wfd.server and wfd.protocol over real sockets: framing, order, bounded memory, who may come in; and of what the
daemon answers to each bad request."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from unittest import mock

from tests.daemon import Client, Daemon, Refused, others_may_enter, step
from wfd import protocol, server
from wfd.protocol import MAX_FRAME_BYTES, ProtocolError
from wfd.server import Connection, Server

Frames = list[tuple[bytes, list[bytes]]]

# What a client sends -> the lines that the daemon takes from it.
FRAMES: Frames = [
    (b"", []),
    (b"one\n", [b"one"]),
    (b"one\ntwo\nthree\n", [b"one", b"two", b"three"]),
    (b"\n\n", [b"", b""]),
    (b"no end", []),
    (b"one\nno end", [b"one"]),
    (b"a\rb\r\n\x00\xff\n", [b"a\rb\r", b"\x00\xff"]),
    ("x\u2028y\x85z\n".encode(), ["x\u2028y\x85z".encode()]),
    (b"x" * 200_000 + b"\ny\n", [b"x" * 200_000, b"y"]),
]


class Loop:
    """A Server with a loop of its own and a clock that stands still. It takes lines and answers them as it is told."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.selector = selectors.DefaultSelector()
        self.server = Server(self.selector, lambda: self.now_ms)
        self.server.on_line = self._on_line
        self.server.on_close = lambda connection: self.closed.append(connection)
        self.server.on_room = lambda connection: self.roomy.append(connection)
        self.lines: list[bytes] = []
        self.waiting: list[tuple[Connection, bytes]] = []
        self.closed: list[Connection] = []
        self.roomy: list[Connection] = []
        self.reply: Callable[[bytes], bytes | None] = lambda line: line + b"\n"
        self._sockets: list[socket.socket] = []

    def _on_line(self, connection: Connection, line: bytes) -> None:
        self.lines.append(line)
        reply = self.reply(line)
        if reply is None:
            self.waiting.append((connection, line))
        else:
            self.server.answer(connection, reply)

    def client(self) -> tuple[socket.socket, Connection]:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets.append(theirs)
        return theirs, self.server.welcome(ours)

    def turn(self, timeout: float = 0) -> bool:
        """Serve what is ready; was there anything?"""
        ready = self.selector.select(timeout)
        for key, mask in ready:
            key.data(key.fileobj, mask)
        return bool(ready)

    def settle(self) -> None:
        """Until nothing is ready any more."""
        while self.turn():
            pass

    def close(self) -> None:
        self.server.close_all()
        for sock in self._sockets:
            sock.close()
        self.selector.close()


def read(sock: socket.socket) -> bytes:
    """All that is there to read."""
    data = bytearray()
    while True:
        try:
            piece = sock.recv(1 << 20)
        except BlockingIOError:
            return bytes(data)
        if not piece:
            return bytes(data)
        data += piece


class LoopTest(unittest.TestCase):
    def setUp(self) -> None:
        self.loop = Loop()
        self.addCleanup(self.loop.close)

    def feed(self, sock: socket.socket, data: bytes) -> bytes:
        """Send everything, serving meanwhile; what came back."""
        answer = b""
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                self.loop.turn()
            answer += read(sock)
        return answer + self.drain(sock)

    def drain(self, sock: socket.socket) -> bytes:
        answer = b""
        while True:
            self.loop.settle()
            piece = read(sock)
            if not piece:
                return answer
            answer += piece


class TestFraming(LoopTest):
    def test_whole(self) -> None:
        for data, lines in FRAMES:
            with self.subTest(data=data[:40]):
                sock, _ = self.loop.client()
                self.loop.lines.clear()
                answer = self.feed(sock, data)
                self.assertEqual(self.loop.lines, lines)
                self.assertEqual(answer, b"".join(line + b"\n" for line in lines))

    def test_byte_by_byte(self) -> None:
        for data, lines in FRAMES[:-1]:
            with self.subTest(data=data):
                sock, _ = self.loop.client()
                self.loop.lines.clear()
                for at in range(len(data)):
                    sock.send(data[at : at + 1])
                    self.loop.settle()
                self.assertEqual(self.loop.lines, lines)

    def test_every_cut_in_two(self) -> None:
        data = b"one\ntwo\n\nthree\n"
        for at in range(len(data) + 1):
            with self.subTest(at=at):
                sock, _ = self.loop.client()
                self.loop.lines.clear()
                for piece in (data[:at], data[at:]):
                    if piece:
                        sock.send(piece)
                    self.loop.settle()
                self.assertEqual(self.loop.lines, [b"one", b"two", b"", b"three"])

    def test_a_line_over_the_limit_is_refused_and_the_connection_closed(self) -> None:
        with mock.patch.object(server, "MAX_FRAME_BYTES", 1_000):
            for data, refused in [(b"x" * 1_000 + b"\n", False), (b"x" * 1_001, True), (b"ok\n" + b"x" * 5_000, True)]:
                with self.subTest(bytes=len(data)):
                    sock, connection = self.loop.client()
                    answer = self.feed(sock, data)
                    self.assertEqual(connection.is_closed, refused)
                    if refused:
                        problem = json.loads(answer.splitlines()[-1])
                        self.assertEqual(problem["error"]["code"], protocol.PARSE_ERROR)
                        self.assertIn("longer than 1000 bytes", problem["error"]["message"])
                        self.assertIsNone(problem["id"])

    def test_a_long_line_is_searched_once(self) -> None:
        # 8 MiB in pieces of at most 64 KiB: looking at it from its start each time would be half a gigabyte.
        sock, connection = self.loop.client()
        looked_at = 0

        class Inbox(bytearray):
            def find(self, sub: bytes, start: int = 0) -> int:  # type: ignore[override]
                nonlocal looked_at
                looked_at += len(self) - start
                return super().find(sub, start)

        connection.inbox = Inbox()
        self.feed(sock, b"x" * (8 << 20) + b"\n")
        self.assertEqual(len(self.loop.lines[0]), 8 << 20)
        self.assertLess(looked_at, 9 << 20)


class TestOrderAndRoom(LoopTest):
    def test_one_request_is_in_hand_at_a_time_and_answers_keep_the_order(self) -> None:
        self.loop.reply = lambda line: None
        sock, _ = self.loop.client()
        sock.send(b"1\n2\n3\n")
        for number in (1, 2, 3):
            self.loop.settle()
            self.assertEqual(len(self.loop.waiting), 1, "the next request waits for the answer to the one before")
            connection, line = self.loop.waiting.pop()
            self.loop.server.answer(connection, line + b" done\n")
            self.assertEqual(read(sock), b"%d done\n" % number)

    def test_a_notification_is_not_answered_and_holds_nothing_up(self) -> None:
        self.loop.reply = lambda line: b"" if line == b"hush" else line + b"\n"
        sock, _ = self.loop.client()
        self.assertEqual(self.feed(sock, b"hush\na\nhush\nb\n"), b"a\nb\n")

    def test_many_lines_answered_at_once_do_not_nest(self) -> None:
        sock, _ = self.loop.client()
        self.assertEqual(self.feed(sock, b"\n" * 20_000), b"\n" * 20_000)

    def test_a_thousand_requests_of_one_who_does_not_read(self) -> None:
        size = 10_000
        self.loop.reply = lambda line: line.rjust(size - 1, b".") + b"\n"
        sock, connection = self.loop.client()
        sock.send(b"".join(b"%d\n" % number for number in range(1_000)))
        self.loop.settle()
        self.assertLess(len(self.loop.lines), 1_000, "not all are taken while the answers are not read")
        self.assertLess(len(connection.outbox), server.OUTBOX_LIMIT_BYTES + size)
        answers = self.drain(sock).split()
        self.assertEqual([answer.lstrip(b".") for answer in answers], [b"%d" % number for number in range(1_000)])

    def test_one_who_does_not_read_is_not_read_from(self) -> None:
        self.loop.reply = lambda line: b"." * server.OUTBOX_LIMIT_BYTES + b"\n"
        sock, connection = self.loop.client()
        for _ in range(4):
            sock.send(b"x\n")
            self.loop.settle()
        before = len(connection.inbox)
        with self.assertRaises(BlockingIOError):
            while True:
                sock.send(b"y" * 10_000)
                self.loop.settle()
        self.assertEqual(len(connection.inbox), before)

    def test_half_requests_of_all_peers_together_are_bounded(self) -> None:
        with mock.patch.object(server, "HELD_LIMIT_BYTES", 1_000):
            small, large, last = (self.loop.client() for _ in range(3))
            for (sock, _), size in ((small, 300), (large, 400), (last, 290)):
                self.assertEqual(self.feed(sock, b"x" * size), b"")
            answer = self.feed(last[0], b"x" * 20)
            self.assertEqual((answer, self.loop.closed), (b"", [large[1]]), "the one that holds most is let go of")
            problem = json.loads(read(large[0]))["error"]
            self.assertEqual((problem["code"], "more than 1000 bytes" in problem["message"]), (protocol.STALLED, True))
            for (sock, _), size in ((small, 300), (last, 310)):
                self.assertEqual(self.feed(sock, b"\n"), b"x" * size + b"\n", "the others are served")
            self.assertEqual(self.loop.server._held, 0)
            one, connection = self.loop.client()
            answer = self.feed(one, b"x" * 1_001)
            self.assertIn(b"more than 1000 bytes", answer)
            self.assertTrue(connection.is_closed, "it may be the one that is read from")
            self.assertEqual(self.loop.server._held, 0)

    def test_answers_that_nobody_takes_are_bounded_of_all_peers_together(self) -> None:
        with mock.patch.object(server, "HELD_LIMIT_BYTES", 10 << 20):
            peers = [self.loop.client() for _ in range(4)]
            for _, connection in peers:
                self.loop.server.send(connection, b"." * (3 << 20))
            self.assertEqual(len(self.loop.closed), 1)
            self.assertLessEqual(self.loop.server._held, 10 << 20)
            reader = next(sock for sock, connection in peers if not connection.is_closed)
            self.assertEqual(len(self.drain(reader)), 3 << 20, "whoever reads gets all")

    def test_room_is_reported_when_all_is_sent(self) -> None:
        sock, connection = self.loop.client()
        self.loop.server.send(connection, b"." * (4 << 20))
        self.assertEqual(self.loop.roomy, [])
        self.assertTrue(connection.is_full)
        self.assertEqual(len(self.drain(sock)), 4 << 20)
        self.assertEqual(self.loop.roomy, [connection])

    def test_one_who_has_said_all_still_gets_all_answers(self) -> None:
        self.loop.reply = lambda line: line * 1_000_000 + b"\n"
        sock, connection = self.loop.client()
        sock.send(b"1\n2\n3\nno end")
        sock.shutdown(socket.SHUT_WR)
        self.assertEqual([(answer[:1], len(answer)) for answer in self.drain(sock).split()],
                         [(b"1", 1_000_000), (b"2", 1_000_000), (b"3", 1_000_000)])  # fmt: skip
        self.assertTrue(connection.is_closed)

    def test_one_who_has_said_all_gets_an_answer_that_comes_later(self) -> None:
        self.loop.reply = lambda line: None
        sock, connection = self.loop.client()
        sock.send(b"1\n")
        sock.shutdown(socket.SHUT_WR)
        self.loop.settle()
        self.assertFalse(connection.is_closed)
        self.loop.server.answer(connection, b"late\n")
        self.assertEqual(self.drain(sock), b"late\n")
        self.assertEqual(self.loop.closed, [connection])


class TestEnds(LoopTest):
    def test_one_who_goes_is_let_go_of(self) -> None:
        sock, connection = self.loop.client()
        sock.close()
        self.loop.settle()
        self.assertEqual((self.loop.closed, list(self.loop.server.connections)), ([connection], []))

    def test_one_who_goes_without_reading_is_let_go_of(self) -> None:
        sock, connection = self.loop.client()
        self.loop.server.send(connection, b"." * (4 << 20))
        sock.close()
        self.loop.settle()
        self.assertEqual(self.loop.closed, [connection])

    def test_a_stuck_reader_is_dropped_and_a_slow_one_is_not(self) -> None:
        stuck, slow, idle = (self.loop.client() for _ in range(3))
        for _, connection in (stuck, slow):
            self.loop.server.send(connection, b"." * (4 << 20))
        for second in range(0, server.STUCK_SEC + 1, 10):
            self.loop.now_ms = second * 1_000
            slow[0].recv(100_000)
            self.loop.settle()
            self.loop.server.tick()
            self.assertEqual(stuck[1].is_closed, second >= server.STUCK_SEC)
        self.assertEqual(self.loop.closed, [stuck[1]])
        self.assertEqual(len(self.drain(slow[0])) > 0, True)
        self.assertEqual(self.loop.server.deadline_ms(), None, "nobody is waited for any more")
        self.assertFalse(idle[1].is_closed)

    def test_the_deadline_is_that_of_the_one_that_is_stuck_longest(self) -> None:
        self.assertIsNone(self.loop.server.deadline_ms())
        for at_ms in (5_000, 7_000):
            self.loop.now_ms = at_ms
            self.loop.server.send(self.loop.client()[1], b"." * (4 << 20))
        self.assertEqual(self.loop.server.deadline_ms(), 5_000 + server.STUCK_SEC * 1_000)


class TestListening(LoopTest):
    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = directory.name + "/sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        self.loop.server.listen(listener)

    def dial(self) -> Client:
        client = Client.connect(self.path)
        self.addCleanup(client.close)
        return client

    def test_many_are_accepted_in_one_turn(self) -> None:
        clients = [self.dial() for _ in range(20)]
        self.loop.settle()
        self.assertEqual(len(self.loop.server.connections), 20)
        for number, client in enumerate(clients):
            client.send(b"%d\n" % number)
        self.loop.settle()
        self.assertEqual([client.line() for client in clients], [b"%d\n" % number for number in range(20)])

    def test_too_many_wait_until_others_go(self) -> None:
        with mock.patch.object(server, "MAX_CONNECTIONS", 2):
            first, _, third = (self.dial() for _ in range(3))
            third.send(b"hello\n")
            self.loop.settle()
            self.assertEqual(len(self.loop.server.connections), 2)
            first.close()
            self.loop.settle()
            deadline_ms = self.loop.server.deadline_ms()
            self.assertIsNotNone(deadline_ms, "somebody must look again")
            self.loop.now_ms = deadline_ms or 0
            self.loop.server.tick()
            self.loop.settle()
            self.assertEqual(third.line(), b"hello\n")

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root can be somebody else")
    def test_another_user_is_not_listened_to(self) -> None:
        if not others_may_enter(tempfile.gettempdir()):
            self.skipTest("another uid cannot reach the directory for temporary files")
        # The modes of directory and socket would stop him; they are opened here so that the kernel's word must.
        os.chmod(os.path.dirname(self.path), 0o755)
        os.chmod(self.path, 0o666)
        program = (
            "import os, socket, sys\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "client = socket.socket(socket.AF_UNIX)\n"
            "client.connect(sys.argv[1])\n"
            "print('connected', flush=True)\n"
            "sys.stdin.read()\n"
            "try:\n"
            "    client.send(b'hello\\n'); print(client.recv(100))\n"
            "except OSError as error: print(type(error).__name__)\n"
        )
        command = [sys.executable, "-ISc", program, self.path]
        stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert stranger.stdout is not None and stranger.stdin is not None
        for end in (stranger.stdout.close, stranger.stdin.close, stranger.wait, stranger.kill):
            self.addCleanup(end)
        self.assertEqual(stranger.stdout.readline(), b"connected\n")
        self.loop.settle()
        self.assertEqual(list(self.loop.server.connections), [])
        answer, _ = stranger.communicate()
        self.assertIn(answer, (b"b''\n", b"BrokenPipeError\n", b"ConnectionResetError\n"))
        self.loop.settle()
        self.assertEqual(self.loop.lines, [])

    def test_the_peer_s_uid_is_the_kernel_s_word(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.assertEqual(server.peer_uid(ours), os.geteuid())
        with socket.socket(socket.AF_INET) as not_unix:
            self.assertNotEqual(server.peer_uid(not_unix), os.geteuid())


# A line -> the code of its answer, part of the message, and the id in it.
BAD_LINES: list[tuple[bytes, int, str, object]] = [
    (b"", protocol.PARSE_ERROR, "not JSON", None),
    (b"nonsense", protocol.PARSE_ERROR, "not JSON", None),
    (b"\xff\xfe\x00", protocol.PARSE_ERROR, "not JSON", None),
    (b'{"jsonrpc":"2.0","id":1', protocol.PARSE_ERROR, "not JSON", None),
    (b'{"a":NaN}', protocol.PARSE_ERROR, "not JSON", None),
    (b"[" * 100_000, protocol.PARSE_ERROR, "not JSON", None),
    (b"GET / HTTP/1.1\r", protocol.PARSE_ERROR, "not JSON", None),
    (b"[]", protocol.INVALID_REQUEST, "not a JSON object", None),
    (b"1", protocol.INVALID_REQUEST, "not a JSON object", None),
    (b"{}", protocol.INVALID_REQUEST, '"jsonrpc":"2.0"', None),
    (b'{"id":7,"method":"list"}', protocol.INVALID_REQUEST, '"jsonrpc":"2.0"', 7),
    (b'{"jsonrpc":"1.0","id":7,"method":"list"}', protocol.INVALID_REQUEST, '"jsonrpc":"2.0"', 7),
    (b'{"jsonrpc":"2.0","id":7}', protocol.INVALID_REQUEST, '"method"', 7),
    (b'{"jsonrpc":"2.0","id":7,"method":1}', protocol.INVALID_REQUEST, '"method"', 7),
    (b'{"jsonrpc":"2.0","id":[],"method":"list"}', protocol.INVALID_REQUEST, "id must be", None),
    (b'{"jsonrpc":"2.0","id":true,"method":"list"}', protocol.INVALID_REQUEST, "id must be", None),
    (b'{"jsonrpc":"2.0","id":1.5,"method":"list"}', protocol.INVALID_REQUEST, "id must be", None),
    (b'{"jsonrpc":"2.0","id":"x","method":"lst"}', protocol.METHOD_NOT_FOUND, "there are hello, submit", "x"),
    (b'{"jsonrpc":"2.0","id":"x","method":"list","params":[]}', protocol.INVALID_PARAMS, "must be an object", "x"),
    (b'{"jsonrpc":"2.0","id":"x","method":"list","params":null}', protocol.INVALID_PARAMS, "must be an object", "x"),
    (b'{"jsonrpc":"2.0","id":"x","method":"list","params":{"all":1}}', protocol.INVALID_PARAMS, "'all'", "x"),
]

UNKNOWN: dict[str, object] = {"run_id": "unknown"}

# A method and its params -> the code of the refusal and part of its message.
BAD_PARAMS: list[tuple[str, dict[str, object], int, str]] = [
    ("hello", {}, protocol.INVALID_PARAMS, "'protocol_min' is missing"),
    ("hello", {"protocol_min": True, "protocol_max": 1}, protocol.INVALID_PARAMS, "a whole number"),
    ("hello", {"protocol_min": 99, "protocol_max": 100}, protocol.UNSUPPORTED_PROTOCOL, "not 99 to 100"),
    ("hello", {"protocol_min": -2, "protocol_max": 0}, protocol.UNSUPPORTED_PROTOCOL, "not -2 to 0"),
    ("status", {}, protocol.INVALID_PARAMS, "'run_id' is missing"),
    ("status", {"run_id": 1}, protocol.INVALID_PARAMS, "a string"),
    ("status", UNKNOWN, protocol.NO_SUCH_RUN, "no run unknown"),
    ("status", {"run_id": ""}, protocol.NO_SUCH_RUN, "no run"),
    ("status", {"run_id": "../runs"}, protocol.NO_SUCH_RUN, "no run"),
    ("status", {"run_id": "a\0b"}, protocol.NO_SUCH_RUN, "no run"),
    ("status", {"run_id": "x" * 100_000}, protocol.NO_SUCH_RUN, "no run"),
    ("cancel", UNKNOWN, protocol.INVALID_PARAMS, "'request' is missing"),
    ("cancel", {**UNKNOWN, "request": "q"}, protocol.NO_SUCH_RUN, "no run unknown"),
    ("retry", {**UNKNOWN, "request": "q"}, protocol.NO_SUCH_RUN, "no run unknown"),
    ("watch", UNKNOWN, protocol.INVALID_PARAMS, "'from_seq' is missing"),
    ("watch", {**UNKNOWN, "from_seq": "1"}, protocol.INVALID_PARAMS, "a whole number"),
    ("watch", {**UNKNOWN, "from_seq": 1}, protocol.NO_SUCH_RUN, "no run unknown"),
    ("shutdown", {"cancel_runs": 1}, protocol.INVALID_PARAMS, "true or false"),
]

ENVIRONMENT: dict[str, object] = {"env": {}, "umask": 18, "limits": {}}

# What is wrong in a submission -> the code of the refusal and part of its message.
BAD_SUBMISSIONS: list[tuple[dict[str, object], int, str]] = [
    ({"run_id": "Upper"}, protocol.INVALID_PARAMS, "is no run id"),
    ({"run_id": "../x"}, protocol.INVALID_PARAMS, "is no run id"),
    ({"run_id": "x" * 101}, protocol.INVALID_PARAMS, "is no run id"),
    ({"run_id": ""}, protocol.INVALID_PARAMS, "is no run id"),
    ({"cwd": "relative"}, protocol.INVALID_PARAMS, "absolute"),
    ({"cwd": "/a\0b"}, protocol.INVALID_PARAMS, "absolute"),
    ({"environment": {}}, protocol.INVALID_PARAMS, "environment must be"),
    ({"environment": {**ENVIRONMENT, "env": []}}, protocol.INVALID_PARAMS, "environment.env"),
    ({"environment": {**ENVIRONMENT, "env": {"A": 1}}}, protocol.INVALID_PARAMS, "environment.env"),
    ({"environment": {**ENVIRONMENT, "env": {"A=B": "1"}}}, protocol.INVALID_PARAMS, "environment.env"),
    ({"environment": {**ENVIRONMENT, "env": {"": "1"}}}, protocol.INVALID_PARAMS, "environment.env"),
    ({"environment": {**ENVIRONMENT, "env": {"A": "\0"}}}, protocol.INVALID_PARAMS, "environment.env"),
    ({"environment": {**ENVIRONMENT, "umask": True}}, protocol.INVALID_PARAMS, "environment.umask"),
    ({"environment": {**ENVIRONMENT, "umask": 512}}, protocol.INVALID_PARAMS, "environment.umask"),
    ({"environment": {**ENVIRONMENT, "limits": {"core": "0"}}}, protocol.INVALID_PARAMS, "environment.limits"),
    ({"definition": {}}, protocol.INVALID_DEFINITION, "workflow_id"),
    ({"definition": {"workflow_id": "w", "steps": []}}, protocol.INVALID_DEFINITION, "must not be empty"),
]


class TestAnswers(unittest.TestCase):
    """What a real daemon answers."""

    daemon: Daemon

    @classmethod
    def setUpClass(cls) -> None:
        cls.daemon = cls.enterClassContext(Daemon())

    def refusal(self, method: str, params: dict[str, object]) -> Refused:
        with self.assertRaises(Refused) as caught:
            self.daemon.request(method, **params)
        return caught.exception

    def test_bad_lines_are_answered_one_by_one(self) -> None:
        with self.daemon.connect() as client:
            client.send(b"".join(line + b"\n" for line, *_ in BAD_LINES))
            for line, code, words, request_id in BAD_LINES:
                with self.subTest(line=line[:80]):
                    answer = client.message()
                    self.assertEqual(answer["error"]["code"], code)
                    self.assertIn(words, answer["error"]["message"])
                    self.assertEqual(answer["id"], request_id)
            self.assertEqual(client.request("list"), {"runs": []}, "and the next good one is answered")

    def test_bad_params(self) -> None:
        for method, params, code, words in BAD_PARAMS:
            with self.subTest(method=method, params=str(params)[:80]):
                refused = self.refusal(method, params)
                self.assertEqual(refused.code, code)
                self.assertIn(words, refused.message)

    def test_bad_submissions_leave_nothing_behind(self) -> None:
        for fields, code, words in BAD_SUBMISSIONS:
            with self.subTest(fields=str(fields)[:80]):
                refused = self.refusal("submit", {**self.daemon.submission(step("a", "true")), **fields})
                self.assertEqual(refused.code, code)
                self.assertIn(words, refused.message)
        self.assertEqual(self.daemon.run_ids(), [])
        self.assertEqual(os.listdir(self.daemon.home.live), [])

    def test_an_invalid_definition_is_refused_with_all_its_problems(self) -> None:
        params = self.daemon.submission({"id": "a"}, step("b", "true", "c"), max_paralel=1)
        self.assertEqual(
            [problem["path"] for problem in self.refusal("submit", params).data["problems"]],
            ["$.max_paralel", "$.steps[0].command", "$.steps[1].depends_on[0]"],
        )

    def test_hello_tells_who_answers(self) -> None:
        answer = self.daemon.request("hello", protocol_min=0, protocol_max=99)
        assert self.daemon.process is not None
        self.assertEqual(
            {name: answer[name] for name in ("protocol", "pid", "home", "socket", "active_runs", "quarantined")},
            {"protocol": protocol.PROTOCOL_MAX, "pid": self.daemon.process.pid, "home": self.daemon.home.directory,
             "socket": self.daemon.socket_path, "active_runs": 0, "quarantined": []},
        )  # fmt: skip

    def test_a_notification_is_carried_out_and_not_answered(self) -> None:
        with self.daemon.connect() as client:
            client.send(b'{"jsonrpc":"2.0","method":"status","params":{"run_id":"unknown"}}\n')
            client.send(b'{"jsonrpc":"2.0","method":"list"}\n')
            client.send(b'{"jsonrpc":"2.0","method":"lst"}\n{"jsonrpc":"2.0","method":"status","params":{"run":1}}\n')
            self.assertEqual(client.request("list"), {"runs": []})

    def test_a_thousand_requests_at_once(self) -> None:
        with self.daemon.connect() as client:
            client.send(b"".join(protocol.request("list", {}, number) for number in range(1_000)))
            self.assertEqual([client.message()["id"] for _ in range(1_000)], list(range(1_000)))

    def test_a_client_that_has_said_all_is_answered(self) -> None:
        with self.daemon.connect() as client:
            client.send(protocol.request("list", {}, 1) + protocol.request("list", {}, 2))
            client.socket.shutdown(socket.SHUT_WR)
            self.assertEqual([client.message()["id"] for _ in range(2)], [1, 2])
            self.assertEqual(client.line(), b"")

    def test_one_who_sends_half_a_line_holds_nobody_up(self) -> None:
        with self.daemon.connect() as half, self.daemon.connect() as other:
            half.send(b'{"jsonrpc":')
            self.assertEqual(other.request("list"), {"runs": []})
            half.send(b'"2.0","id":1,"method":"list"}\n')
            self.assertEqual(half.message()["result"], {"runs": []})

    def test_the_socket_is_the_owner_s_alone(self) -> None:
        self.assertEqual(os.stat(self.daemon.socket_path).st_mode & 0o777, 0o600)
        self.assertEqual(os.stat(self.daemon.home.directory).st_mode & 0o777, 0o700)


class TestMessages(unittest.TestCase):
    """wfd.protocol: what one side writes the other reads."""

    def test_a_request_is_read_as_it_was_written(self) -> None:
        line = protocol.request("cancel", {"run_id": "r\u2028", "request": "q"}, "id-1")
        self.assertEqual(line.count(b"\n"), 1)
        parsed = protocol.parse_request(line[:-1])
        self.assertEqual((parsed.id, parsed.method), ("id-1", "cancel"))
        self.assertEqual(parsed.params, {"run_id": "r\u2028", "request": "q"})

    def test_answers_and_events_are_messages(self) -> None:
        problem = ProtocolError(protocol.NO_SUCH_RUN, "why", {"more": 1})
        self.assertEqual(protocol.parse_message(protocol.result(3, {"a": 1})[:-1])["result"], {"a": 1})
        self.assertEqual(
            protocol.parse_message(protocol.error(3, problem)[:-1])["error"],
            {"code": protocol.NO_SUCH_RUN, "message": "why", "data": {"more": 1}},
        )
        event = protocol.parse_message(protocol.notifications("r1", b'{"seq":1}\n')[:-1])
        self.assertEqual(event["params"], {"run_id": "r1", "line": {"seq": 1}})

    def test_what_is_no_message_is_refused(self) -> None:
        for line in (b"", b"x", b"[]", b"{}", b'{"jsonrpc":"2.0"}', b'{"jsonrpc":"1.0","result":1}'):
            with self.subTest(line=line), self.assertRaises(ProtocolError):
                protocol.parse_message(line)

    def test_the_longest_definition_fits_into_a_frame(self) -> None:
        from wfd.definition import MAX_DEFINITION_BYTES

        self.assertLess(MAX_DEFINITION_BYTES, MAX_FRAME_BYTES)


if __name__ == "__main__":
    unittest.main()
