"""Who gets in, and what gets out (P10): modes from the first moment on, strangers, hostile peers, secrets, terminals, and
numbers that others have now.

Parts of it are tested where they are built: homes that cannot be used and descriptors in steps (test_supervisor), the
framing and the limits of one connection (test_server), what a client refuses (test_client), escaping (test_render).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator
from unittest import mock

from tests import logs, siege
from tests.daemon import Daemon, step, until, wait_until
from tests.test_cli import PROGRAM, Case
from tests.test_crash import facts_of, plant, write_status
from wfctl import cli, client
from wfd import machine
from wfd.events import Event
from wfd.paths import Home

# Sets a title, colours, turns the reading direction, resets: in the codes of 7 and of 8 bits.
EVIL = "\x1b]0;pwned\x07\x9b31m\u202e\x0b\x1bc"
HAS_PROC = os.path.exists("/proc/self/status")


class Modes(Case):
    """Under umask 0, so that only what is asked for counts."""

    CALLS = ("mkdir", "mkdirat", "open", "openat", "creat", "mknod", "mknodat", "bind", "chmod", "fchmodat", "umask")

    def setUp(self) -> None:
        super().setUp()
        self.top = f"{self.daemon.base}/missing"
        self.home = f"{self.top}/state/home"
        self.environ["WFD_HOME"] = self.home

    def carry_out(self, *command: str) -> None:
        # Not into pipes, which strace keeps open as long as there is a daemon.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command, cwd=self.daemon.directory, env=self.environ, umask=0, stdin=subprocess.DEVNULL, stdout=said,
                stderr=said, check=False,
            )  # fmt: skip
            said.seek(0)
            text = said.read()
        if b"ptrace" in text:
            self.skipTest("strace may not trace here")
        self.assertEqual(done.returncode, 0, text)

    def live(self, *wrappers: list[str]) -> None:
        """All that a home comes to hold: a client makes it, a run goes through it, its daemon is killed, its log is torn,
        and the next daemon mends it."""
        self.write(step("a", f"echo x; {until('go')}"))
        before_run, before_start = wrappers or ([], [])
        self.carry_out(*before_run, *PROGRAM, "run", "-d", "--run-id", "r1", "w.json")
        attempts = f"{self.home}/runs/r1/attempts"
        wait_until(lambda: os.path.isdir(attempts) and "1-a.1.out" in os.listdir(attempts), "the step")
        with open(f"{self.home}/wfd.lock", "rb") as file:
            os.kill(json.loads(file.read())["pid"], signal.SIGKILL)
        with open(f"{self.home}/runs/r1/events.ndjson", "ab") as log:
            log.write(b'{"seq":')
        wait_until(lambda: client.has_crashed(Home(self.home)), "the end of the daemon")
        self.carry_out(*before_start, *PROGRAM, "daemon", "start")
        self.daemon.touch("go")
        self.carry_out(*PROGRAM, "wait", "r1")

    def check_what_lies_there(self) -> None:
        modes = {}
        for directory, directories, files in os.walk(self.top):
            for name in (*directories, *files):
                path = os.path.join(directory, name)
                modes[os.path.relpath(path, self.home)] = stat.S_IMODE(os.lstat(path).st_mode)
        self.assertEqual({name: oct(mode) for name, mode in modes.items() if mode & 0o077}, {})
        self.assertEqual(stat.S_IMODE(os.stat(self.top).st_mode), 0o700, "nor are the directories that it lies in")
        wanted = {"wfd.lock", "wfd.log", "wfd.sock", "wfd.reserve", "live", "runs/r1/events.ndjson",
                  "runs/r1/environment.json", "runs/r1/attempts/1-a.1.status", "runs/r1/attempts/1-a.1.out"}  # fmt: skip
        self.assertLessEqual(wanted, modes.keys())
        self.assertTrue(any("torn-" in name for name in modes))

    def test_nothing_of_a_home_is_open_to_others(self) -> None:
        self.live()
        self.check_what_lies_there()

    @unittest.skipUnless(shutil.which("strace"), "strace shows what a file is made with; it is not installed")
    def test_nothing_ever_was(self) -> None:
        traces = [f"{self.daemon.base}/trace-{number}" for number in (1, 2)]
        calls = ",".join(f"?{name}" for name in self.CALLS)
        # -D: strace goes on beside the daemon, and the command that started it returns.
        self.live(*(["strace", "-D", "-f", "-s", "4096", "-o", trace, "-e", f"trace={calls}"] for trace in traces))
        self.check_what_lies_there()
        self.carry_out(*PROGRAM, "daemon", "stop")
        made: dict[str, list[str]] = {"directory": [], "file": [], "socket": []}
        for trace in traces:
            wait_until(lambda trace=trace: self.is_whole(trace), "the whole trace")  # type: ignore[misc]
            for kind, path, mode in self.made_in(self.read(trace)):
                made[kind].append(path)
                self.assertFalse(mode & 0o077, f"the {kind} {path} was made with {mode:o}")
        self.assertLessEqual({self.top, self.home, f"{self.home}/live", f"{self.home}/runs"}, set(made["directory"]))
        names = {os.path.basename(path) for path in made["file"]}
        self.assertLessEqual({"wfd.log", "wfd.lock", "environment.json", "1-a.1.status", "1-a.1.out"}, names)
        self.assertEqual(made["socket"], [f"{self.home}/wfd.sock"] * 2)

    def read(self, path: str) -> str:
        with open(path, encoding="utf-8") as file:
            return file.read()

    def is_whole(self, path: str) -> bool:
        """Has everybody ended whose calls are in it?"""
        lines = [line.split(maxsplit=2) for line in self.read(path).splitlines()]
        ended = {line[0] for line in lines if line[1:2] == ["+++"]}
        return bool(ended) and {line[0] for line in lines} == ended

    def made_in(self, trace: str) -> Iterator[tuple[str, str, int]]:
        """What was made below `top`: its kind, its path, and the bits that the umask of its maker has left."""
        umasks: dict[str, int] = {}
        for line in trace.splitlines():
            call = re.match(r"(\d+) +(\w+)\((.*)", line)
            if call is None:
                continue
            pid, name, rest = call.groups()
            if name == "umask":
                # Behind it comes a bracket, or `<unfinished ...>` where another process was faster.
                umasks[pid] = int(re.split("[^0-7]", rest)[0], 8)
                continue
            found = re.search(r'"([^"]*)"', rest)
            if found is None or not found[1].startswith(self.top):
                continue
            if name == "bind":
                yield "socket", found[1], 0o777 & ~umasks.get(pid, 0)
            elif "O_CREAT" in rest or name not in ("open", "openat"):
                bits = re.search(r", (0[0-7]*)(?:\)| <unfinished)", rest)
                assert bits is not None, line
                kind = "directory" if name.startswith("mkdir") else "file"
                mask = 0 if name.startswith("chmod") or name.startswith("fchmod") else umasks.get(pid, 0)
                yield kind, found[1], int(bits[1], 8) & ~mask


class Strangers(Case):
    def setUp(self) -> None:
        super().setUp()
        if why := siege.no_stranger_here():
            self.skipTest(why)

    def test_none_is_listened_to_though_home_and_socket_stand_open(self) -> None:
        self.daemon.start()
        self.assertEqual(siege.stranger_problems(self.daemon), [])
        self.assertEqual(siege.mode_of(self.daemon.socket_path), 0o600)
        self.daemon.wait_for(self.daemon.submit(step("a", "true")), "SUCCEEDED")

    def test_none_is_told_anything_by_a_client(self) -> None:
        """A socket at the right place, and a process of another uid behind it."""
        os.mkdir(self.daemon.home.directory, 0o700)
        self.write(step("a", "true"))
        self.environ["PASSWORD"] = "correct-horse-battery"
        # The kernel names as the peer whoever has called listen.
        program = (
            "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.setuid(65534); s.listen()\n"
            "print('ready', flush=True)\n"
            "while True: c, _ = s.accept(); print(c.recv(100), flush=True); c.close()"
        )
        command = [sys.executable, "-ISc", program, self.daemon.socket_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as stranger:
            self.addCleanup(stranger.kill)
            assert stranger.stdout is not None
            self.assertEqual(stranger.stdout.readline(), b"ready\n")
            for arguments in (("run", "w.json"), ("run", "-d", "w.json"), ("daemon", "status"), ("list",)):
                with self.subTest(arguments):
                    result = self.call(*arguments)
                    self.assertEqual((result.code, result.out), (4, ""))
                    self.assertRegex(result.err, r"\A[^\n]*belongs to another user's process; it was not spoken to\n\Z")
                    self.assertEqual(stranger.stdout.readline(), b"b''\n")
            stranger.kill()
        self.assertEqual(os.listdir(self.daemon.home.directory), ["wfd.sock"])

    def test_a_foreign_home(self) -> None:
        os.mkdir(self.daemon.home.directory, 0o700)
        os.chown(self.daemon.home.directory, 65534, 65534)
        Homes.check_refused(self, r"belongs to (another user|uid 65534)")


class Homes(Case):
    """What a person sees of a home that is not theirs alone."""

    def check_refused(self: Case, words: str) -> None:
        self.write(step("a", "true"))
        before = sorted(os.listdir(self.daemon.home.directory))
        result = self.call("run", "w.json")
        self.assertEqual((result.code, result.out), (4, ""))
        self.assertRegex(result.err, rf"\A[^\n]*{words}[^\n]*\n\Z")
        process = self.daemon.spawn()
        self.assertEqual(process.wait(60), 4)
        self.assertRegex(self.daemon.log(), rf"\Awfd: [^\n]*{words}[^\n]*\n\Z")
        # A client's daemon has said why in the home, if that is ours.
        self.assertEqual(sorted(set(os.listdir(self.daemon.home.directory)) - {"wfd.log"}), before)

    def test_a_link(self) -> None:
        os.mkdir(f"{self.daemon.base}/elsewhere", 0o700)
        os.symlink(f"{self.daemon.base}/elsewhere", self.daemon.home.directory)
        self.check_refused("symbolic link")
        self.assertEqual(os.listdir(f"{self.daemon.base}/elsewhere"), [])

    def test_one_that_others_may_enter(self) -> None:
        os.makedirs(f"{self.daemon.home.directory}/something")
        for mode in (0o710, 0o1701):
            with self.subTest(mode=oct(mode)):
                os.chmod(self.daemon.home.directory, mode)
                self.check_refused("can be entered by others")
                os.unlink(self.daemon.stderr)
                os.unlink(self.daemon.home.log)


@unittest.skipUnless(HAS_PROC, "the memory of a process is looked up in /proc")
class HostilePeers(unittest.TestCase):
    """Of the owner's own uid: nobody else gets so far. The long form is `python -m tests.siege`."""

    def test_all_kinds_at_once(self) -> None:
        with Daemon() as daemon:
            self.assertEqual(siege.siege(daemon, count=40, endless=1, seed=1, rounds=4), [])

    def test_a_thousand_idle_ones(self) -> None:
        with Daemon() as daemon, mock.patch.object(siege, "KINDS", (siege.Peer,)):
            assert daemon.process is not None
            with siege.besieged(daemon, 1_000, 0, 1) as peers:
                run_id = daemon.submit(step("a", "true"))
                self.assertEqual(daemon.wait_for(run_id).state, "SUCCEEDED")
                with daemon.connect() as client:
                    self.assertEqual(client.request("status", run_id=run_id)["state"], "SUCCEEDED")
                for peer in peers:
                    peer.send(b"\n")
                    self.assertFalse(peer.is_hung_up)
            self.assertLess(siege.memory_bytes(daemon.process.pid, "VmHWM"), 64 << 20)


class Secrets(Case):
    """Values of the submitter's environment."""

    SECRET = "correct-horse-battery"

    def asked(self, *arguments: str) -> str:
        """All that a command line says, in this process."""
        out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environ, clear=True),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        ):  # fmt: skip
            self.assertIn(cli.main(list(arguments)), (0, 1, 2, 4, 5), err.getvalue())
        out.seek(0)
        return out.read() + err.getvalue()

    def command_lines(self) -> Iterator[bytes]:
        """Of everything that carries this test's mark: the daemon, the shims, the steps."""
        for pid, _ in self.daemon._marked():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
                yield file.read()

    def test_are_in_one_private_file(self) -> None:
        self.environ["PASSWORD"] = self.SECRET
        fails = step("b", "exit 3", retries=1, backoff={"initial_sec": 0})
        self.write(step("a", until("go")), fails, step("c", "true", "b"))
        with open(f"{self.daemon.directory}/bad.json", "w", encoding="utf-8") as file:
            file.write('{"workflow_id": "w", "steps": [{"id": "a", "comand": "true"}]}')
        self.assertEqual(self.call("run", "-d", "--run-id", "r1", "w.json").code, 0)
        self.daemon.wait_for_event("r1", "step_failed", step="b")
        said = [self.asked("run", f"{self.daemon.directory}/bad.json")]
        if HAS_PROC:
            lines = list(self.command_lines())
            self.assertTrue(any(b"\0wfd\0" in line for line in lines) and any(b"go" in line for line in lines))
            self.assertFalse([line for line in lines if self.SECRET.encode() in line])
        said += [self.asked("status", "r1"), self.asked("status", "r1", "--json"), self.asked("list", "--json")]
        said += [self.asked("daemon", "status", "--json")]
        self.daemon.touch("go")
        self.daemon.wait_for("r1")
        self.call("retry", "r1")
        self.daemon.wait_for_event("r1", "run_finished", count=2)
        self.call("daemon", "stop")
        for arguments in (("status",), ("list",), ("watch", "r1"), ("logs", "r1"), ("replay", "r1"), ("wait", "r1")):
            said += [self.asked(*arguments), self.asked(*arguments, "--json")]
        self.assertNotIn(self.SECRET, "\n".join(said))
        self.assertEqual(self.files_that_hold(self.SECRET), [self.daemon.home.run("r1").environment])
        self.assertEqual(os.stat(self.daemon.home.run("r1").environment).st_mode & 0o777, 0o600)

    def files_that_hold(self, text: str) -> list[str]:
        found = []
        for directory, _, names in os.walk(self.daemon.base):
            for path in (os.path.join(directory, name) for name in names):
                if stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "rb") as file:
                        found += [path] * (text.encode() in file.read())
        return found


class Escapes(Case):
    """Nothing that others have written reaches a terminal raw: it is shown as its escape sequence."""

    # What the pictures and tables themselves send.
    OURS = re.compile(r"\x1b\[\d*[mAKJ]")

    def check_shown(self, *arguments: str) -> str:
        shown = self.on_terminal(*arguments)[1].replace("\r\n", "\n")
        # The picture goes back to the start of a line.
        rest = self.OURS.sub("", shown).replace("\r", "")
        raw = [char for char in rest if not (char.isprintable() or char == "\n")]
        self.assertEqual(raw, [], f"{arguments} shows {shown!r}")
        return rest

    def test_of_file_names_and_arguments(self) -> None:
        self.write(step("a", "true"), name=f"{EVIL}.json")
        self.write({"id": EVIL, "command": "true", "depends_on": [EVIL]}, step("b", "true", EVIL), name=f"{EVIL} bad.json")
        cases = [
            ("validate", f"{EVIL}.json"), ("validate", f"{EVIL} bad.json"), ("run", f"{EVIL} missing.json"), (EVIL,),
            ("status", EVIL), ("status", f"--{EVIL}"), ("replay", f"./{EVIL}.json"),
        ]  # fmt: skip
        for arguments in cases:
            with self.subTest(arguments):
                self.assertIn("\\x1b", self.check_shown(*arguments))

    def test_of_names_with_a_line_break(self) -> None:
        for arguments in (("run", "no\nsuch.json"), ("status", "no\nsuch"), ("replay", "./no\nsuch")):
            self.assertEqual(self.check_shown(*arguments).count("\n"), 1)

    def test_of_what_steps_print(self) -> None:
        octal = "".join(f"\\{byte:03o}" for byte in EVIL.encode())
        self.write(step("a", f"printf '{octal}'; exit 3"))
        self.assertIn("a, attempt 1, printed last", self.check_shown("run", "--run-id", "r1", "w.json"))
        self.assertIn("\\x1b]0;pwned\\x07\\x9b31m\\u202e\\x0b\\x1bc", self.check_shown("logs", "r1"))
        self.assertEqual(self.call("logs", "r1", "a").raw, EVIL.encode(), "into a pipe it goes as it is")

    def test_of_logs(self) -> None:
        """Whose checksums are right, as anybody can make them; and torn."""
        log = logs.Log(logs.workflow(logs.step("a"))).write(logs.session()).start("a").not_started("a", "exec")
        for names in (("run_id",), ("host", "version", "detail")):
            lines = [line._replace(event=self.evil(line.event, names)) for line in log.lines]
            files = logs.save(self.daemon.home, logs.encode(lines) + EVIL.encode())
            for arguments in (("status", "r1"), ("watch", "r1"), ("replay", "r1")):
                self.check_shown(*arguments)
            told = self.check_shown("replay", files.events)
            shutil.rmtree(files.directory)
        self.assertIn("\\x1b", told)

    def evil(self, event: Event, names: tuple[str, ...]) -> Event:
        """The event with other text in these fields, as far as it has them."""
        return event._replace(**{name: EVIL for name in names if name in event._fields})

    def test_of_the_home(self) -> None:
        self.environ["WFD_HOME"] = f"{self.daemon.base}/{EVIL}"
        self.write(step("a", "true"))
        self.check_shown("daemon", "status")
        self.check_shown("run", "w.json")
        with open(f"{self.environ['WFD_HOME']}/wfd.log", encoding="utf-8") as file:
            self.assertTrue(file.read().replace("\n", "").isprintable(), "the daemon's own log may be looked at, too")
        self.check_shown("daemon", "stop")
        os.chmod(self.environ["WFD_HOME"], 0o755)
        self.assertIn("can be entered by others", self.check_shown("run", "w.json"))

    def test_of_the_daemon_s_own_command_line(self) -> None:
        nowhere = f"{self.daemon.base}/w.json/{EVIL}"
        self.write(step("a", "true"), name="../w.json")
        for arguments in (("--home", EVIL), ("--home", nowhere), ("--max-parallel", EVIL), (EVIL,)):
            command = [sys.executable, "-m", "wfd", *arguments]
            settings = {"cwd": self.daemon.root, "env": self.daemon.environ, "text": True}
            done = subprocess.run(command, **settings, capture_output=True, check=False)  # type: ignore[call-overload]
            self.assertNotEqual(done.returncode, 0)
            self.assertTrue(done.stderr.replace("\n", "").isprintable(), done.stderr)


class ReusedNumbers(unittest.TestCase):
    """A status file names a number that somebody else has now: neither he nor his group is signalled."""

    # Whether the log says that this boot has spawned it; whether it is to be ended; what becomes of it.
    CASES = ((True, False, "killed"), (True, True, ""), (False, False, "rebooted"), (False, True, ""))

    def test_a_stranger_lives(self) -> None:
        made = [self.log(f"r{number}", *case[:2]) for number, case in enumerate(self.CASES)]
        # A group of two, none of them with our marks.
        stranger = subprocess.Popen(["sh", "-c", "sleep 600 & wait"], start_new_session=True)
        self.addCleanup(stranger.wait)
        self.addCleanup(os.killpg, stranger.pid, signal.SIGKILL)
        with Daemon() as daemon:
            daemon.kill()
            for log in made:
                write_status(plant(daemon.home, log), 1, "a", f"status 1\npid {stranger.pid}\n")
            daemon.start()
            for log, (is_this_boot, is_cancelled, why) in zip(made, self.CASES, strict=True):
                with self.subTest(is_this_boot=is_this_boot, is_cancelled=is_cancelled):
                    run = daemon.wait_for(log.run_id)
                    self.assertEqual(run.state, "CANCELLED" if is_cancelled else "FAILED")
                    if why:
                        self.assertEqual([fact.why for fact in facts_of(daemon, log.run_id, "a")], [why])
            self.assertIsNone(stranger.poll())
            if HAS_PROC:
                self.assertEqual(len(machine.group_members(stranger.pid)), 2)

    def log(self, run_id: str, is_this_boot: bool, is_cancelled: bool) -> logs.Log:
        log = logs.Log(logs.workflow(logs.step("a", on_lost="fail", grace_sec=0), cwd="/"), run_id)
        log.write(logs.session(machine.boot_id() if is_this_boot else "another-boot")).start("a")
        return log.cancel() if is_cancelled else log


if __name__ == "__main__":
    unittest.main()
