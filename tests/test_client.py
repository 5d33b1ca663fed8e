"""The wire, the log without a daemon, following a run, and the library.

Most of it talks to `Fake`, a daemon that only repeats what a test gave it, so that it can misbehave on purpose.
`FakeAgainstReal` asks it and a real daemon the same questions.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import typing
import unittest
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice, product
from typing import Any, ClassVar
from unittest import mock

import workflow as library
from tests import logs
from tests.daemon import MARK, Daemon, step, wait_until
from wfctl import api, client, history, render
from wfctl.errors import (
    DaemonUnavailable,
    InvalidRequest,
    InvalidWorkflow,
    NoSuchRun,
    RunDamaged,
    WorkflowError,
)
from wfctl.watch import Watch
from wfd import definition, events, protocol
from wfd.events import Line, LogRecovered
from wfd.paths import Home, runtime_directory

HELLO = {
    "protocol": 1, "pid": 1, "home": "/h", "socket": "/s", "version": "0", "uptime_sec": 0, "active_runs": 0,
    "live_steps": 0, "max_parallel": 32, "quarantined": [],
}  # fmt: skip

Script = Callable[["Fake", dict[str, Any]], Iterable[bytes]]


class Fake:
    """A daemon of the test's making: `script` says what each request but hello is answered with. A script that ends with
    HANG_UP ends the connection. `requests` are those that came."""

    def __init__(self, home: Home, script: Script, path: str | None = None, greeting: Script | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._greeting = greeting or answer(HELLO)
        self._script = script
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self.path = path or home.socket(runtime_directory(os.environ, os.getuid()))
        if os.path.exists(self.path):
            os.unlink(self.path)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Die: nobody is answered any more. The socket's file stays, as after kill -9."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        threads = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            self._connections.append(connection)
            threads.append(threading.Thread(target=self._serve, args=(connection,)))
            threads[-1].start()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as file:
            for raw in file:
                request = json.loads(raw)
                is_hello = request["method"] == "hello"
                if not is_hello:
                    self.requests.append(request)
                for data in (self._greeting if is_hello else self._script)(self, request):
                    if data is HANG_UP:
                        return
                    connection.sendall(data)


HANG_UP = b"hang up"


def says(data: bytes) -> Script:
    return lambda fake, request: [data]


def refuse(code: int, message: str = "no", data: object = None) -> Script:
    return lambda fake, request: [protocol.error(request["id"], protocol.ProtocolError(code, message, data))]


def answer(value: object) -> Script:
    return lambda fake, request: [protocol.result(request["id"], value)]


def watching(log: logs.Log, known: int, end: int | None = None) -> Script:
    """Answers a watch: `known` lines are history, the others happen afterwards; after line `end` it hangs up."""

    def script(fake: Fake, request: dict[str, Any]) -> Iterator[bytes]:
        # As the daemon does: who asks for what is not there yet gets what comes next.
        start = min(request["params"]["from_seq"], known + 1)
        state = "RUNNING"
        for line in log.lines[:known]:
            state = line.event.state if isinstance(line.event, events.RunFinished) else state
            state = "RUNNING" if isinstance(line.event, events.RunRetried) else state
        yield protocol.result(request["id"], {"run_id": log.run_id, "state": state, "last_seq": known})
        for line in log.lines[start - 1 : end]:
            yield protocol.notifications(log.run_id, logs.encode([line], log.run_id))
        if end is not None:
            yield HANG_UP

    return script


def ending(log: logs.Log, known: int, last: bytes | None = None, *, is_cut: bool = False) -> Script:
    """Answers who waits for the end of a run of which `known` lines are written."""

    def script(fake: Fake, request: dict[str, Any]) -> Iterator[bytes]:
        is_over = known == len(log.lines)
        state = "FAILED" if is_over else "RUNNING"
        yield protocol.result(request["id"], {"run_id": log.run_id, "state": state, "last_seq": known})
        if is_cut:
            yield HANG_UP
        elif not is_over:
            yield protocol.notifications(log.run_id, last or logs.encode(log.lines[-1:], log.run_id))

    return script


class InAHome(unittest.TestCase):
    """A test with a home of its own, and the environment that names it. No daemon yet."""

    def setUp(self) -> None:
        self.base = tempfile.mkdtemp(prefix="wfd-test-")
        self.addCleanup(shutil.rmtree, self.base)
        self.home = Home(f"{self.base}/home")
        os.mkdir(self.home.directory, 0o700)
        os.mkdir(self.home.runs, 0o700)
        os.mkdir(self.home.live, 0o700)
        os.mkdir(f"{self.base}/run", 0o700)
        changes = {"WFD_HOME": self.home.directory, "XDG_RUNTIME_DIR": f"{self.base}/run"}
        patch = mock.patch.dict(os.environ, changes)
        patch.start()
        self.addCleanup(patch.stop)

    def fake(self, script: Script, path: str | None = None, greeting: Script | None = None) -> Fake:
        return Fake(self.home, script, path, greeting)

    def write_lock(self, text: str) -> None:
        with open(self.home.lock, "w", encoding="utf-8") as file:
            file.write(text)


class Finding(InAHome):
    def test_nobody_answers(self) -> None:
        dead = f"{self.base}/dead.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(dead)
        listener.close()
        lock = json.dumps({"pid": 1, "socket": dead})
        cases = ("", "{", "[]", "null", '{"socket": 3}', '{"socket": "/nowhere/at/all"}', lock, "\udc80")
        for text in cases:
            with self.subTest(lock=text):
                with open(self.home.lock, "wb") as file:
                    file.write(text.encode("utf-8", "surrogateescape"))
                self.assertIsNone(client.connect(self.home))
        os.unlink(self.home.lock)
        self.assertIsNone(client.connect(self.home))
        os.rename(dead, f"{self.home.directory}/wfd.sock")
        self.assertIsNone(client.connect(self.home))
        self.assertIsNone(client.connect(Home("/nonexistent")))

    def test_the_lock_names_the_address(self) -> None:
        with self.fake(answer({"runs": []}), f"{self.base}/elsewhere.sock") as fake:
            self.write_lock(json.dumps({"socket": fake.path}))
            self.assertEqual(client.ask(self.home, "list", {}), {"runs": []})

    def test_a_stale_lock_does_not_hide_the_home_s_own_socket(self) -> None:
        self.write_lock(json.dumps({"socket": f"{self.base}/gone.sock"}))
        with self.fake(answer({"runs": []})):
            self.assertEqual(client.ask(self.home, "list", {}), {"runs": []})

    def test_another_protocol_is_refused_by_name(self) -> None:
        greeting = refuse(protocol.UNSUPPORTED_PROTOCOL, "this daemon speaks protocol 7 to 9")
        with self.fake(answer({}), greeting=greeting), self.assertRaisesRegex(DaemonUnavailable, "speaks protocol 7"):
            client.connect(self.home)

    @unittest.skipUnless(os.geteuid() == 0, "only root can become another user")
    def test_another_user_is_not_spoken_to(self) -> None:
        """P10, seen from the client."""
        path = f"{self.base}/strange.sock"
        # Whoever calls listen() is whom the kernel names as the peer.
        program = (
            "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.setuid(65534); s.listen();"
            "print('ready', flush=True); c, _ = s.accept(); print(c.recv(100), flush=True)"
        )
        with subprocess.Popen([sys.executable, "-ISc", program, path], stdout=subprocess.PIPE) as stranger:
            assert stranger.stdout is not None
            self.assertEqual(stranger.stdout.readline(), b"ready\n")
            self.write_lock(json.dumps({"socket": path}))
            with self.assertRaisesRegex(DaemonUnavailable, "another user"):
                client.connect(self.home)
            self.assertEqual(stranger.stdout.readline(), b"b''\n")


class Talking(InAHome):
    def test_errors_become_exceptions(self) -> None:
        cases: tuple[tuple[int, type[WorkflowError]], ...] = (
            (protocol.NO_SUCH_RUN, NoSuchRun),
            (protocol.RUN_EXISTS, InvalidRequest),
            (protocol.INVALID_DEFINITION, InvalidWorkflow),
            (protocol.DAMAGED, RunDamaged),
            (protocol.STALLED, client.Refused),
            (protocol.NOT_FINISHED, InvalidRequest),
            (protocol.INVALID_PARAMS, InvalidRequest),
            (protocol.INTERNAL_ERROR, DaemonUnavailable),
            (-1, DaemonUnavailable),
        )
        for code, expected in cases:
            with self.subTest(code=code), self.fake(refuse(code, "so it is")):
                with self.assertRaises(WorkflowError) as caught:
                    client.ask(self.home, "status", {"run_id": "r1"})
                self.assertIs(type(caught.exception), expected)
                self.assertEqual(str(caught.exception), "so it is")

    def test_the_problems_of_a_definition_come_along(self) -> None:
        data = {"problems": [{"path": "$.steps", "message": "is missing"}]}
        script = refuse(protocol.INVALID_DEFINITION, "$.steps: is missing", data)
        with self.fake(script), self.assertRaises(InvalidWorkflow) as caught:
            client.ask(self.home, "submit", {})
        self.assertEqual(caught.exception.problems, (("$.steps", "is missing"),))

    def test_an_answer_in_pieces(self) -> None:
        def script(fake: Fake, request: dict[str, Any]) -> Iterator[bytes]:
            for byte in protocol.result(request["id"], {"text": "äöü\n" * 20}):
                yield bytes([byte])

        with self.fake(script):
            self.assertEqual(client.ask(self.home, "list", {}), {"text": "äöü\n" * 20})

    def test_what_is_no_answer(self) -> None:
        cases = (b"\n", b"[]\n", b"{}\n", b'{"jsonrpc":"2.0","id":1}\n', b'{"jsonrpc":"2.0","result":3}\n', b"\xff\n")
        for data in cases:
            with self.subTest(data=data), self.fake(says(data)), self.assertRaises(DaemonUnavailable):
                client.ask(self.home, "list", {})

    def test_a_silent_daemon_is_as_good_as_none_for_a_question(self) -> None:
        told: list[str] = []
        self.write_lock('{"pid": 4711}')
        patch = mock.patch.multiple(client, ANSWER_DEADLINE_SEC=0.05, QUESTION_DEADLINE_SEC=0.04)
        with patch, self.fake(lambda fake, request: []):
            self.assertIsNone(client.ask(self.home, "list", {}, told.append))
            self.assertEqual(told, ["the daemon (pid 4711) does not answer: is it stopped?"])
            with self.assertRaises(client.Silent):
                client.question(self.home, "list", {})
            with self.assertRaisesRegex(DaemonUnavailable, "is it stopped"):
                client.command(self.home, "cancel", {"run_id": "r1", "request": "1"})

    def test_a_command_is_sent_again_until_it_is_answered(self) -> None:
        def script(fake: Fake, request: dict[str, Any]) -> list[bytes]:
            if len(fake.requests) == 1:
                return [HANG_UP]
            if len(fake.requests) == 2:
                return list(refuse(protocol.SHUTTING_DOWN)(fake, request))
            return list(answer({"run_id": "r1", "state": "CANCELLING"})(fake, request))

        with self.fake(script) as fake:
            self.assertEqual(client.cancel(self.home, "r1")["state"], "CANCELLING")
        self.assertEqual(len(fake.requests), 3)
        self.assertEqual(len({request["params"]["request"] for request in fake.requests}), 1)

    def test_what_the_system_refuses_names_the_home(self) -> None:
        refusal = refuse(protocol.STALLED, "the system refuses: No space left on device")
        with self.fake(refusal), self.assertRaisesRegex(DaemonUnavailable, f"device .home: {self.home.directory}"):
            client.cancel(self.home, "r1")

    def test_arguments_of_the_wrong_type(self) -> None:
        calls: list[Callable[[], object]] = [
            lambda: library.submit([]),  # type: ignore[arg-type]
            lambda: library.submit(None),  # type: ignore[arg-type]
            lambda: library.submit({"workflow_id": "w", "steps": [{"id": "a", "command": "x"}]}, 3),  # type: ignore[arg-type]
            lambda: library.status(None),  # type: ignore[arg-type]
        ]
        for call in calls:
            with self.assertRaises(InvalidRequest):
                call()

    def test_paths_travel_as_their_bytes(self) -> None:
        """In a locale whose encoding is not UTF-8, a path's text is not what its bytes say in UTF-8."""
        name = b"\xc3\xa4\xff"
        directory = os.fsencode(self.base) + b"/" + name
        os.mkdir(directory)
        program = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from wfctl import api, client\n"
            "print(sys.getfilesystemencoding(), ascii([client.current_directory(), api.directory_of('w.json'),"
            " api.directory_of(sys.argv[2])]))"
        )
        root = os.path.dirname(os.path.dirname(os.path.abspath(client.__file__)))
        for encoding in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
            out = subprocess.run(
                [sys.executable, "-S", "-c", program, root, directory + b"/w.json"], cwd=directory, check=True,
                capture_output=True, env={**os.environ, **encoding},
            ).stdout.decode().partition(" ")[2]  # fmt: skip
            expected = os.path.realpath(self.base) + "/\xe4\udcff"
            self.assertEqual(out.strip(), ascii([expected, expected, self.base + "/\xe4\udcff"]))

    def test_two_cancels_are_two_requests(self) -> None:
        with self.fake(answer({"state": "CANCELLING"})) as fake:
            client.cancel(self.home, "r1")
            client.cancel(self.home, "r1")
        self.assertEqual(len({request["params"]["request"] for request in fake.requests}), 2)

    def test_what_does_not_fit_into_a_request_is_not_sent(self) -> None:
        with mock.patch.object(protocol, "MAX_FRAME_BYTES", 1000), self.assertRaisesRegex(InvalidRequest, "at most 1000"):
            client.command(self.home, "submit", {"definition": "x" * 1000})
        self.assertEqual(sorted(os.listdir(self.home.directory)), ["live", "runs"])

    def test_what_a_submission_takes_along(self) -> None:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_CORE)[0]
        before = os.umask(0o027)
        try:
            with mock.patch.dict(os.environb, {b"WFD_TEST_BYTES": b"\xff\xc3\xa4"}):
                found = client.submission_environment()
        finally:
            os.umask(before)
        self.assertEqual(found["umask"], 0o027)
        env, limits = found["env"], found["limits"]
        assert isinstance(env, dict) and isinstance(limits, dict)
        self.assertEqual(env["WFD_TEST_BYTES"], "\udcffä")
        self.assertEqual(json.loads(protocol.request("submit", {"env": env}))["params"]["env"], env)
        self.assertEqual(limits["core"], -1 if soft == resource.RLIM_INFINITY else soft)
        self.assertEqual(set(limits), {"nofile", "core", "fsize", "cpu", "stack", "data"})


class Following(InAHome):
    def setUp(self) -> None:
        super().setUp()
        self.log = logs.complete(logs.diamond(), {"b": [1]})
        self.waits = 0

    def watch(self, from_seq: int = 1, tick_sec: float | None = None) -> Watch:
        def on_wait(why: str) -> None:
            self.waits += 1

        return Watch(self.home, self.log.run_id, from_seq, tick_sec, on_wait)

    def seqs(self, watch: Iterable[Line | None]) -> list[int]:
        return [line.seq for line in watch if line is not None]

    def test_history_then_live(self) -> None:
        every = list(range(1, len(self.log.lines) + 1))
        for known in (1, 5, len(every) - 1, len(every)):
            for from_seq in (1, 2, known, known + 1, len(every)):
                with self.subTest(known=known, from_seq=from_seq), self.fake(watching(self.log, known)):
                    watch = self.watch(from_seq)
                    self.assertEqual(self.seqs(watch), every[from_seq - 1 :])
                    self.assertEqual(watch.state, "FAILED")

    def test_the_lines_are_the_log_s_own(self) -> None:
        with self.fake(watching(self.log, 3)):
            found = [line for line in self.watch() if line is not None]
        self.assertEqual(logs.encode(found, self.log.run_id), self.log.data)

    def test_behind_the_end_there_is_nothing(self) -> None:
        with self.fake(watching(self.log, len(self.log.lines))):
            watch = self.watch(1000)
            self.assertEqual(self.seqs(watch), [])
            self.assertEqual(watch.state, "FAILED")

    def test_the_end_of_an_earlier_try_is_not_the_end(self) -> None:
        first_end = len(self.log.lines)
        self.log.write(events.RunRetried("again")).start("b").exit("b", 0).start("d").exit("d", 0)
        every = list(range(1, len(self.log.lines) + 1))
        for known in (first_end + 1, len(every) - 1, len(every)):
            with self.subTest(known=known), self.fake(watching(self.log, known)):
                watch = self.watch()
                self.assertEqual(self.seqs(watch), every)
                self.assertEqual(watch.state, "SUCCEEDED")

    def test_who_waits_for_the_end_is_told_only_that(self) -> None:
        for known, told in ((3, len(self.log.lines)), (len(self.log.lines), None)):
            with self.subTest(known=known), self.fake(ending(self.log, known)) as fake:
                watch = Watch(self.home, self.log.run_id, only_end=True)
                self.assertEqual(self.seqs(watch), [] if told is None else [told])
                self.assertEqual(watch.state, "FAILED")
                self.assertIs(fake.requests[-1]["params"]["only_end"], True)

    def test_who_waits_for_the_end_goes_on_with_the_log_when_the_daemon_is_gone(self) -> None:
        logs.save(self.home, self.log.data)
        with self.fake(ending(self.log, 3, is_cut=True)):
            watch = Watch(self.home, self.log.run_id, tick_sec=0.01, only_end=True)
            lines = iter(watch)
            self.assertIsNone(next(lines))
        for _ in lines:
            pass
        self.assertEqual(watch.state, "FAILED")

    def test_an_end_that_is_not_whole(self) -> None:
        spoilt = logs.encode(self.log.lines[-1:], self.log.run_id).replace(b"FAILED", b"failed")
        with self.fake(ending(self.log, 3, spoilt)), self.assertRaisesRegex(RunDamaged, "line of its end is not whole"):
            list(Watch(self.home, self.log.run_id, only_end=True))

    def test_a_repair_behind_the_end(self) -> None:
        self.log.put(LogRecovered(5, "torn-1-00000000"))
        with self.fake(watching(self.log, len(self.log.lines))):
            self.assertEqual(len(self.seqs(self.watch())), len(self.log.lines))
            self.assertEqual(self.seqs(self.watch(len(self.log.lines))), [len(self.log.lines)])

    def test_daemons_come_and_go(self) -> None:
        """Each event once and in order, whoever sends it (P11)."""
        every = list(range(1, len(self.log.lines) + 1))
        found = []
        watch = self.watch()
        lines = iter(watch)
        for end in range(1, len(every)):
            with self.fake(watching(self.log, end, end)) as fake:
                line = next(lines)
                assert line is not None
                found.append(line.seq)
                self.assertEqual(fake.requests[-1]["params"]["from_seq"], end)
        logs.save(self.home, self.log.data)
        found += self.seqs(lines)
        self.assertEqual(found, every)
        self.assertEqual(watch.state, "FAILED")

    def test_a_finished_log_needs_no_daemon(self) -> None:
        logs.save(self.home, self.log.data)
        watch = self.watch(4)
        self.assertEqual(self.seqs(watch), list(range(4, len(self.log.lines) + 1)))
        self.assertEqual((watch.state, self.waits), ("FAILED", 0))

    def test_an_unfinished_log_is_shown_and_waited_for(self) -> None:
        lines = self.log.data.splitlines(keepends=True)
        files = logs.save(self.home, b"".join(lines[:6]) + lines[6][:20])
        watch = self.watch(tick_sec=0.001)
        found: list[int | None] = []
        for line in watch:
            found.append(line and line.seq)
            if found.count(None) == 100:  # Several looks at the log later.
                with open(files.events, "wb") as file:
                    file.write(self.log.data)
                found.append(None)
        self.assertEqual(found[:6], [1, 2, 3, 4, 5, 6])
        self.assertEqual([seq for seq in found if seq], list(range(1, len(lines) + 1)))
        self.assertEqual((watch.state, self.waits), ("FAILED", 1))

    def test_a_log_that_was_retried_is_not_over(self) -> None:
        self.log.write(events.RunRetried("again"))
        files = logs.save(self.home, self.log.data)
        self.log.start("b").exit("b", 0).start("d").exit("d", 0)
        watch = self.watch(tick_sec=0.001)
        found = []
        for line in watch:
            if line is not None:
                found.append(line.seq)
            elif len(found) < len(self.log.lines):
                with open(files.events, "wb") as file:
                    file.write(self.log.data)
        self.assertEqual(found, list(range(1, len(self.log.lines) + 1)))
        self.assertEqual(watch.state, "SUCCEEDED")

    def test_ticks(self) -> None:
        go = threading.Event()

        def script(fake: Fake, request: dict[str, Any]) -> Iterator[bytes]:
            for number, data in enumerate(watching(self.log, len(self.log.lines))(fake, request)):
                if number == 3:
                    go.wait()
                yield data

        with self.fake(script):
            found = []
            for line in self.watch(tick_sec=0.001):
                found.append(line and line.seq)
                if found.count(None) == 2:
                    go.set()
        self.assertEqual(found[:4], [1, 2, None, None])

    def test_an_altered_line_is_damage(self) -> None:
        """What the daemon passes on is what its disk gave it, so each line proves itself."""
        lines = self.log.data.splitlines(keepends=True)
        swapped = logs.encode([self.log.lines[4]], self.log.run_id)
        unknown = events.encode(self.log.lines[3], 0).replace(b'"event":"', b'"event":"new_')
        body = unknown[: -len(b'12345678"}\n')]
        unknown = b'%b%08x"}\n' % (body, zlib.crc32(body, events.seed(self.log.run_id)))
        cases = (
            ("a byte was changed", lines[3].replace(b"step", b"stop", 1), "line 4 is not whole"),
            ("the checksum was changed", lines[3][:-4] + bytes([lines[3][-4] ^ 1]) + lines[3][-3:], "line 4 is not whole"),
            ("not even JSON", b"}" + lines[3], "line 4 is not whole"),
            ("another line", swapped, "line 5 comes where line 4 should be"),
            ("another run's line", logs.encode([self.log.lines[3]], "r2"), "line 4 is not whole"),
            ("an event of the future", unknown, "line 4: unknown event 'new_"),
        )
        for name, altered, expected in cases:

            def script(fake: Fake, request: dict[str, Any], altered: bytes = altered) -> Iterator[bytes]:
                yield protocol.result(request["id"], {"run_id": "r1", "state": "FAILED", "last_seq": len(lines)})
                for line in (*lines[:3], altered, *lines[4:]):
                    yield protocol.notifications("r1", line)

            with self.subTest(name), self.fake(script):
                found = []
                with self.assertRaisesRegex(RunDamaged, re.escape(expected)):
                    for line in self.watch():
                        found.append(line and line.seq)
                self.assertEqual(found, [1, 2, 3])

    def test_a_finished_log_that_does_not_reach_its_end(self) -> None:
        """Without a daemon, and without waiting for one for ever."""
        lines = self.log.data.splitlines(keepends=True)
        # The last batch: nothing behind it proves that it was on disk.
        data = b"".join([*lines[:-2], lines[-2].replace(b"step", b"stop", 1), lines[-1]])
        files = logs.save(self.home, data)
        why = f"its last line tells its end, but line {len(lines) - 1} is not whole"
        for ask in (
            # So many ticks later it would wait for ever.
            lambda: list(islice(self.watch(tick_sec=0.001), 1000)),
            lambda: history.status(self.home, "r1"),
            lambda: history.replay_run(self.home, "r1"),
            lambda: history.replay_file(files.events),
        ):
            with self.assertRaisesRegex(RunDamaged, why):
                ask()
        # A run that may be unfinished is for the next daemon to judge: it cuts such a tail off and goes on.
        with open(f"{self.home.live}/r1", "wb"):
            pass
        self.assertEqual(history.status(self.home, "r1")["last_seq"], len(lines) - 2)
        self.assertEqual(history.replay_run(self.home, "r1").lines, len(lines) - 2)

    def test_refusals_end_it(self) -> None:
        for code, expected in ((protocol.NO_SUCH_RUN, NoSuchRun), (protocol.DAMAGED, RunDamaged)):
            with self.subTest(code=code), self.fake(refuse(code)), self.assertRaises(expected):
                list(self.watch())
        with self.assertRaises(NoSuchRun):
            list(self.watch())

    def test_a_log_that_is_too_long_for_the_daemon(self) -> None:
        logs.save(self.home, self.log.data)
        with self.fake(refuse(protocol.READ_THE_LOG)):
            self.assertEqual(len(self.seqs(self.watch())), len(self.log.lines))
            self.assertEqual(client.status(self.home, "r1")["source"], "log")


class FakeAgainstReal(unittest.TestCase):
    """The fake is only as good as its likeness."""

    def test_the_same_conversation(self) -> None:
        with Daemon() as daemon:
            daemon.submit({"id": "a", "command": "true"}, run_id="r1")
            daemon.wait_for("r1")
            real = self.conversation(daemon.home, daemon.environ)
            lines = daemon.events("r1")
        log = logs.Log(logs.workflow())
        log.lines = lines
        with tempfile.TemporaryDirectory() as directory:

            def script(fake: Fake, request: dict[str, Any]) -> Iterable[bytes]:
                if request["params"].get("run_id") == "nope":
                    return refuse(protocol.NO_SUCH_RUN, "there is no run nope")(fake, request)
                return watching(log, len(lines))(fake, request)

            with Fake(Home(directory), script):
                fake = self.conversation(Home(directory), dict(os.environ))
        self.assertEqual(fake, real)

    def conversation(self, home: Home, environ: dict[str, str]) -> list[object]:
        with mock.patch.dict(os.environ, environ):
            connection = client.connect(home)
            assert connection is not None
            with connection:
                heard: list[object] = [sorted(connection.ask("hello", client.HELLO))]
                for method, params in (("status", {"run_id": "nope"}), ("cancel", {"run_id": "nope", "request": "1"})):
                    with self.assertRaises(NoSuchRun) as caught:
                        connection.ask(method, dict(params))
                    heard.append(str(caught.exception))
                heard.append(connection.ask("watch", {"run_id": "r1", "from_seq": 2}))
                heard += [connection.receive(None), connection.receive(None)]
        return heard


class Starting(unittest.TestCase):
    """A daemon that the client starts. Whatever is started carries the mark of a Daemon, which cleans up."""

    def setUp(self) -> None:
        self.daemon = Daemon()
        self.addCleanup(client.reap_daemons)
        self.addCleanup(self.daemon.clean)
        self.use(self.daemon)

    def use(self, daemon: Daemon) -> None:
        patch = mock.patch.dict(os.environ, daemon.environ, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def finish(self, daemon: Daemon | None = None) -> None:
        (daemon or self.daemon).check()

    def test_homes_of_all_kinds(self) -> None:
        for name in ("home", "with spaces and 'quotes'", "long/" + "x" * 200, "ünï/cödé", "deep/er/than/that"):
            daemon = Daemon(home=name)
            try:
                with self.subTest(home=name), mock.patch.dict(os.environ, daemon.environ, clear=True):
                    found = client.greet(daemon.home)
                    self.assertEqual(found["home"], daemon.home.directory)
                    self.assertEqual(os.stat(daemon.home.directory).st_mode & 0o777, 0o700)
                    self.assertEqual(os.stat(daemon.home.log).st_mode & 0o777, 0o600)
                    self.assertEqual(client.greet(daemon.home)["pid"], found["pid"])
                    self.assertTrue(client.stop_daemon(daemon.home, cancel_runs=False))
                    self.assertFalse(client.stop_daemon(daemon.home, cancel_runs=False))
                    self.assertIsNone(client.connect(daemon.home))
                    with open(daemon.home.lock, "rb") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                daemon.clean()

    def test_the_end_of_a_daemon_whose_place_another_has_taken(self) -> None:
        client.greet(self.daemon.home)
        read_lock = client._read_lock
        with (
            mock.patch.object(client, "_is_locked", return_value=True),
            mock.patch.object(client, "_read_lock", lambda home: {**read_lock(home), "pid": 0}),
        ):
            self.assertTrue(client.stop_daemon(self.daemon.home, cancel_runs=False))

    def test_a_request_larger_than_the_socket_s_buffer(self) -> None:
        steps = [{"id": f"s{number}", "command": "true #" + "x" * 900_000} for number in range(4)]
        run_id = library.submit({"workflow_id": "w", "steps": steps})
        self.daemon.wait_for(run_id, "SUCCEEDED")
        self.finish()

    def test_two_clients_at_the_same_moment(self) -> None:
        ids: list[str] = []
        barrier = threading.Barrier(6)

        def submit(number: int) -> None:
            barrier.wait()
            ids.append(library.submit({"workflow_id": "w", "steps": [{"id": "a", "command": "true"}]}, f"r{number}"))

        threads = [threading.Thread(target=submit, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(ids), [f"r{number}" for number in range(6)])
        for run_id in ids:
            self.daemon.wait_for(run_id, "SUCCEEDED")
        with open(self.daemon.home.log, encoding="utf-8") as file:
            self.assertEqual(len(re.findall(r", owns ", file.read())), 1)
        self.finish()

    def test_a_log_that_has_grown_is_put_aside(self) -> None:
        os.mkdir(self.daemon.home.directory, 0o700)
        for size, is_kept in ((client.MAX_LOG_BYTES, False), (client.MAX_LOG_BYTES + 1, True)):
            with open(self.daemon.home.log, "wb") as file:
                file.truncate(size)
            client.greet(self.daemon.home)
            self.assertEqual(os.path.exists(self.daemon.home.log + ".1"), is_kept)
            client.stop_daemon(self.daemon.home, cancel_runs=False)
        self.assertEqual(os.stat(self.daemon.home.log + ".1").st_size, size)

    def test_nothing_is_written_through_a_link(self) -> None:
        os.mkdir(self.daemon.home.directory, 0o700)
        target = f"{self.daemon.base}/target"
        os.symlink(target, self.daemon.home.log)
        with self.assertRaisesRegex(DaemonUnavailable, r"cannot be started: .*wfd\.log"):
            client.greet(self.daemon.home)
        self.assertFalse(os.path.exists(target))

    def test_a_home_that_is_not_ours(self) -> None:
        os.mkdir(self.daemon.home.directory, 0o700)
        link = f"{self.daemon.base}/link"
        os.symlink(self.daemon.home.directory, link)
        cases = [(link, "is a symbolic link")]
        if os.geteuid() == 0:
            os.mkdir(f"{self.daemon.base}/theirs", 0o777)
            os.chown(f"{self.daemon.base}/theirs", 65534, 65534)
            cases.append((f"{self.daemon.base}/theirs", "belongs to another user"))
        for path, expected in cases:
            with self.subTest(expected), self.assertRaisesRegex(DaemonUnavailable, expected):
                client.greet(Home(path))
            self.assertEqual(os.listdir(path), [])

    def test_a_run_of_ours_outlives_a_crash_of_the_daemon(self) -> None:
        """Nobody else comes by: whoever waits for a run of its own starts a daemon again."""
        gate = f"{self.daemon.base}/gate"
        os.mkfifo(gate)
        document = {"workflow_id": "w", "steps": [step("a", f"read x < {gate}"), step("b", "true", "a")]}

        library.submit(document, "r1")
        self.daemon.wait_for_event("r1", "step_started")

        def crash() -> None:
            daemon = client.ask(self.daemon.home, "hello", client.HELLO)
            assert daemon is not None and isinstance(daemon["pid"], int)
            os.kill(daemon["pid"], signal.SIGKILL)
            with open(gate, "w", encoding="utf-8") as file:
                file.write("go\n")

        thread = threading.Thread(target=crash)
        thread.start()
        self.addCleanup(thread.join)
        self.assertEqual(library.run(document, "r1")["state"], "SUCCEEDED")
        self.finish()

    def test_who_has_crashed(self) -> None:
        pid = client.greet(self.daemon.home)["pid"]
        assert isinstance(pid, int)
        self.assertFalse(client.has_crashed(self.daemon.home))
        client.stop_daemon(self.daemon.home, cancel_runs=False)
        self.assertFalse(client.has_crashed(self.daemon.home), "it was asked to end")
        pid = client.greet(self.daemon.home)["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: client.has_crashed(self.daemon.home), "the lock to be free")

    def test_a_daemon_that_cannot_start_says_why(self) -> None:
        os.mkdir(self.daemon.home.directory, 0o755)
        os.mkdir(f"{self.daemon.home.directory}/somebody's")
        # It is not the deadline that ends this: what cannot start now will not in a while.
        with (
            mock.patch.object(client, "START_DEADLINE_SEC", float("inf")),
            self.assertRaisesRegex(DaemonUnavailable, r"can be entered by others.*see .*wfd\.log") as caught,
        ):
            client.greet(self.daemon.home)
        self.assertNotIn("\n", str(caught.exception))

    def test_a_home_that_cannot_be_made(self) -> None:
        with open(f"{self.daemon.base}/file", "w", encoding="utf-8"):
            pass
        with self.assertRaisesRegex(DaemonUnavailable, "cannot be started: .*file"):
            client.greet(Home(f"{self.daemon.base}/file/home"))

    @unittest.skipUnless(os.path.exists("/proc/self/environ"), "needs /proc to see another process's environment")
    def test_what_a_service_manager_or_a_step_is_told_is_not_said_to_it(self) -> None:
        names = client._NOT_INHERITED
        with mock.patch.dict(os.environ, dict.fromkeys(names, "1")):
            pid = client.greet(self.daemon.home)["pid"]
        with open(f"/proc/{pid}/environ", "rb") as file:
            found = {variable.partition(b"=")[0].decode() for variable in file.read().split(b"\0")}
        self.assertFalse(found & set(names))
        self.assertIn(MARK, found)

    def test_a_cancel_after_the_daemon_s_death_starts_no_step(self) -> None:
        """The request is handed over with the start, so it is decided before anything else (P6)."""
        self.daemon.start()
        os.mkfifo(f"{self.daemon.directory}/fifo")
        second: dict[str, object] = {"id": "b", "command": "touch b", "depends_on": ["a"]}
        run_id = self.daemon.submit({"id": "a", "command": "cat < fifo", "grace_sec": 0}, second)
        self.daemon.wait_for_event(run_id, "step_started")
        self.daemon.kill()
        self.assertEqual(library.cancel(run_id, wait=True), "CANCELLED")
        self.assertEqual(self.daemon.names(run_id).count("step_started"), 1)
        self.assertEqual(self.daemon.read("b"), "")
        self.finish()


class Names(InAHome):
    def setUp(self) -> None:
        super().setUp()
        for run_id in ("20261123-072412-k3fq", "20261123-072412-zzzz", "20261124-010101-k3fq", "nightly", "nightly-2"):
            os.mkdir(self.home.run(run_id).directory)
        os.mkdir(f"{self.home.runs}/.new-x")

    def test_resolving(self) -> None:
        cases = (
            ("20261123-072412-k3fq", "20261123-072412-k3fq"),
            ("nightly", "nightly"),
            ("nightly-", "nightly-2"),
            ("zzzz", "20261123-072412-zzzz"),
            ("20261124", "20261124-010101-k3fq"),
            ("-zzzz", "20261123-072412-zzzz"),
            ("@latest", "nightly-2"),
            ("20261123-072412-k", "20261123-072412-k3fq"),
        )
        for text, expected in cases:
            with self.subTest(text=text):
                self.assertEqual(history.resolve(self.home, text), expected)

    def test_refusing(self) -> None:
        cases = (
            ("k3fq", "may be any of 2 runs: 20261124-010101-k3fq, 20261123-072412-k3fq"),
            ("20261123", "may be any of 2 runs"),
            ("072412", "there is no run '072412'"),
            ("nope", "there is no run 'nope'"),
            ("", "is no run id"),
            ("../runs", "is no run id"),
            ("nightly/", "is no run id"),
            (".new-x", "there is no run '.new-x'"),
            ("NIGHTLY", "is no run id"),
            ("@first", "is no run id"),
            ("a\nb", "is no run id"),
        )
        for text, expected in cases:
            with self.subTest(text=text), self.assertRaisesRegex(NoSuchRun, re.escape(expected)):
                history.resolve(self.home, text)

    def test_many_candidates_are_not_all_named(self) -> None:
        for number in range(9):
            os.mkdir(self.home.run(f"many-{number}").directory)
        with self.assertRaisesRegex(NoSuchRun, r"any of 9 runs: many-8, many-7, many-6, many-5, many-4, …$"):
            history.resolve(self.home, "many")

    def test_no_runs_at_all(self) -> None:
        for home in (Home(f"{self.base}/run"), Home("/nonexistent")):
            with self.assertRaisesRegex(NoSuchRun, "there are no runs"):
                history.resolve(home, "@latest")

    def test_a_run_that_only_the_daemon_still_has(self) -> None:
        """Somebody has deleted its directory: it must be possible to cancel it."""
        with self.fake(answer({"runs": [{"run_id": "gone"}]})):
            self.assertEqual(client.resolve(self.home, "gone"), "gone")
            self.assertEqual(client.resolve(self.home, "nightly"), "nightly")
            for text in ("gon", "@first", "none"):
                with self.subTest(text=text), self.assertRaises(NoSuchRun):
                    client.resolve(self.home, text)

    def test_new_ids_sort_by_time_and_differ(self) -> None:
        ids = [client.new_run_id(self.home) for _ in range(50)]
        for run_id in ids:
            self.assertRegex(run_id, r"^\d{8}-\d{6}-[a-z0-9]{4}$")
        self.assertGreater(len(set(ids)), 40)


class Order(InAHome):
    """Runs in the order of their submission."""

    def run_at(self, run_id: str, ns: int) -> None:
        files = self.home.run(run_id)
        os.mkdir(files.directory)
        with open(files.environment, "wb"):
            pass
        os.utime(files.environment, ns=(ns, ns))

    def test_names_do_not_lie(self) -> None:
        """A name that a user chose tells nothing; runs of one second are told apart."""
        base = 1_600_000_000 * 10**9  # 2020-09-13 12:26:40 UTC
        order = [
            ("zzz", -(10**15)),
            ("20200913-122500-aaaa", -100 * 10**9),
            ("20200913-122640-mmmm", 1),
            ("20200913-122640-zzzz", 2),
            ("20200913-122640-aaaa", 3),
            ("99991231-000000-aaaa", 10**9),
            ("20200913-122639-late", 2 * 10**9),
            ("1-running", 10**11),
            ("20210101-000000-aaaa", 10**16),
            ("nightly", 10**17),
        ]
        for run_id, offset in order:
            self.run_at(run_id, base + offset)
        expected = [run_id for run_id, _ in reversed(order)]
        for count in (None, *range(1, len(order) + 2)):
            with self.subTest(count=count):
                self.assertEqual(history.newest(self.home, count)[0], expected[:count])
        self.assertEqual(history.resolve(self.home, "@latest"), "nightly")

    def test_names_that_are_no_dates(self) -> None:
        for month, year in product(("00", "02", "13"), ("0000", "1970", "2020", "9999")):
            self.run_at(f"{year}{month}30-996161-aaaa", 0)
        ids = os.listdir(self.home.runs)
        for count in range(1, len(ids) + 1):
            with self.subTest(count=count):
                shown, known = history.newest(self.home, count)
                self.assertEqual((len(shown), sorted(known)), (count, sorted(ids)))
        self.assertEqual(history.resolve(self.home, "@latest"), max(ids))

    def test_a_time_beyond_all_years(self) -> None:
        """As tmpfs has them, to which they were copied."""
        for run_id in ("daily", "nightly"):
            self.run_at(run_id, 0)
        with mock.patch.object(history, "_submitted_ns", return_value=10**30):
            self.assertEqual(history.newest(self.home, 1)[0], ["nightly"])

    def test_of_many_only_few_are_looked_at(self) -> None:
        ids = [f"2020{number // 28 % 12 + 1:02}{number % 28 + 1:02}-{number % 24:02}0000-aaaa" for number in range(3000)]
        ids = [*dict.fromkeys(ids), "nightly"]
        for run_id in ids:
            os.mkdir(self.home.run(run_id).directory)
        with mock.patch.object(history, "_submitted_ns", side_effect=history._submitted_ns) as looked:
            self.assertEqual(len(history.newest(self.home, 5)[0]), 5)
        self.assertLess(looked.call_count, 20)


class Logs(InAHome):
    """What is read from a log when nobody answers."""

    def test_a_status_is_the_fold(self) -> None:
        log = logs.complete(logs.diamond(), {"c": [3]})
        logs.save(self.home, log.data)
        self.assertEqual(client.status(self.home, "r1"), {**log.run.describe(), "source": "log", "stalled": None})

    def test_every_cut_has_a_status_and_a_replay(self) -> None:
        """P7: cut anywhere behind line 1."""
        log = logs.complete(logs.workflow(logs.step("a"), logs.step("b", "a", retries=1)), {"b": [1]})
        files = logs.save(self.home, log.data)
        for end in logs.cuts(log.data):
            with open(files.events, "wb") as file:
                file.write(log.data[:end])
            lines = log.data[:end].count(b"\n")
            self.assertEqual(client.status(self.home, "r1")["last_seq"], lines)
            result = library.replay("r1")
            self.assertTrue(result.verified)
            self.assertEqual(result.lines, lines)
            self.assertEqual(result.torn_bytes, end - log.data.rfind(b"\n", 0, end) - 1)

    def test_damage_is_named(self) -> None:
        log = logs.complete(logs.diamond())
        lines = log.data.splitlines(keepends=True)
        middle = lines[3].replace(b"step", b"stop", 1)
        cases = (
            ("line 1 is cut", lines[0][:-5]),
            ("no line", b""),
            ("a byte was changed", b"".join([*lines[:3], middle, *lines[4:]])),
            ("a line is missing", b"".join([*lines[:3], *lines[4:]])),
            ("another run's log", logs.complete(logs.diamond(), run_id="r2").data),
        )
        for name, data in cases:
            with self.subTest(name):
                shutil.rmtree(self.home.run("r1").directory, ignore_errors=True)
                logs.save(self.home, data)
                for ask in (client.status, history.replay_run, lambda home, run_id: list(history.lines(home, run_id))):
                    with self.assertRaisesRegex(RunDamaged, "run r1 is damaged and was not touched"):
                        ask(self.home, "r1")

    def test_a_changed_decision_is_found(self) -> None:
        """P3: the first difference by line, expected and found."""
        log = logs.complete(logs.workflow(logs.step("a", retries=1), logs.step("b", "a")), {"a": [1, 1]})
        number = next(line.seq for line in log.lines if isinstance(line.event, events.StepFailed))
        lines = list(log.lines)
        lines[number - 1] = lines[number - 1]._replace(event=events.StepSucceeded("a", lines[number - 2].seq))
        logs.save(self.home, logs.encode(lines))
        result = library.replay("r1")
        self.assertFalse(result.verified)
        assert result.difference is not None
        self.assertEqual(result.difference.seq, number)
        self.assertIn("step_failed step=a", result.difference.expected)
        self.assertIn("step_succeeded step=a", result.difference.found)
        self.assertEqual(result.lines, number - 1)
        self.assertTrue(library.replay("r1", until=number - 1).verified)

    def test_a_file_under_any_name(self) -> None:
        log = logs.complete(logs.diamond(), run_id="elsewhere")
        path = f"{self.base}/copy"
        with open(path, "wb") as file:
            file.write(log.data)
        seen: list[int] = []
        result = history.replay_file(path, 4, lambda line: seen.append(line.seq))
        self.assertEqual((result.run.run_id, result.lines, seen), ("elsewhere", 4, [1, 2, 3, 4]))

    def test_files_that_are_no_logs(self) -> None:
        cases = ((b"", RunDamaged), (b"{}\n", RunDamaged), (b"\x7fELF", RunDamaged), (b'{"run_id":"../x"}\n', RunDamaged))
        for data, expected in cases:
            path = f"{self.base}/file"
            with open(path, "wb") as file:
                file.write(data)
            with self.subTest(data=data), self.assertRaises(expected):
                history.replay_file(path)
        for path in (f"{self.base}/nothing", self.base):
            with self.subTest(path=path), self.assertRaises(NoSuchRun):
                history.replay_file(path)

    def test_a_damaged_row(self) -> None:
        log = logs.Log(logs.diamond()).start("a")
        lines = log.data.splitlines(keepends=True)
        for data in (b"", lines[0][:-5], b"".join([*lines[:1], *lines[2:]]), b"{}\n"):
            shutil.rmtree(self.home.run("r1").directory, ignore_errors=True)
            logs.save(self.home, data)
            row = history.summary(self.home, "r1")
            assert row is not None
            with self.subTest(data=data):
                self.assertEqual((row["run_id"], row["state"], bool(row["why"])), ("r1", "DAMAGED", True))

    def test_a_row_of_a_later_version(self) -> None:
        """Whatever its last line is: a finished run is listed by its first and last line alone."""
        log = logs.complete(logs.diamond())
        first, *rest = log.data.splitlines(keepends=True)
        newer = logs.resealed(first.replace(b'"format":1', b'"format":2'))
        odd = logs.resealed(rest[-1].replace(b'"reason":""', b'"reason":"","mood":"new"'))
        for last in (rest[-1], odd):
            shutil.rmtree(self.home.run("r1").directory, ignore_errors=True)
            logs.save(self.home, b"".join([newer, *rest[:-1], last]))
            row = history.summary(self.home, "r1")
            assert row is not None
            self.assertEqual(row["state"], "NEWER")
            self.assertIn("was written by a newer wfd (format 2; this one reads up to 1)", str(row["why"]))

    def test_a_row_whose_first_line_was_altered(self) -> None:
        """The end of a run proves nothing about its beginning, which a row tells too."""
        log = logs.complete(logs.diamond())
        deep = b"[" * 100_000 + log.data[log.data.index(b"\n") :]
        for data in (log.data.replace(b'"at":"2', b'"at":"x', 1), log.data.replace(b'"w"', b'"v"', 1), deep):
            shutil.rmtree(self.home.run("r1").directory, ignore_errors=True)
            logs.save(self.home, data)
            row = history.summary(self.home, "r1")
            assert row is not None
            self.assertEqual(row["state"], "DAMAGED")
            self.assertTrue(render.list_text([row], 0.0, False))

    def test_rows_of_a_list(self) -> None:
        logs.save(self.home, logs.complete(logs.diamond(), run_id="won").data, "won")
        logs.save(self.home, logs.complete(logs.diamond(), {"b": [1]}, run_id="lost").data, "lost")
        logs.save(self.home, logs.Log(logs.diamond(), "live").start("a").data, "live")
        rows = {run_id: history.summary(self.home, run_id) for run_id in ("won", "lost", "live", "nope")}
        found = {
            run_id: row and [row[name] for name in ("workflow_id", "state", "steps", "succeeded", "failed", "running")]
            for run_id, row in rows.items()
        }
        self.assertEqual(
            found,
            {
                "won": ["w", "SUCCEEDED", 4, 4, 0, 0],
                "lost": ["w", "FAILED", 4, None, None, 0],
                "live": ["w", "RUNNING", 4, 0, 0, 1],
                "nope": None,
            },
        )


class Library(unittest.TestCase):
    """`import workflow`, against a real daemon that it starts itself."""

    DOCUMENT: ClassVar[dict[str, object]] = {
        "workflow_id": "w",
        "steps": [{"id": "a", "command": "echo $GREETING > out"}, {"id": "b", "command": "exit 3", "depends_on": ["a"]}],
    }

    def setUp(self) -> None:
        self.daemon = Daemon()
        self.addCleanup(client.reap_daemons)
        self.addCleanup(self.daemon.clean)
        patch = mock.patch.dict(os.environ, {**self.daemon.environ, "GREETING": "hello"}, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.daemon.directory)

    def test_a_run_from_its_start_to_its_replay(self) -> None:
        final = library.run(self.DOCUMENT)
        self.assertEqual((final["state"], final["source"]), ("FAILED", "daemon"))
        self.assertEqual([(step["id"], step["state"]) for step in final["steps"]], [("a", "SUCCEEDED"), ("b", "FAILED")])
        self.assertEqual(final["steps"][1]["exit_code"], 3)
        self.assertEqual(self.daemon.read("out"), "hello\n")
        run_id = final["run_id"]
        self.assertEqual(list(library.watch(run_id)), self.daemon.events(run_id))
        self.assertEqual(list(library.watch(run_id, 5)), self.daemon.events(run_id)[4:])
        self.assertTrue(library.replay(run_id).verified)
        self.assertEqual(library.cancel(run_id), "FAILED")
        self.assertEqual(library.retry(run_id), "RUNNING")
        self.assertEqual(library.wait(run_id), "FAILED")
        self.assertEqual(library.wait("@latest"), "FAILED")
        self.daemon.check()

    def test_three_ways_to_give_a_workflow(self) -> None:
        os.mkdir("sub")
        document = {**self.DOCUMENT, "steps": [{"id": "a", "command": "pwd > where", "cwd": "sub"}]}
        os.mkdir("there")
        os.mkdir("there/sub")
        with open("there/w.json", "w", encoding="utf-8") as file:
            json.dump(document, file)
        here, there = os.path.realpath("sub"), os.path.realpath("there/sub")
        ways: tuple[tuple[Any, str], ...] = (
            (document, here),
            ("there/w.json", there),
            (library.load("there/w.json"), there),
            (library.validate(document), here),
        )
        for way, expected in ways:
            with self.subTest(way=type(way)):
                self.assertEqual(library.run(way)["state"], "SUCCEEDED")
                with open(expected + "/where", encoding="utf-8") as file:
                    self.assertEqual(file.read(), expected + "\n")
                os.unlink(expected + "/where")
        self.daemon.check()

    def test_the_same_id_twice(self) -> None:
        self.assertEqual(library.submit(self.DOCUMENT, "mine"), "mine")
        self.assertEqual(library.submit(self.DOCUMENT, "mine"), "mine")
        with self.assertRaisesRegex(InvalidRequest, "another definition"):
            library.submit({**self.DOCUMENT, "max_parallel": 1}, "mine")
        self.assertEqual(library.wait("mine"), "FAILED")
        self.assertEqual(self.daemon.run_ids(), ["mine"])

    def test_what_is_refused_starts_no_daemon(self) -> None:
        with self.assertRaises(InvalidWorkflow) as caught:
            library.submit({"workflow_id": "w", "steps": [{"id": "a"}], "colour": "red"})
        self.assertEqual([path for path, _ in caught.exception.problems], ["$.colour", "$.steps[0].command"])
        with self.assertRaisesRegex(InvalidRequest, "cannot be a run id"):
            library.submit(self.DOCUMENT, "../../etc")
        with self.assertRaises(InvalidWorkflow):
            library.submit(self.DOCUMENT, max_parallel=0)
        with self.assertRaisesRegex(InvalidWorkflow, "No such file"):
            library.submit("nothing.json")
        for call in (library.status, library.cancel, library.retry, library.replay, library.wait):
            with self.assertRaises(NoSuchRun):
                call("nope")
        with self.assertRaises(InvalidRequest):
            library.watch("nope", 0)
        self.assertFalse(os.path.exists(self.daemon.home.directory))

    def test_all_that_it_exports_is_documented_and_typed(self) -> None:
        for name in library.__all__:
            found = getattr(library, name)
            self.assertTrue(found.__doc__, name)
            if inspect.isfunction(found) and name != "main":
                self.assertIn("return", typing.get_type_hints(found), name)


class UserForm(unittest.TestCase):
    def test_a_workflow_survives_being_written_down(self) -> None:
        import random

        full = {
            "id": "full", "command": "true", "retries": 3, "timeout_sec": 1.5, "grace_sec": 0.001, "on_lost": "fail",
            "backoff": {"initial_sec": 0.123, "factor": 1.5, "max_sec": 60.007, "jitter": 0.333},
            "env": {"x_ms": "1", "y_permille": "2", "steps": "3"}, "cwd": "/tmp",
        }  # fmt: skip
        workflows = [
            logs.workflow(full, timeout_sec=0.7, max_parallel=2, cwd="/x", env={"backoff": "z", "a_ms": "b"}),
            *(logs.random_workflow(random.Random(seed)) for seed in range(50)),
        ]
        for workflow in workflows:
            document = api._user_form(definition.to_record(workflow))
            self.assertEqual(definition.validate(json.loads(json.dumps(document)), "/elsewhere"), workflow)


if __name__ == "__main__":
    unittest.main()
