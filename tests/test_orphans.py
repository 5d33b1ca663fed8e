"""Processes that leave their group with setsid: they end with their attempt, and nobody else does.

Real daemons, real processes. Each block of a Daemon ends with the proof that nothing of a finished run is alive, found by
its environment (daemon.py); here that includes what no group leads to.
"""

from __future__ import annotations

import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Collection
from contextlib import suppress
from unittest import mock

from tests.daemon import ROOT, Daemon, step, until, wait_until
from tests.loop import LoopTest
from wfd import machine, process
from wfd.orphans import Orphans
from wfd.paths import Home
from wfd.process import Attempt

ARE_FOUND = sys.platform == "linux" and os.path.exists("/proc/thread-self/children")

_DAEMONIZE = """
import os
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
os.execvp("sleep", ["sleep", "600"])
"""
# How a command leaves something behind that is not in its group: once it is below the command, once nobody's child.
FORMS = {
    "in the background": "setsid sleep 600 & exit 0",
    "after a moment": "setsid sleep 600 & sleep 0.05",
    "by a double fork": "(setsid sleep 600 &); sleep 0.05",
    "as daemons do it": f'exec {sys.executable} -ISc "$PROGRAM"',
    "a whole tree": "setsid sh -c 'setsid sh -c \"setsid sleep 600 & sleep 600\" & sleep 600' & sleep 0.05",
    "and fails": "setsid sleep 600 & exit 3",
    "and is killed": "(setsid sleep 600 &); sleep 0.05; kill -9 0",
}


# Its main thread has ended and another goes on: to the system it is a zombie that nobody can reap. It ignores TERM.
_HEADLESS = """
import ctypes, os, signal, sys, threading, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(600,)).start()
with open(sys.argv[1] + ".new", "w") as file:
    print(os.getpid(), file=file)
os.rename(sys.argv[1] + ".new", sys.argv[1])
ctypes.CDLL(None).syscall(int(sys.argv[2]), 0)
"""
# exit(2), which ends one thread, by its number: no library has a name for it.
_EXIT = {"x86_64": "60", "aarch64": "93"}.get(platform.machine(), "")


def headless(path: str) -> list[str]:
    return [sys.executable, "-ISc", _HEADLESS, path, _EXIT]


def is_headless(pid: int) -> bool:
    with suppress(OSError), open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z" and len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


# In a step's environment: writes its number into a file of the name that it is given, and down each TERM that it hears.
STAYS = {
    "STAYS": 'trap "echo TERM >> heard.$0; $ON_TERM" TERM; echo $$ > pid.$0; while :; do sleep 0.02; done',
    "ON_TERM": "exit",
}


def stays(name: str) -> str:
    return f'sh -c "$STAYS" {name}'


def is_alive(pid: int) -> bool:
    """A zombie is not: this asks for what it runs."""
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return bool(file.read())
    return False


@unittest.skipUnless(ARE_FOUND, "only Linux hands orphans to whom wants them, and lists them")
class Left(unittest.TestCase):
    """By an attempt that has ended in one way or another."""

    def test_nothing_of_it_is_alive_when_the_attempt_is_over(self) -> None:
        with Daemon() as daemon:
            for name, command in FORMS.items():
                with self.subTest(name):
                    fields: dict[str, object] = {"env": {"PROGRAM": _DAEMONIZE}, "on_lost": "fail"}
                    run_id = daemon.submit(*(step(f"s{number}", command, **fields) for number in range(4)), max_parallel=2)
                    self.assertTrue(daemon.wait_for(run_id).is_over)
                    self.assertEqual(daemon.processes(run_id), [])

    def test_nothing_of_it_is_alive_when_the_next_attempt_starts(self) -> None:
        see = 'case $(ps -o stat= -p "$(cat left)") in ""|Z*) echo gone;; *) echo alive;; esac'
        leave = f"setsid sh -c 'echo $$ > left; exec sleep 600' & {until('left')}; exit 1"
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("a", f'if [ "$WFD_ATTEMPT" = 1 ]; then {leave}; fi; {see}', retries=1, backoff={"initial_sec": 0})
            )
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertEqual(daemon.output(run_id, "a", 2), "gone\n")

    @unittest.skipUnless(_EXIT, "the number of exit(2) is not known here")
    def test_one_without_its_main_thread(self) -> None:
        """It holds up nobody: neither its own attempt nor any other."""
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", f"setsid {shlex.join(headless('left'))} & {until('go')}"))
            pid = int(daemon.wait_for_file("left"))
            wait_until(lambda: is_headless(pid), "the end of its main thread")
            # In a daemon that has orphans, each attempt asks whose they are.
            daemon.wait_for(daemon.submit(step("other", "true")), "SUCCEEDED")
            self.assertTrue(is_headless(pid), "its own step goes on")
            daemon.touch("go")
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertFalse(is_headless(pid))

    @unittest.skipUnless(_EXIT, "the number of exit(2) is not known here")
    def test_one_without_its_main_thread_in_the_group_of_an_adopted_attempt(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", f"{shlex.join(headless('left'))} & {until('go')}", grace_sec=0.1))
            pid = int(daemon.wait_for_file("left"))
            wait_until(lambda: is_headless(pid), "the end of its main thread")
            daemon.kill()
            daemon.start()
            daemon.request("cancel", run_id=run_id, request="end")
            daemon.wait_for(run_id, "CANCELLED")
            self.assertFalse(is_headless(pid))

    def test_others_are_left_alone(self) -> None:
        """What another step has left while it goes on, and what says by its environment that it is no step's."""
        free = f"env -u WFD_RUN_ID setsid {stays('free')} &"
        with Daemon() as daemon:
            run_id = daemon.submit(
                step("a", f"(setsid {stays('orphan')} &); {free} {until('pid.free')}; {until('go')}", env=STAYS),
                step("b", f"{until('pid.orphan')}; {until('pid.free')}; setsid sleep 600 & exit 0"),
            )
            daemon.wait_for_event(run_id, "step_succeeded", step="b")
            orphan, free_pid = (int(daemon.wait_for_file(f"pid.{name}")) for name in ("orphan", "free"))
            self.assertTrue(is_alive(orphan), "its step goes on")
            daemon.touch("go")
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertFalse(is_alive(orphan))
            self.assertTrue(is_alive(free_pid))
            self.assertEqual((daemon.read("heard.orphan"), daemon.read("heard.free")), ("", ""))

    def test_of_a_step_of_an_earlier_daemon_it_is_not_found(self) -> None:
        """The limit of it, as the README says."""
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", f"setsid {stays('left')} & {until('go')}", env=STAYS))
            left = int(daemon.wait_for_file("pid.left"))
            daemon.restart()
            daemon.touch("go")
            daemon.wait_for(run_id, "SUCCEEDED")
            self.assertTrue(is_alive(left))
            os.kill(left, signal.SIGKILL)
            wait_until(lambda: not daemon.processes(run_id), "its end")


@unittest.skipUnless(ARE_FOUND, "only Linux hands orphans to whom wants them, and lists them")
class Cancelled(unittest.TestCase):
    # A member of the group, one that has left it and is the command's child, and one that is nobody's child any more.
    NAMES = ("member", "child", "orphan")
    COMMAND = "; ".join(
        [
            f"{stays('member')} & setsid {stays('child')} & (setsid {stays('orphan')} &)",
            *(until(f"pid.{name}") for name in NAMES),
            "echo > ready; exec sleep 600",
        ]
    )

    def test_each_hears_one_term(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", self.COMMAND, grace_sec=600, env=STAYS))
            daemon.wait_for_file("ready")
            daemon.request("cancel", run_id=run_id, request="q")
            daemon.wait_for(run_id, "CANCELLED")
            heard = {name: daemon.read(f"heard.{name}") for name in self.NAMES}
            self.assertEqual(heard, dict.fromkeys(self.NAMES, "TERM\n"))

    def test_who_does_not_obey_is_killed_after_the_grace(self) -> None:
        with Daemon() as daemon:
            run_id = daemon.submit(step("a", self.COMMAND, grace_sec=0.3, env={**STAYS, "ON_TERM": ":"}))
            daemon.wait_for_file("ready")
            daemon.request("cancel", run_id=run_id, request="q")
            daemon.wait_for(run_id, "CANCELLED")
            self.assertEqual(daemon.processes(run_id), [])


class Fixed(Orphans):
    """Whose answers are given beforehand."""

    def __init__(self, members: list[int], others: list[int]) -> None:
        super().__init__(())
        self.found = members, others
        self.groups: list[int | None] = []

    def of(self, group: int | None, marks: object) -> tuple[list[int], list[int]]:
        self.groups.append(group)
        return self.found


class Ending(unittest.TestCase):
    """What an attempt does to what is found, in this process."""

    def spawn(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child

    def attempt(self, orphans: Orphans) -> Attempt:
        files = Home("/nowhere/at/all").run("r1").attempt(1, "a", 1)
        attempt = Attempt(1, files, {}, None, 0, False, orphans)
        attempt.phase = "sweeping"
        return attempt

    def test_a_term_in_its_grace_and_then_a_kill(self) -> None:
        for in_grace, number in ((True, signal.SIGTERM), (False, signal.SIGKILL)):
            pid = self.spawn().pid
            attempt = self.attempt(Fixed([], [pid]))
            with mock.patch.object(os, "kill", wraps=os.kill) as kill:
                self.assertIsNotNone(attempt.look(0, in_grace=in_grace))
                self.assertIsNotNone(attempt.look(0, in_grace=in_grace))
            sent = [call.args for call in kill.call_args_list]
            self.assertEqual(sent.count((pid, number)), 1 if in_grace else 2)
            self.assertEqual({kind for _, kind in sent} - {0, signal.SIGCONT}, {number})

    def test_a_group_that_is_gone_while_others_stay_has_no_number_any_more(self) -> None:
        gone = self.spawn()
        orphans = Fixed([], [self.spawn().pid])
        attempt = self.attempt(orphans)
        attempt.pid, attempt.is_child = gone.pid, True
        attempt.reaped(process.Exit(gone.pid, 0, process.Usage(0, 0, 0)), 0)
        attempt.look(0, in_grace=True)
        gone.kill()
        gone.wait()
        attempt.look(process.GROUP_STAYS_MS, in_grace=True)
        attempt.look(process.GROUP_STAYS_MS + 1, in_grace=True)
        self.assertEqual(orphans.groups, [gone.pid, gone.pid, None])

    def test_it_is_over_when_nothing_is_found(self) -> None:
        self.assertIsNone(self.attempt(Fixed([], [])).look(0, in_grace=False))

    def test_it_is_not_over_while_a_member_is_there(self) -> None:
        self.assertIsNotNone(self.attempt(Fixed([os.getpid()], [])).look(0, in_grace=True))


class Listing(unittest.TestCase):
    """Which children are whose, in this process: the list is a file that the test writes."""

    MARKS = process.markers("w", "r1", "a", 1)

    def orphans(self, pids: Collection[int], shims: Collection[int]) -> Orphans:
        listing = self.enterContext(tempfile.TemporaryFile())
        listing.write(b"".join(b"%d " % pid for pid in pids))
        listing.flush()
        orphans = Orphans(shims)
        with mock.patch.object(machine, "keep_orphans", lambda: listing.fileno()):
            orphans.keep()
        orphans.look()
        return orphans

    def spawn(self, **marks: str) -> int:
        environ = {"PATH": os.defpath, **{name.decode(): value.decode() for name, value in self.MARKS.items()}, **marks}
        child = subprocess.Popen(["sleep", "600"], env=environ, start_new_session=True)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        return child.pid

    @unittest.skipUnless(os.path.exists("/proc/self/environ"), "needs /proc to see another process's environment")
    def test_group_then_marks(self) -> None:
        shim, mine, other, stranger = self.spawn(), self.spawn(), self.spawn(WFD_ATTEMPT="2"), self.spawn(WFD_RUN_ID="r2")
        orphans = self.orphans([shim, mine, other, stranger], {shim})
        # Popen returns in the middle of an exec.
        self.assertEqual(wait_until(lambda: orphans.of(None, self.MARKS), "their environments"), ([], [mine]))
        self.assertEqual(orphans.of(stranger, self.MARKS), ([stranger], [mine]))
        self.assertEqual(orphans.of(mine, self.MARKS), ([mine], []))

    def test_shims_are_no_orphans(self) -> None:
        shim = self.spawn()
        self.assertEqual(self.orphans([shim], {shim}).of(None, self.MARKS), ([], []))

    def test_one_that_cannot_be_told_yet(self) -> None:
        mine = self.spawn()
        orphans = self.orphans([mine], ())
        with mock.patch.object(machine, "environment_of", lambda pid: None):
            self.assertIsNone(orphans.of(None, self.MARKS), "ask again")
        with mock.patch.object(machine, "environment_of", lambda pid: machine.as_variables(self.MARKS)):
            self.assertEqual(orphans.of(None, self.MARKS), ([], [mine]))
        with mock.patch.object(machine, "environment_of", lambda pid: frozenset()):
            self.assertEqual(orphans.of(None, self.MARKS), ([], [mine]), "it is known from then on")
            orphans.forget(mine)
            self.assertEqual(orphans.of(None, self.MARKS), ([], []), "until it is reaped")

    def test_a_list_longer_than_one_reading(self) -> None:
        pids = range(10_000, 40_000)
        with tempfile.TemporaryFile() as listing:
            listing.write(b"".join(b"%d " % pid for pid in pids))
            listing.flush()
            self.assertEqual(machine.count_children(listing.fileno()), len(pids))
            self.assertEqual(machine.children(listing.fileno()), list(pids))

    def test_a_list_that_cannot_be_read_hides_nothing(self) -> None:
        orphans = self.orphans([], ())
        with mock.patch.object(machine, "count_children", side_effect=OSError):
            orphans.look()
        with mock.patch.object(machine, "children", side_effect=OSError), self.assertRaises(OSError):
            orphans.of(None, self.MARKS)

    def test_where_the_system_has_no_such_thing(self) -> None:
        orphans = Orphans(())
        with mock.patch.object(machine, "keep_orphans", lambda: None):
            orphans.keep()
        orphans.look()
        self.assertEqual((orphans.are_kept, orphans.of(None, self.MARKS)), (False, ([], [])))


@unittest.skipUnless(os.path.exists("/proc/self/environ"), "needs /proc to see another process's environment")
class Reaped(LoopTest):
    def test_what_was_known_of_it_is_not_believed_of_the_next_of_its_number(self) -> None:
        marks = process.markers("w", "r1", "a", 1)
        environ = {b"PATH": os.defpath.encode(), **marks}
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exec sleep 600"], environ, setsid=True)
        listing = self.enterContext(tempfile.TemporaryFile())
        listing.write(b"%d " % pid)
        listing.flush()
        loop = self.loop()
        with mock.patch.object(machine, "keep_orphans", lambda: listing.fileno()):
            loop._orphans.keep()
        loop._orphans.look()
        try:
            # What was just spawned is in the middle of an exec.
            self.assertEqual(wait_until(lambda: loop._orphans.of(None, marks), "its environment"), ([], [pid]))
        finally:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: self.ask(loop, "list") and not process.group_exists(pid), "its end")
        with mock.patch.object(os, "getpgid"), mock.patch.object(machine, "environment_of", lambda pid: frozenset()):
            self.assertEqual(loop._orphans.of(None, marks), ([], []))


# Becomes a subreaper; prints what it becomes the parent of, and what is said of a zombie and of one in between. Each look
# at a process may meet it in the middle of an exec, of which it may have several to come.
_SUBREAPER = """
import os, signal, sys
from wfd import machine

def known(call, *arguments):
    while (found := call(*arguments)) is None:
        pass
    return found

def look():
    assert machine.children(listing) == []
    reading, writing = os.pipe()
    shell = os.posix_spawn("/bin/sh", ["sh", "-c", "setsid sleep 600 & read -r x"], {**os.environ, "MINE": "yes"},
                           file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)])
    assert machine.children(listing) == [shell]
    os.write(writing, b"die\\n")
    os.waitid(os.P_PID, shell, os.WEXITED | os.WNOWAIT)
    assert machine.environment_of(shell) is None, "a zombie has none"
    assert machine.count_children(listing) == 2
    os.waitpid(shell, 0)
    [orphan] = machine.children(listing)
    assert b"MINE=yes" in known(machine.environment_of, orphan)
    assert known(machine.carries, orphan, {b"MINE": b"yes"})
    assert not known(machine.carries, orphan, {b"MINE": b"no"})
    os.kill(orphan, signal.SIGKILL)
    os.waitpid(orphan, 0)
    assert machine.environment_of(orphan) is None, "it is gone"
    bare = os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
    assert known(machine.environment_of, bare) == frozenset()
    os.kill(bare, signal.SIGKILL)
    os.waitpid(bare, 0)

listing = machine.keep_orphans()
assert listing is not None and os.get_inheritable(listing) is False
try:
    look()
finally:
    for child in machine.children(listing):
        os.kill(child, signal.SIGKILL)
"""


@unittest.skipUnless(ARE_FOUND, "only Linux hands orphans to whom wants them, and lists them")
class TheSystem(unittest.TestCase):
    """machine.py, asked in a process of its own: what it changes there cannot be changed back."""

    def test_orphans_come_to_us(self) -> None:
        command = [sys.executable, "-c", _SUBREAPER]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_an_exec_is_not_taken_for_an_empty_environment(self) -> None:
        """As /proc shows it at four moments: before the new memory has anything, while strings are counted, after."""
        for code, begin, end, expected in (
            (b"0", b"0", b"0", None),
            (b"0", b"77", b"77", None),
            (b"5", b"77", b"99", None),
            (b"5", b"77", b"77", frozenset()),
        ):
            fields = [b"0"] * 50
            fields[26 - 3], fields[50 - 3], fields[51 - 3] = code, begin, end
            with (
                self.subTest(code=code, end=end),
                mock.patch("builtins.open", lambda path, mode: io.BytesIO()),
                mock.patch.object(machine, "_stat_in", lambda directory, fields=fields: fields),
            ):
                self.assertEqual(machine.environment_of(1), expected)

    def test_a_proc_of_others_is_not_believed(self) -> None:
        with mock.patch.object(os, "readlink", lambda path: "1"):
            self.assertIsNone(machine.keep_orphans())

    def test_a_python_without_ctypes(self) -> None:
        with mock.patch.dict(sys.modules, {"ctypes": None}):
            self.assertIsNone(machine.keep_orphans())


if __name__ == "__main__":
    unittest.main()
