"""Two misfortunes that meet: in one turn, or the second in what the first has left undone. A reader found them; the
supervisor is turned by hand, so that each comes exactly when it is meant to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import unittest
from typing import Any
from unittest import mock

from tests import logs
from tests.loop import LoopTest
from tests.test_crash import plant, write_status
from wfd import journal, machine, process, protocol, requests, server, supervisor
from wfd.events import AttemptExited
from wfd.journal import Damaged
from wfd.orphans import Orphans
from wfd.paths import AttemptFiles, RunFiles
from wfd.process import Attempt
from wfd.server import Server
from wfd.state import Run

EIO = OSError(errno.EIO, "Input/output error")
NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")
# Most take 2 ms; the longest wait is one of 100 ms.
TURNS = 2_000
STAYS_READY = mock.patch.object(process, "start", side_effect=process.SpawnStalled("Resource temporarily unavailable"))


class Coincidence(LoopTest):
    def setUp(self) -> None:
        super().setUp()
        self.owner = self.loop()
        self.enterContext(mock.patch.multiple(supervisor, log=mock.DEFAULT, RETRY_MS=10))

    def turn(self) -> None:
        self.owner.turn(supervisor.monotonic_ms() + 2)

    def turn_until(self, is_so: Any, what: str) -> None:
        """Patience is counted in turns: what is to happen does so within a hundred."""
        for _ in range(TURNS):
            self.turn()
            if is_so():
                return
        self.fail(f"waited {TURNS} turns in vain for {what}")

    def state(self, run_id: str = "r1") -> str:
        return journal.fold(self.home.run(run_id), run_id)[0].state

    def names(self, run_id: str = "r1") -> list[str]:
        with journal.open_log(self.home.run(run_id), run_id) as file:
            return [line.event.name for line in journal.Reading(file, run_id)]

    def hold(self, files: RunFiles, step_id: str) -> None:
        """As the shim of attempt 1 of the first step does while it lives."""
        write_status(files, 1, step_id, "status 1\npid 99999999\n")
        shim = self.enterContext(open(files.attempt(1, step_id, 1).status, "rb"))
        fcntl.flock(shim, fcntl.LOCK_EX)

    def plant_ready(self, *run_ids: str) -> list[RunFiles]:
        """Runs that are taken over, and whose steps cannot be started."""
        files = [plant(self.home, logs.Log(logs.workflow(), run_id)) for run_id in run_ids]
        self.enterContext(STAYS_READY)
        self.owner.take_over_all()
        self.turn()
        return files


class Deadlines(Coincidence):
    """A step's timeout passes while another step of its run cannot be started."""

    def living(self, *started: str) -> None:
        log = logs.Log(logs.workflow(logs.step("x", timeout_sec=0.1), logs.step("y"), cwd="/"))
        log.now_ms = supervisor.monotonic_ms()
        self.hold(plant(self.home, log.start(*started)), "x")

    def test_while_the_daemon_s_limit_is_reached_by_it(self) -> None:
        """The other waits for this one, which hangs."""
        self.living("x", "y")
        self.owner.take_over_all()
        self.turn_until(lambda: "attempt_timed_out" in self.names(), "the timeout")

    def test_while_the_system_refuses_processes(self) -> None:
        self.living("x")
        self.owner.max_parallel = 2
        with STAYS_READY:
            self.owner.take_over_all()
            self.turn_until(lambda: "attempt_timed_out" in self.names(), "the timeout")


class Limit(Coincidence):
    def test_no_more_is_promised_than_may_run(self) -> None:
        self.plant_ready("r1", "r2")
        self.assertEqual([self.names(run_id).count("step_started") for run_id in ("r1", "r2")], [1, 0])


class OwedDecisions(Coincidence):
    """What followed from the last exit was torn off, and cannot be written at first."""

    def check(self, log: logs.Log, state: str) -> None:
        log.put(AttemptExited("a", 1, 0))
        plant(self.home, log)
        self.owner.take_over_all()
        with mock.patch.object(journal, "sync", side_effect=EIO):
            self.turn()
        self.turn_until(lambda: not self.owner.live, "the end of the run")
        self.assertEqual((self.owner.quarantined, self.state()), ({}, state))

    def test_of_a_step_that_was_cancelled(self) -> None:
        self.check(logs.Log(logs.workflow()).start("a").cancel(), "CANCELLED")

    def test_of_a_step_that_has_timed_out(self) -> None:
        log = logs.Log(logs.workflow(logs.step("a", timeout_sec=1))).start("a")
        log.now_ms += 1_000
        self.check(log.time_out("a"), "FAILED")


class Memory(Coincidence):
    """It runs out where a batch is written."""

    def check(self, patch: Any, code: int) -> None:
        client = self.client(self.owner, "cancel", run_id="r1", request="q")
        with patch:
            self.turn()
        self.assertEqual(json.loads(client.recv(10_000)).get("error", {}).get("code"), code)
        self.assertEqual((self.state(), os.listdir(self.home.live)), ("RUNNING", ["r1"]))

    def test_for_a_new_inode(self) -> None:
        self.plant_ready("r1")
        self.owner.live["r1"].journal._must_move = True
        self.check(mock.patch.object(journal, "_copy_to_new_inode", side_effect=MemoryError), protocol.STALLED)
        self.assertEqual(self.owner.live["r1"].stalled, "its log cannot be written: Cannot allocate memory")

    def test_for_the_state_that_is_on_disk(self) -> None:
        self.plant_ready("r1")
        self.enterContext(mock.patch.object(journal, "sync", side_effect=EIO))
        self.check(mock.patch.object(journal, "_fold", side_effect=MemoryError), protocol.DAMAGED)
        self.assertEqual(self.owner.running, 0)

    def test_for_a_line(self) -> None:
        self.plant_ready("r1")
        self.check(mock.patch.object(Run, "apply", side_effect=MemoryError), protocol.DAMAGED)


class Quarantine(Coincidence):
    def test_who_asks_in_its_very_turn_is_told_of_it(self) -> None:
        self.plant_ready("r1")
        clients = [
            self.client(self.owner, "watch", run_id="r1", from_seq=1, only_end=True),
            self.client(self.owner, "status", run_id="r1"),
            self.client(self.owner, "cancel", run_id="r1", request="q"),
        ]
        with mock.patch.object(journal, "sync", side_effect=EIO), mock.patch.object(os, "pread", side_effect=EIO):
            self.turn()
        self.assertEqual([json.loads(client.recv(10_000))["error"]["code"] for client in clients], [protocol.DAMAGED] * 3)

    def test_is_not_lifted_by_a_take_over_that_is_tried_again(self) -> None:
        plant(self.home, logs.Log(logs.workflow()))
        with mock.patch.object(journal, "recover", side_effect=NO_MEMORY):
            self.owner.take_over_all()
        self.owner.quarantine(Damaged("r1", "somebody has edited it"))
        self.turn_until(lambda: not self.owner._timers, "the next try")
        self.assertEqual((list(self.owner.quarantined), list(self.owner.live)), (["r1"], []))


class Names(Coincidence):
    """Nobody can tell whether a file is there: that is no no."""

    def unseen(self, prefix: str) -> Any:
        lstat = os.lstat

        def fails(path: str, *more: Any, **named: Any) -> os.stat_result:
            if str(path).startswith(prefix):
                raise NO_MEMORY
            return lstat(path, *more, **named)

        return mock.patch.object(os, "lstat", fails)

    def test_of_a_run_at_the_start(self) -> None:
        files = plant(self.home, logs.Log(logs.workflow()))
        with self.unseen(files.directory):
            self.owner.take_over_all()
        self.assertEqual((os.listdir(self.home.live), self.owner.is_idle), (["r1"], False))
        self.enterContext(STAYS_READY)
        self.turn_until(lambda: self.owner.live, "the take-over")

    def test_of_the_marker_of_a_run_that_waits(self) -> None:
        plant(self.home, logs.Log(logs.workflow()))
        with mock.patch.object(journal, "recover", side_effect=NO_MEMORY):
            self.owner.take_over_all()
        (due_ms, *_), *_ = self.owner._timers
        with self.unseen(self.home.live):
            self.turn_until(lambda: self.owner._timers[0][0] > due_ms, "the next try")
        self.enterContext(STAYS_READY)
        self.turn_until(lambda: self.owner.live, "the take-over")

    def test_of_the_status_file_of_a_living_attempt(self) -> None:
        files = plant(self.home, logs.Log(logs.workflow()).start("a"))
        self.hold(files, "a")
        with self.unseen(files.attempt(1, "a", 1).status):
            self.owner.take_over_all()
            self.turn()
        self.turn_until(lambda: self.owner.live["r1"].attempts, "the adoption")
        self.assertEqual((self.state(), self.names().count("supervisor_started")), ("RUNNING", 1))

    def test_of_a_run_that_somebody_asks_for(self) -> None:
        files = plant(self.home, logs.complete(logs.workflow()))
        with self.unseen(files.directory):
            self.assertEqual(self.ask(self.owner, "status", run_id="r1")["error"]["code"], protocol.STALLED)


class Reserve(Coincidence):
    def test_one_that_a_crash_has_left_empty_is_made_again(self) -> None:
        with open(self.home.reserve, "wb"):
            pass
        self.owner.make_reserve()
        self.assertEqual(os.path.getsize(self.home.reserve), supervisor.RESERVE_BYTES)


class Syncs(Coincidence):
    def test_one_that_finds_no_room_makes_others_doubtful_too(self) -> None:
        """Thin devices say so at the sync; a refused write says nothing of other logs."""
        files = self.plant_ready("r1", "r2")
        inodes = [os.stat(each.events).st_ino for each in files]
        self.owner.live["r2"].journal._must_move = True
        self.owner.drain()
        with mock.patch.object(journal, "sync", side_effect=[OSError(errno.ENOSPC, "No space left on device"), *[None] * 9]):
            self.turn()
        first, second = (os.stat(each.events).st_ino for each in files)
        self.assertEqual((first == inodes[0], second == inodes[1]), (False, True))


    def test_one_of_the_directory_while_a_log_moves_does_so_too(self) -> None:
        files = self.plant_ready("r1", "r2")
        inode = os.stat(files[0].events).st_ino
        self.owner.live["r2"].journal._must_move = True
        self.owner.drain()
        with mock.patch.object(journal, "sync", side_effect=[None, EIO, *[None] * 9]):
            self.turn()
        self.assertNotEqual(os.stat(files[0].events).st_ino, inode)


class Files(Coincidence):
    def test_an_attempt_that_never_began_and_whose_removal_is_killed(self) -> None:
        """Its output goes first: what has a status file is looked at, and what has none is started."""
        removed: list[str] = []
        with mock.patch.object(os, "unlink", removed.append):
            process.remove(AttemptFiles("out", "status", "sh"))
        self.assertEqual(removed, ["out", "status"])


class Groups(unittest.TestCase):
    def test_the_number_in_a_status_file_may_be_another_step_s(self) -> None:
        """An attempt of an earlier daemon, with a dead shim, whose number has come round to one of ours with an orphan."""
        orphans = mock.Mock(spec=Orphans, are_kept=True)
        orphans.of.side_effect = lambda group, marks: ([os.getpid()] if group is not None else [], [])
        attempt = Attempt(1, AttemptFiles("", "", ""), process.markers("w", "r1", "a", 1), None, 0, False, orphans)
        status = process.Status(exists=True, held=False, pid=os.getpgid(0), exit_code=None, error=None)
        with mock.patch.object(process, "probe", lambda files: status), mock.patch.object(process, "signal_group") as send:
            attempt.look(0, in_grace=False)
        self.assertNotIn(signal.SIGKILL, [number for _, number in (call.args for call in send.call_args_list)])

    def test_a_member_that_cannot_be_read_is_not_taken_for_gone(self) -> None:
        if not os.path.exists("/proc/self/stat"):
            self.skipTest("there is no /proc")
        for error, is_gone in ((FileNotFoundError(), True), (OSError(errno.ENFILE, "Too many open files in system"), False)):
            with self.subTest(error=error), mock.patch.object(machine, "_stat_in", side_effect=error):
                if is_gone:
                    self.assertEqual(machine.group_members(os.getpgid(0)), [])
                else:
                    self.assertRaises(OSError, machine.group_members, os.getpgid(0))


class Peers(Coincidence):
    def test_a_watcher_that_is_let_go_of_while_another_is_sent_a_batch(self) -> None:
        self.plant_ready("r1")
        for _ in range(2):
            self.client(self.owner, "watch", run_id="r1", from_seq=1_000)
            self.turn()
        first, second = self.owner.server.connections
        send = self.owner.server.send

        def send_and_close(connection: server.Connection, data: bytes) -> None:
            send(connection, data)
            self.owner.server.close(second if connection is first else connection)

        with mock.patch.object(self.owner.server, "send", send_and_close):
            self.owner.drain()
            self.turn()
        self.assertEqual(list(self.owner.server.connections), [first])

    def test_one_that_is_closed_before_its_watch_begins(self) -> None:
        self.plant_ready("r1")
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        connection = self.owner.server.welcome(theirs)
        _, begin = requests.METHODS["watch"](self.owner, connection, {"run_id": "r1", "from_seq": 1})
        self.owner.server.close(connection)
        begin()
        self.assertEqual(self.owner.watchers._places, {})

    def test_one_for_which_the_system_has_nothing(self) -> None:
        """It is let go of, and nobody else is disturbed."""
        selector = mock.Mock(spec=selectors.DefaultSelector)
        peers = Server(selector, lambda: 0)
        for refused in ("register", "modify"):
            with self.subTest(refused=refused):
                ours, theirs = socket.socketpair()
                self.addCleanup(ours.close)
                self.addCleanup(theirs.close)
                with mock.patch.object(selector, refused, side_effect=NO_MEMORY):
                    connection = peers.welcome(theirs)
                    connection.is_busy = True
                    peers.send(connection, b"x" * 10_000_000)
                self.assertTrue(connection.is_closed)

    def test_one_whose_request_has_no_room_in_memory(self) -> None:
        for part in ("inbox", "line"):
            with self.subTest(part=part):
                client = self.client(self.owner, "list")
                *_, connection = self.owner.server.connections
                if part == "inbox":
                    connection.inbox = mock.MagicMock(__iadd__=mock.Mock(side_effect=MemoryError), __len__=lambda _: 0)
                    self.turn()
                else:
                    with mock.patch.object(server, "memoryview", side_effect=MemoryError, create=True):
                        self.turn()
                self.assertEqual(client.recv(10), b"")


if __name__ == "__main__":
    unittest.main()
