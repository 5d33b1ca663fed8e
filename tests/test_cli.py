"""The command line against a real daemon: what it prints, where, and its exit codes.

Most of it calls `cli.main` in this process (`call`), which is twenty times as fast as a process of its own (`execute`,
`popen`). Those are for what only they can show: streams, signals, terminals, a viewer that goes on meanwhile; and
`Processes` starts every command once as one.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import unittest
from collections.abc import Mapping
from typing import Any
from unittest import mock

from tests import logs
from tests.daemon import DEADLINE_SEC, ROOT, Daemon, deadline, step, wait_until
from wfctl import cli, client
from wfd import events

# -S: it needs nothing of this machine's site-packages, whose hooks may take longer than all the rest.
PROGRAM = (sys.executable, "-S", os.path.join(ROOT, "workflow.py"))


def setUpModule() -> None:
    """A shell starts what it puts in the background with SIGINT ignored, and so would be all that we start."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        unittest.addModuleCleanup(signal.signal, signal.SIGINT, before)


class Result:
    """What a command line came to."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code = code
        self.raw = out
        self.out = out.decode()
        self.err = err.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Case(unittest.TestCase):
    """A home of its own; `self.daemon` is not started unless a test does it, but cleans up whatever is."""

    maxDiff = None

    def setUp(self) -> None:
        self.daemon = Daemon()
        # Those that `call` has started are our children.
        self.addCleanup(client.reap_daemons)
        self.addCleanup(self.daemon.clean)
        self.environ: dict[str, str] = {**self.daemon.environ, "LC_ALL": "C.UTF-8"}
        # Buffered as at home, whatever this machine is set to.
        self.environ.pop("PYTHONUNBUFFERED", None)

    def popen(self, *arguments: str, program: tuple[str, ...] = PROGRAM, **settings: Any) -> subprocess.Popen[bytes]:
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        process = subprocess.Popen([*program, *arguments], cwd=self.daemon.directory, env=self.environ, **settings)
        # Whoever reads from it in vain reads the end of file at last.
        alarm = threading.Timer(DEADLINE_SEC, process.kill)
        alarm.start()
        self.addCleanup(self.end, process, alarm)
        return process

    def end(self, process: subprocess.Popen[bytes], alarm: threading.Timer) -> None:
        alarm.cancel()
        process.kill()
        process.communicate()

    def call(self, *arguments: str) -> Result:
        """What a command line comes to, in this process."""
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        with (
            deadline(),
            contextlib.chdir(self.daemon.directory),
            mock.patch.dict(os.environ, self.environ, clear=True),
            mock.patch.object(sys, "argv", [PROGRAM[-1]]),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            code = cli.main(arguments)
        out, err = (stream.detach() for stream in streams)
        return Result(code, out.getvalue(), err.getvalue())

    def execute(self, *arguments: str, text: str = "", program: tuple[str, ...] = PROGRAM) -> Result:
        """What it comes to as a process of its own."""
        process = self.popen(*arguments, program=program, stdin=subprocess.PIPE)
        out, err = process.communicate(text.encode(), DEADLINE_SEC)
        return Result(process.returncode, out, err)

    def write(self, *steps: Mapping[str, object], name: str = "w.json", **fields: object) -> str:
        """A workflow file in the current directory of the commands."""
        with open(f"{self.daemon.directory}/{name}", "w", encoding="utf-8") as file:
            json.dump({"workflow_id": "w", "steps": list(steps), **fields}, file)
        return name

    def gate(self, name: str = "gate") -> str:
        """A command that runs until `open_gate`."""
        path = f"{self.daemon.directory}/{name}"
        if not os.path.exists(path):
            os.mkfifo(path)
        return f"read x < {name}"

    def open_gate(self, name: str = "gate") -> None:
        def write() -> bool:
            with contextlib.suppress(OSError):  # ENXIO: nobody reads it yet.
                fd = os.open(f"{self.daemon.directory}/{name}", os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, b"go\n")
                os.close(fd)
                return True
            return False

        wait_until(write, f"a step that reads {name}")

    def on_terminal(self, *arguments: str, until: bytes = b"", keys: bytes = b"", rows: int = 24) -> tuple[int, str]:
        """A command whose whole terminal is a new one: its exit code, and what was shown."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, 80, 0, 0))
        self.environ["TERM"] = "xterm"

        def own_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        # So that Ctrl-C reaches all that would be reached in a shell.
        process = self.popen(*arguments, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_the_terminal)
        os.close(slave)
        shown = b""
        while True:
            ready, _, _ = select.select([master], [], [], DEADLINE_SEC)
            self.assertTrue(ready, f"nothing more came after {shown!r}")
            try:
                data = os.read(master, 65536)
            except OSError:
                data = b""
            if not data:
                return process.wait(DEADLINE_SEC), shown.decode()
            shown += data
            if keys and until in shown:
                os.write(master, keys)
                keys = b""


class Usage(unittest.TestCase):
    """Bad input: one clear sentence on stderr, exit 2 or 3, never a traceback, and no daemon is started."""

    def setUp(self) -> None:
        self.daemon = Daemon()
        self.addCleanup(self.daemon.clean)
        patch = mock.patch.dict(os.environ, self.daemon.environ)
        patch.start()
        self.addCleanup(patch.stop)
        self.base = self.daemon.base

    def main(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
        return code, out.getvalue(), err.getvalue()

    def file(self, text: str | bytes) -> str:
        path = f"{self.base}/w.json"
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def test_files(self) -> None:
        def one(fields: str, name: str = '"workflow_id": "w"') -> str:
            return f'{{{name}, "steps": [{{"id": "a", "command": "true"{fields}}}]}}'

        cases: tuple[tuple[str | bytes, str], ...] = (
            ("", "is empty"),
            ("{", "is not JSON"),
            ("[" * 100_000, "nested too deeply"),
            (b"\xff\xfe{\0}\0", "UTF-16"),
            (b'{"workflow_id": "\xe4"}', "not UTF-8"),
            ("[]", "must be an object"),
            (one("", '"workflow_id": 3'), r"\$\.workflow_id: must be a string"),
            (one("", '"workflow_id": "w", "workflow_id": "w"'), "more than once"),
            (one(', "timeout_sec": NaN'), r"\$\.steps\[0\]\.timeout_sec"),
            (one(', "timeout_sec": true'), r"\$\.steps\[0\]\.timeout_sec"),
            (one(', "retries": 1.5'), r"\$\.steps\[0\]\.retries"),
            (one(', "depends_on": ["a"]'), r"\$\.steps\[0\]"),
        )  # fmt: skip
        for text, expected in cases:
            for command in ("validate", "run"):
                with self.subTest(text=text[:60], command=command):
                    path = self.file(text)
                    code, out, err = self.main(command, path)
                    self.assertEqual((code, out), (2, ""))
                    self.assertRegex(err, expected)
                    self.assertTrue(err.startswith(f"{path}: $"), err)
                    self.assertEqual(err.count("\n"), 1)
        self.assertFalse(os.path.exists(self.daemon.home.directory))

    def test_every_problem_has_its_line(self) -> None:
        path = self.file('{"workflow_id": "w", "colour": 1, "steps": [{"id": "a"}, {"command": "true", "id": "\\u001b"}]}')
        code, _, err = self.main("run", path)
        self.assertEqual((code, err.count("\n")), (2, 3))
        self.assertNotIn("\x1b", err)
        code, out, err = self.main("run", "--json", path)
        found = json.loads(err)["error"]
        self.assertEqual((code, out, found["code"], len(found["problems"])), (2, "", 2, 3))
        self.assertEqual(found["problems"][0]["path"], "$.colour")

    def test_paths(self) -> None:
        os.mkdir(f"{self.base}/directory")
        cases = (
            ("nothing.json", "nothing.json: No such file or directory"),
            (f"{self.base}/directory", "Is a directory"),
            (f"{self.file('{}')}/below", "Not a directory"),
            ("/dev/zero", "is 62914561 bytes long"),
            ("nul\0", "contains NUL"),
            ("\x1b[31mred", r"\\x1b\[31mred: No such file"),
        )
        for path, expected in cases:
            with self.subTest(path=path):
                code, out, err = self.main("run", path)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertRegex(err, expected)

    def test_command_lines(self) -> None:
        cases = (
            ((), "a command is missing; there are run, status"),
            (("stat",), "there is no command 'stat'; there are run, status"),
            (("run",), "the following arguments are required: FILE; see `.* run --help`"),
            (("run", "a", "b"), "unrecognized arguments: b"),
            (("run", "--det", "a"), "unrecognized arguments: --det"),
            (("run", "--max-parallel", "0", "a"), "'0' is not a whole number from 1 on"),
            (("run", "--max-parallel", "x", "a"), "'x' is not a whole number from 1 on"),
            (("wait", "a", "--timeout", "nan"), "'nan' is not a number of seconds"),
            (("wait", "a", "--timeout", "-1"), "'-1' is not a number of seconds"),
            (("watch", "a", "--from", "0"), "'0' is not a whole number from 1 on"),
            (("status", "--color", "sometimes"), "invalid choice: 'sometimes'"),
            (("daemon",), "the following arguments are required: action"),
            (("daemon", "restart"), "invalid choice: 'restart'"),
            (("daemon", "start", "--cancel-runs"), "--cancel-runs goes with"),
        )
        for arguments, expected in cases:
            with self.subTest(arguments=arguments):
                code, out, err = self.main(*arguments)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertRegex(err, expected)
            with self.subTest(arguments=arguments, json=True):
                code, out, err = self.main(*arguments, "--json")
                self.assertEqual((code, out), (2, ""))
                self.assertEqual(sorted(json.loads(err)["error"]), ["code", "message"])

    def test_problems_have_a_place(self) -> None:
        path = self.file('{"workflow_id": "w", "steps": [{"id": "a", "command": "true"}]}')
        code, _, err = self.main("run", "--max-parallel", "9" * 12, path)
        self.assertEqual(code, 2)
        self.assertTrue(err.startswith(f"{path}: $.max_parallel"), err)
        program = "import os, sys; sys.path.insert(0, sys.argv[1]); os.rmdir(os.getcwd()); from wfctl import cli; " \
            "sys.exit(cli.main(['run', sys.argv[2]]))"  # fmt: skip
        gone = f"{self.base}/gone"
        os.mkdir(gone)
        command = [sys.executable, "-P", "-c", program, ROOT, path]
        result = subprocess.run(command, cwd=gone, capture_output=True, check=False)
        expected = b"the current directory does not exist any more; change to one that does\n"
        self.assertEqual((result.returncode, result.stderr), (2, expected))

    def test_what_to_type_next(self) -> None:
        for executable, expected in (("/usr/bin/python3.12", "python3.12"), ("/opt/pypy", "python3"), ("", "python3")):
            with mock.patch.object(sys, "executable", executable), mock.patch.object(sys, "argv", ["workflow.py"]):
                self.assertIn(f"see `{expected} workflow.py list --help`", self.main("list", "--nope")[2])

    def test_a_run_id_that_is_none(self) -> None:
        path = self.file('{"workflow_id": "w", "steps": [{"id": "a", "command": "true"}]}')
        for run_id in ("", "../x", "UPPER", "a b", ".hidden", "x" * 101):
            with self.subTest(run_id=run_id):
                code, _, err = self.main("run", "--run-id", run_id, path)
                self.assertEqual(code, 2)
                self.assertIn("cannot be a run id", err)
        self.assertFalse(os.path.exists(self.daemon.home.directory))

    def test_runs_that_are_not_there(self) -> None:
        os.makedirs(self.daemon.home.runs)
        for name in ("20261123-072412-k3fq", "20261123-072412-zzzz"):
            os.mkdir(self.daemon.home.run(name).directory)
        commands = ("status", "cancel", "retry", "replay", "watch", "logs", "wait")
        for command in commands:
            for run, expected in (("nope", "there is no run 'nope'"), ("2026", "may be any of 2 runs: .*k3fq")):
                with self.subTest(command=command, run=run):
                    code, out, err = self.main(command, run)
                    self.assertEqual((code, out, err.count("\n")), (3, "", 1))
                    self.assertRegex(err, expected)
        self.assertEqual(os.listdir(self.daemon.home.directory), ["runs"])

    def test_help(self) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            self.assertEqual(cli.main(["--help"]), 0)
        for name in cli.COMMANDS:
            self.assertIn(f"  {name} ", out.getvalue())
            own = io.StringIO()
            with contextlib.redirect_stdout(own), self.assertRaises(SystemExit) as caught:
                cli.main([name, "--help"])
            self.assertEqual(caught.exception.code, 0)
            self.assertIn("--json", own.getvalue())
            self.assertLessEqual(max(map(len, own.getvalue().splitlines())), 100)

    def test_version(self) -> None:
        self.assertRegex(self.main("--version")[1], r"^\d+\.\d+\.\d+\n$")

    def test_questions_without_a_daemon_start_none(self) -> None:
        cases = (
            (("list",), 0, "", ""),
            (("list", "--json"), 0, '{"source": "log", "runs": []}\n', ""),
            (("daemon", "status"), 4, f"no daemon is running for {self.daemon.home.directory}\n", ""),
            (("daemon", "stop"), 0, f"no daemon was running for {self.daemon.home.directory}\n", ""),
            (("status",), 3, "", f"there are no runs in {self.daemon.home.directory}\n"),
        )
        for arguments, code, out, err in cases:
            with self.subTest(arguments=arguments):
                self.assertEqual(self.main(*arguments), (code, out, err))
        self.assertEqual(json.loads(self.main("daemon", "status", "--json")[1])["running"], False)
        self.assertFalse(os.path.exists(self.daemon.home.directory))


class Run(Case):
    def test_attached(self) -> None:
        self.write(step("a", "true"), step("b", "echo out; echo err >&2; exit 3", "a"), step("c", "true", "b"))
        result = self.execute("run", "w.json")
        self.assertEqual(result.code, 1)
        lines = result.out.splitlines()
        self.assertRegex(lines[0], r"^run_id: \d{8}-\d{6}-[a-z0-9]{4}$")
        told = [line.split()[1:3] for line in lines[1:-1]]
        for expected in (["a", "RUNNING"], ["a", "SUCCEEDED"], ["b", "FAILED"], ["c", "SKIPPED"], ["(run)", "FAILED"]):
            self.assertIn(expected, told)
        self.assertRegex(lines[-1], r"^result: FAILED after \S+ \(1 succeeded, 1 failed, 1 skipped\)$")
        self.assertNotIn("\x1b", result.out)
        self.assertRegex(result.err, r"^step b, attempt 1, printed last \(.*/attempts/2-b\.1\.out\):\n  \| out\n  \| err\n$")

    def test_outcomes(self) -> None:
        """The daemon is started by the first, and serves them all."""
        cases = (("true", 0), ("false", 1))
        for command, code in cases:
            self.write(step("a", command))
            for flags in ((), ("-q",), ("--json",)):
                with self.subTest(command=command, flags=flags):
                    self.assertEqual(self.call("run", *flags, "w.json").code, code)
        self.assertEqual(self.call("daemon", "status").code, 0)
        self.daemon.check()

    def test_the_id_alone(self) -> None:
        self.write(step("a", "exit 7"))
        for flags, code in ((("-d",), 0), (("-q",), 1)):
            result = self.call("run", *flags, "w.json")
            self.assertRegex(result.out, r"^\d{8}-\d{6}-[a-z0-9]{4}\n$")
            self.assertEqual((result.code, result.err), (code, ""))
        result = self.call("run", "-d", "--json", "--run-id", "mine", "w.json")
        self.assertEqual((result.code, result.json), (0, {"run_id": "mine"}))

    def test_json_is_the_log(self) -> None:
        self.write(step("a", "echo '\u2192 \\033[1m'; exit 2", retries=1, backoff={"initial_sec": 0.01}), step("ü", "true"))
        result = self.execute("run", "--json", "--run-id", "r1", "w.json")
        self.assertEqual((result.code, result.err), (1, ""))
        with open(self.daemon.home.run("r1").events, "rb") as file:
            self.assertEqual(result.raw, file.read())

    def test_stdin_and_max_parallel(self) -> None:
        document = {"workflow_id": "w", "steps": [step("a", "pwd > where", cwd="."), step("b", "true")]}
        result = self.execute("run", "-q", "--max-parallel", "1", "--run-id", "r1", "-", text=json.dumps(document))
        self.assertEqual((result.code, result.err), (0, ""))
        self.assertEqual(self.daemon.read("where").strip(), os.path.realpath(self.daemon.directory))
        self.assertEqual(self.daemon.fold("r1").workflow.max_parallel, 1)
        result = self.execute("run", "-", text="{")
        self.assertEqual(result.code, 2)
        self.assertRegex(result.err, r"^stdin: \$: is not JSON")

    def test_the_same_id_again(self) -> None:
        self.write(step("a", "echo once >> count"))
        self.write(step("a", "false"), name="other.json")
        for _ in range(2):
            self.assertEqual(self.call("run", "--run-id", "r1", "w.json").code, 0)
            text = self.call("run", "-d", "--run-id", "r1", "w.json").err
        self.assertRegex(text, r"^run r1 exists already \(submitted 20\S+Z\): nothing new was started\n$")
        self.assertEqual(self.daemon.read("count"), "once\n")
        result = self.call("run", "--run-id", "r1", "other.json")
        self.assertEqual((result.code, result.err.count("\n")), (2, 1))
        self.assertRegex(result.err, "^run r1 exists and has another definition")

    def test_the_last_lines_of_what_a_step_printed(self) -> None:
        self.write(
            step("a", 'for i in 1 2 3 4 5 6 7 8 9 10 11 12; do printf "$i\\033[2J\\n"; done; exit 1'), step("b", "false")
        )
        result = self.call("run", "w.json")
        shown = [line for line in result.err.splitlines() if line.startswith("  | ")]
        self.assertEqual(shown, [f"  | {number}\\x1b[2J" for number in range(3, 13)])
        self.assertIn("step b, attempt 1, printed nothing\n", result.err)
        self.write(step("a", "printf '%0300d\\n' 7; exit 1"))
        self.assertIn(f"\n  | {'0' * 199}…\n", self.call("run", "w.json").err)
        self.assertNotIn("printed", self.call("run", "--json", "w.json").err)

    def test_what_the_submitter_has_is_what_steps_get(self) -> None:
        self.write(step("a", 'printf \'%s\\n\' "$GREETING" "$(umask)" "$(ulimit -n)" "$(pwd)" > seen'))
        self.environ["GREETING"] = "hello  world"
        line = 'umask 027; ulimit -S -n 77; exec "$@"'
        result = self.execute("run", "-q", "w.json", program=("/bin/sh", "-c", line, "sh", *PROGRAM))
        self.assertEqual((result.code, result.err), (0, ""))
        umask, *rest = self.daemon.read("seen").splitlines()[1:]
        self.assertEqual(self.daemon.read("seen").splitlines()[0], "hello  world")
        self.assertEqual(int(umask, 8), 0o027)
        self.assertEqual(rest, ["77", os.path.realpath(self.daemon.directory)])

    def test_one_program_under_three_names(self) -> None:
        self.write(step("a", "true"))
        self.environ["PYTHONPATH"] = ROOT
        for program in ((PROGRAM[-1],), ("-m", "wfctl"), ("-m", "workflow")):
            with self.subTest(program=program):
                self.assertEqual(self.execute("run", "-q", "w.json", program=(sys.executable, *program)).code, 0)
                self.assertEqual(self.execute("nope", program=(sys.executable, *program)).code, 2)


class Processes(Case):
    def test_every_command(self) -> None:
        """As a process of its own, which imports itself what it needs; and to the same effect as in this one."""
        self.write(step("a", "echo one"))
        orders: tuple[tuple[str, ...], ...] = (
            ("daemon", "start"), ("run", "--run-id", "r1", "w.json"), ("cancel", "r1"), ("retry", "r1"),
        )  # fmt: skip
        questions: tuple[tuple[str, ...], ...] = (
            ("validate", "w.json"), ("status", "r1", "--json"), ("list", "--json"), ("logs", "r1"), ("wait", "r1"),
            ("watch", "r1"), ("replay", "r1"),
        )  # fmt: skip
        self.assertEqual({arguments[0] for arguments in (*orders, *questions)}, set(cli.COMMANDS))
        for arguments in orders:
            result = self.execute(*arguments)
            # A run that has succeeded is not tried again.
            self.assertEqual((arguments, result.code), (arguments, 2 if arguments[0] == "retry" else 0))
        for is_running in (True, False):
            for arguments in questions:
                with self.subTest(arguments=arguments, is_running=is_running):
                    asked, called = self.execute(*arguments), self.call(*arguments)
                    self.assertEqual((asked.code, asked.err), (0, ""))
                    self.assertEqual((called.code, called.out, called.err), (0, asked.out, ""))
            self.assertEqual(self.execute("daemon", "status").code, 0 if is_running else 4)
            self.assertEqual(self.execute("daemon", "stop").code, 0)


class Leaving(Case):
    """A viewer goes; the run goes on."""

    def test_ctrl_c(self) -> None:
        self.write(step("a", self.gate()))
        for arguments in (
            ("run", "--run-id", "r1", "w.json"),
            ("watch", "r1"),
            ("run", "--run-id", "r1", "--json", "w.json"),
        ):
            with self.subTest(arguments=arguments):
                viewer = self.popen(*arguments)
                assert viewer.stdout is not None
                while b"RUNNING     attempt 1" not in (line := viewer.stdout.readline()) and b"step_started" not in line:
                    self.assertTrue(line)
                viewer.send_signal(signal.SIGINT)
                _, err = viewer.communicate(timeout=DEADLINE_SEC)
                self.assertEqual(viewer.returncode, 130)
                self.assertRegex(err.decode(), r"detached; the run goes on")
                self.assertRegex(err.decode(), r"workflow\.py watch r1")
                self.assertRegex(err.decode(), r"workflow\.py cancel r1")
        self.open_gate()
        self.assertEqual(self.call("wait", "r1").code, 0)

    def test_a_reader_that_goes(self) -> None:
        """`run --json | head -1`: quietly, and at once though nothing more happens for long."""
        self.write(step("a", self.gate()))
        for arguments in (("run", "--json", "--run-id", "r1", "w.json"), ("watch", "r1"), ("logs", "-f", "r1")):
            with self.subTest(arguments=arguments):
                viewer = self.popen(*arguments)
                assert viewer.stdout is not None and viewer.stderr is not None
                if arguments[0] != "logs":
                    self.assertTrue(viewer.stdout.readline())
                viewer.stdout.close()
                self.assertEqual(viewer.wait(DEADLINE_SEC), 141)
                self.assertEqual(viewer.stderr.read(), b"")
                viewer.stderr.close()
                viewer.stdout = viewer.stderr = None
        self.assertEqual(self.call("status", "r1", "--json").json["state"], "RUNNING")
        self.open_gate()
        self.daemon.wait_for("r1", "SUCCEEDED")

    def test_stdout_that_is_full(self) -> None:
        if not os.path.exists("/dev/full"):
            self.skipTest("there is no /dev/full here")
        with open("/dev/full", "wb") as full:
            process = self.popen("--help", stdout=full)
            _, err = process.communicate(timeout=DEADLINE_SEC)
        self.assertEqual((process.returncode, err), (74, b"stdout cannot be written: No space left on device\n"))
        for unbuffered in ("", "1"):
            with self.subTest(unbuffered=unbuffered), open("/dev/full", "wb") as full:
                environ = {**self.daemon.environ, "PYTHONUNBUFFERED": unbuffered}
                command = [sys.executable, f"{ROOT}/workflow.py", "list", "--json"]
                self.assertEqual(subprocess.run(command, env=environ, stdout=full, stderr=subprocess.PIPE).returncode, 74)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full here")
    def test_what_cannot_be_said_changes_no_exit_code(self) -> None:
        self.write(step("a", "echo one"))
        cases = (
            ("2>/dev/full", ("status", "nope"), 3),
            ("2>/dev/full", ("run", "--run-id", "r1", "w.json"), 0),
            ("2>/dev/full", ("run", "--run-id", "r1", "w.json"), 0),  # It says that there is nothing new.
            (">/dev/full 2>&1", ("run", "w.json"), 74),
            (">&-", ("logs", "r1"), 0),
            (">&-", ("status", "r1"), 0),
            ("2>&-", ("status", "nope"), 3),
            ("<&-", ("run", "-"), 2),
        )
        for redirection, arguments, code in cases:
            with self.subTest(redirection=redirection, arguments=arguments):
                program = ("/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *PROGRAM)
                result = self.execute(*arguments, program=program)
                self.assertEqual(result.code, code, result.err)
                self.assertNotIn("Traceback", result.err)

    def test_no_stdio_at_all(self) -> None:
        self.write(step("a", "exit 1"))
        line = 'exec "$@" <&- >&- 2>&-'
        self.assertEqual(self.execute("run", "w.json", program=("/bin/sh", "-c", line, "sh", *PROGRAM)).code, 1)
        self.daemon.check()


class Asking(Case):
    def setUp(self) -> None:
        super().setUp()
        self.write(step("a", "echo one"), step("b", "printf 'two\\033[1m'; echo err >&2; exit 3", "a", retries=1,
                                                backoff={"initial_sec": 0.01}), step("c", "echo never", "b"))  # fmt: skip
        self.call("run", "-q", "--run-id", "r1", "w.json")

    def test_status(self) -> None:
        by_daemon = self.call("status", "r1", "--json")
        self.assertEqual((by_daemon.code, by_daemon.err), (0, ""))
        found = by_daemon.json
        self.assertEqual(
            [found[name] for name in ("run_id", "workflow_id", "state", "source")], ["r1", "w", "FAILED", "daemon"]
        )
        self.assertEqual([each["id"] for each in found["steps"]], ["a", "b", "c"])
        self.assertEqual(
            [found["steps"][1][name] for name in ("state", "attempt", "exit_code", "reason")], ["FAILED", 2, 3, "exit"]
        )
        text = self.call("status").out
        self.assertRegex(text, r"^r1  w  FAILED  \S+  \(1 succeeded, 1 failed, 1 skipped\)\n")
        self.assertRegex(text, r"\nb +FAILED +2 +\S+ +exit 3\nc +SKIPPED +because of b\n$")
        self.assertEqual(self.call("daemon", "stop").code, 0)
        by_log = self.call("status", "r1", "--json")
        self.assertEqual({**by_log.json, "source": "daemon"}, found)
        self.assertEqual((by_log.json["source"], by_log.err), ("log", ""))
        again = self.call("status", "r1")
        self.assertEqual((again.out, again.err), (text, "this comes from the log, not from a daemon\n"))
        self.assertIsNone(self.daemon.process)

    def test_exit_status(self) -> None:
        self.assertEqual(self.call("status", "r1").code, 0)
        self.assertEqual(self.call("status", "r1", "--exit-status").code, 1)
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r2", "w.json")
        self.assertEqual(self.call("status", "r2", "--exit-status").code, 0)
        self.assertEqual(self.call("cancel", "r2", "--wait").out, "r2 CANCELLED\n")
        self.assertEqual(self.call("status", "r2", "--exit-status").code, 5)

    def test_list(self) -> None:
        self.write(step("a", "true"), workflow_id="other")
        self.call("run", "-q", "--run-id", "r2", "w.json")
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r3", "w.json")
        found = self.call("list", "--json").json
        self.assertEqual(found["source"], "daemon")
        rows = [[row["run_id"], row["workflow_id"], row["state"], row["steps"], row["succeeded"]] for row in found["runs"]]
        self.assertEqual(
            rows, [["r3", "w", "RUNNING", 1, 0], ["r2", "other", "SUCCEEDED", 1, 1], ["r1", "w", "FAILED", 3, None]]
        )
        self.assertEqual([line.split()[:2] for line in self.call("list").out.splitlines()][1:],
                         [["r3", "RUNNING"], ["r2", "SUCCEEDED"], ["r1", "FAILED"]])  # fmt: skip
        self.open_gate()
        self.daemon.wait_for("r3")

    def test_a_long_list(self) -> None:
        data = {f"n{number:03}": logs.complete(logs.workflow(), run_id=f"n{number:03}").data for number in range(60)}
        for run_id, content in data.items():
            logs.save(self.daemon.home, content, run_id)
        result = self.call("list")
        self.assertEqual(len(result.out.splitlines()), 1 + cli.LIST_LIMIT)
        self.assertEqual(result.err, "11 older runs are not shown; --all shows them\n")
        self.assertEqual(len(self.call("list", "--all", "--json").json["runs"]), 61)

    def test_a_live_run_is_listed_whatever_its_age(self) -> None:
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "old", "w.json")
        os.utime(self.daemon.home.run("old").environment, (1, 1))
        for number in range(cli.LIST_LIMIT):
            run_id = f"n{number:03}"
            logs.save(self.daemon.home, logs.complete(logs.workflow(), run_id=run_id).data, run_id)
        for source in ("daemon", "log"):
            found = self.call("list", "--json").json
            self.assertEqual(found["source"], source)
            self.assertEqual([found["runs"][-1][name] for name in ("run_id", "state")], ["old", "RUNNING"])
            self.assertEqual(len(found["runs"]), cli.LIST_LIMIT + 1)
            self.assertEqual(self.call("list").err.splitlines()[-1], "1 older runs are not shown; --all shows them")
            self.call("daemon", "stop")
        self.call("daemon", "start")
        self.open_gate()
        self.daemon.wait_for("old", "SUCCEEDED")

    def test_logs(self) -> None:
        self.assertEqual(self.call("logs", "r1").out, "==> a, attempt 1 <==\none\n==> b, attempt 2 <==\ntwo\x1b[1merr\n")
        self.assertEqual(self.call("logs", "r1", "b").out, "two\x1b[1merr\n")
        never = self.call("logs", "r1", "c")
        self.assertEqual((never.code, never.out, never.err), (0, "", "step c has not begun\n"))
        nope = self.call("logs", "r1", "x")
        self.assertEqual((nope.code, nope.err), (3, "run r1 has no step 'x'; it has a, b, c\n"))
        records = [json.loads(line) for line in self.call("logs", "r1", "--json").out.splitlines()]
        self.assertEqual(
            records, [{"step": "a", "attempt": 1, "line": "one"}, {"step": "b", "attempt": 2, "line": "two\x1b[1merr"}]
        )

    def test_following_logs(self) -> None:
        self.write(step("a", f"printf start; {self.gate()}; echo ' end'; exit 1", retries=1, backoff={"initial_sec": 0.01}),
                   step("b", "echo other", "a"))  # fmt: skip
        self.call("run", "-d", "--run-id", "r2", "w.json")
        self.daemon.wait_for_event("r2", "step_started")
        followers = [self.popen("logs", "-f", "r2", "a"), self.popen("logs", "-f", "r2")]
        assert followers[0].stdout is not None and followers[1].stdout is not None
        self.assertEqual(followers[0].stdout.read(5), b"start")
        self.assertEqual(followers[1].stdout.readline(), b"==> a, attempt 1 <==\n")
        self.assertEqual(followers[1].stdout.read(5), b"start")
        for attempt in (1, 2):
            self.daemon.wait_for_event("r2", "step_started", attempt=attempt)
            self.open_gate()
        outs = [follower.communicate(timeout=DEADLINE_SEC) for follower in followers]
        self.assertEqual(outs, [(b" end\nstart end\n", b""), (b" end\n==> a, attempt 2 <==\nstart end\n", b"")])
        self.assertEqual([follower.returncode for follower in followers], [0, 0])

    def test_wait(self) -> None:
        result = self.call("wait", "r1")
        self.assertEqual((result.code, result.out), (1, "r1 FAILED\n"))
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r2", "w.json")
        for timeout in ("0", "0.1"):
            result = self.call("wait", "r2", "--timeout", timeout)
            self.assertEqual((result.code, result.out), (124, ""))
            self.assertRegex(result.err, r"^run r2 is not over after \S+ seconds\n$")
        waiting = self.popen("wait", "r2", "--json")
        self.open_gate()
        out, _ = waiting.communicate(timeout=DEADLINE_SEC)
        self.assertEqual((waiting.returncode, json.loads(out)), (0, {"run_id": "r2", "state": "SUCCEEDED"}))

    def test_cancel_and_retry(self) -> None:
        for _ in range(2):
            result = self.call("cancel", "r1")
            self.assertEqual((result.code, result.out, result.err), (0, "r1 FAILED\n", ""))
        result = self.call("retry", "r1", "--json")
        self.assertEqual((result.code, result.json), (0, {"run_id": "r1", "state": "RUNNING"}))
        self.assertEqual(self.call("wait", "r1").code, 1)
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r2", "w.json")
        result = self.call("retry", "r2")
        self.assertEqual(result.code, 2)
        self.assertRegex(result.err, "^run r2 is not over")
        self.assertEqual(self.call("cancel", "r2", "--wait").out, "r2 CANCELLED\n")
        self.daemon.check()

    def test_watch(self) -> None:
        with open(self.daemon.home.run("r1").events, "rb") as file:
            lines = file.readlines()
        for from_seq in (1, 4, len(lines), len(lines) + 5):
            result = self.call("watch", "r1", "--json", "--from", str(from_seq))
            self.assertEqual((result.code, result.raw, result.err), (1, b"".join(lines[from_seq - 1 :]), ""))
        told = self.call("watch", "r1").out
        self.assertRegex(told, r"Z  b +READY +attempt 1 exited with 3; tried again after 0\.01 s\n")
        self.assertRegex(told, r"Z  \(run\) +FAILED +steps failed\n$")

    def test_validate(self) -> None:
        result = self.call("validate", "w.json")
        self.assertEqual((result.code, result.out), (0, "w.json is valid: w, 3 steps\n"))
        self.assertEqual(self.call("validate", "w.json", "--json").json, {"valid": True, "workflow_id": "w", "steps": 3})

    def test_the_daemon(self) -> None:
        found = self.call("daemon", "status", "--json").json
        self.assertEqual((found["running"], found["home"], found["active_runs"]), (True, self.daemon.home.directory, 0))
        self.assertEqual(self.call("daemon", "start", "--json").json["pid"], found["pid"])
        self.assertRegex(self.call("daemon", "status").out, rf"^the daemon runs: pid {found['pid']}, version ")
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r2", "w.json")
        self.daemon.wait_for_event("r2", "step_started")
        result = self.call("daemon", "stop")
        self.assertEqual((result.code, result.out), (0, "the daemon has ended\n"))
        self.assertEqual(self.daemon.fold("r2").state, "RUNNING")
        self.assertNotEqual(self.call("daemon", "start", "--json").json["pid"], found["pid"])
        self.assertEqual(self.call("daemon", "stop", "--cancel-runs", "--json").json, {"running": False})
        self.assertEqual(self.daemon.fold("r2").state, "CANCELLED")
        self.daemon.check()


class Replaying(Case):
    def setUp(self) -> None:
        super().setUp()
        for directory in (self.daemon.home.directory, self.daemon.home.runs, self.daemon.home.live):
            os.mkdir(directory, 0o700)
        self.log = logs.complete(logs.diamond(), {"b": [1]})
        self.files = logs.save(self.daemon.home, self.log.data)

    def rewrite(self, data: bytes) -> None:
        with open(self.files.events, "wb") as file:
            file.write(data)

    def test_verified(self) -> None:
        for source in ("r1", self.files.events, "@latest"):
            result = self.call("replay", source)
            self.assertEqual((result.code, result.err), (0, ""))
            story, status, verdict = result.out.split("\n\n")
            self.assertRegex(story, r"^07:24:12\.123Z  \(run\) +RUNNING +w, 4 steps\n")
            self.assertRegex(status, r"^r1  w  FAILED  0\.0s  \(2 succeeded, 1 failed, 1 skipped\)\n")
            self.assertEqual(verdict, f"replay verified: {len(self.log.lines)} lines, every decision regenerated\n")
        found = self.call("replay", "r1", "--json").json
        self.assertEqual(
            {name: found[name] for name in ("run_id", "verified", "lines", "difference", "state", "torn_bytes")},
            {
                "run_id": "r1",
                "verified": True,
                "lines": len(self.log.lines),
                "difference": None,
                "state": "FAILED",
                "torn_bytes": 0,
            },
        )
        self.assertEqual([each["state"] for each in found["steps"]], list(self.log.states().values()))

    def test_until(self) -> None:
        found = self.call("replay", "r1", "--until", "5", "--json").json
        self.assertEqual((found["lines"], found["state"]), (5, "RUNNING"))
        self.assertEqual(found["steps"][0]["state"], "SUCCEEDED")

    def test_changed_left_out_added(self) -> None:
        """P3: CRCs made right again, the first difference is named, exit 6."""
        lines = self.log.lines
        number = next(line.seq for line in lines if isinstance(line.event, events.StepSkipped))
        changed = [*lines]
        changed[number - 1] = lines[number - 1]._replace(event=events.StepReady("d", lines[number - 2].seq))
        left_out = logs.renumbered([*lines[: number - 1], *lines[number:]])
        added = logs.renumbered([*lines[:number], lines[number - 1], *lines[number:]])
        cases = ((changed, number), (left_out, number), (added, number + 1))
        for forged, seq in cases:
            self.rewrite(logs.encode(forged))
            result = self.call("replay", "r1")
            with self.subTest(seq=seq):
                self.assertEqual(result.code, 6)
                self.assertRegex(result.out, rf"\nreplay differs at line {seq}: expected .+, found .+\n$")
                found = self.call("replay", "r1", "--json")
                self.assertEqual((found.code, found.json["verified"], found.json["lines"]), (6, False, seq - 1))
                self.assertEqual(sorted(found.json["difference"]), ["expected", "found", "seq"])

    def test_a_torn_tail(self) -> None:
        self.rewrite(self.log.data[:-7])
        result = self.call("replay", "r1")
        count, torn = len(self.log.lines) - 1, len(self.log.data.splitlines(keepends=True)[-1]) - 7
        self.assertEqual((result.code, result.err), (0, f"after line {count} comes a torn tail of {torn} bytes\n"))
        self.assertEqual(self.call("replay", "r1", "--json").json["torn_bytes"], torn)

    def test_damage(self) -> None:
        """P7: refused by every command, in one sentence, and the others go on."""
        logs.save(self.daemon.home, logs.complete(logs.diamond(), run_id="r2").data, "r2")
        lines = self.log.data.splitlines(keepends=True)
        self.rewrite(b"".join([*lines[:4], lines[4].replace(b'"cause":', b'"couse":'), *lines[5:-1]]))
        for command in ("status", "replay", "logs", "watch", "wait"):
            result = self.call(command, "r1")
            with self.subTest(command=command):
                self.assertEqual((result.code, result.err.count("\n")), (6, 1))
                self.assertRegex(result.err, "^run r1 is damaged and was not touched: line 5 is missing or altered")
        found = self.call("status", "r1", "--json")
        self.assertEqual((found.code, json.loads(found.err)["error"]["code"]), (6, 6))
        cancelled = self.call("cancel", "r1")
        self.assertEqual((cancelled.code, cancelled.err.count("\n")), (6, 1))
        self.assertEqual([row["state"] for row in self.call("list", "--json").json["runs"]], ["SUCCEEDED", "DAMAGED"])
        self.assertEqual(self.call("status", "r2").code, 0)

    def test_a_daemon_whose_socket_was_removed(self) -> None:
        """It is not one that does not run: it owns the home, and no other can start."""
        self.daemon.start()
        os.unlink(self.daemon.socket_path)
        assert self.daemon.process is not None
        why = f"the daemon (pid {self.daemon.process.pid}) owns {self.daemon.home.directory}, but nobody listens at "
        with mock.patch.object(client, "SETTLE_SEC", 0.05):
            for command in ("status", "stop"):
                with self.subTest(command):
                    result = self.call("daemon", command)
                    self.assertEqual((result.code, result.err.count("\n")), (4, 1))
                    self.assertIn(why, result.err)
        self.assertEqual(self.call("status", "r1").code, 0, "the log is there")

    def test_a_log_that_is_too_long_for_the_daemon_is_read_by_whoever_asks(self) -> None:
        """P7: its last line, which is all that the daemon looks at, proves nothing about those before it."""
        steps = [logs.step(f"s{number}", command="true #" + "x" * 900_000) for number in range(5)]
        log = logs.complete(logs.workflow(*steps))
        self.rewrite(log.data)
        self.daemon.start()
        asked = (("wait",), ("watch", "-q"), ("watch", "--json"), ("cancel",), ("cancel", "--wait"))
        for command in asked:
            with self.subTest(command=command):
                result = self.call(*command, "r1")
                self.assertEqual((result.code, result.err), (0, ""))
        lines = log.data.splitlines(keepends=True)
        self.rewrite(b"".join([*lines[:4], lines[4].replace(b'"cause":', b'"couse":'), *lines[5:]]))
        self.daemon.damaged.add("r1")
        for command in asked:
            with self.subTest(command=command, is_damaged=True):
                result = self.call(*command, "r1")
                self.assertEqual((result.code, result.err.count("\n")), (6, 1))
                self.assertIn("run r1 is damaged and was not touched: line 5 is ", result.err)

    def test_attempts_that_the_log_does_not_know(self) -> None:
        """P7: a log that was cut, with what it had promised still on disk."""
        lines = self.log.data.splitlines(keepends=True)
        started = next(number for number, line in enumerate(lines) if b'"step_started"' in line)
        self.rewrite(b"".join(lines[:started]))
        files = self.daemon.home.run("r1").attempt(1, "a", 1)
        os.makedirs(os.path.dirname(files.status), exist_ok=True)
        with open(files.status, "w", encoding="ascii") as file:
            file.write("status 1\npid 2\nexit 0\n")
        for command in ("replay", "logs", "status"):
            with self.subTest(command=command):
                result = self.call(command, "r1")
                self.assertEqual((result.code, result.err.count("\n")), (6, 1))
                self.assertIn("the log ends before that attempt was started", result.err)
        self.assertEqual([row["state"] for row in self.call("list", "--json").json["runs"]], ["DAMAGED"])


class DaemonDies(Case):
    def test_viewers_miss_nothing(self) -> None:
        """P11: whatever happens to the daemon, each event once and in order."""
        names = [f"gate{number}" for number in range(4)]
        steps = [
            step(f"s{number}", self.gate(name), *([f"s{number - 1}"] if number else [])) for number, name in enumerate(names)
        ]
        self.write(*steps)
        viewers = [self.popen("run", "--json", "--run-id", "r1", "w.json")]
        wait_until(lambda: os.path.exists(self.daemon.home.run("r1").events), "the run")
        viewers += [self.popen("watch", "r1", "--json"), self.popen("watch", "r1", "--json", "--from", "3")]
        for number, name in enumerate(names):
            self.daemon.wait_for_event("r1", "step_started", step=f"s{number}")
            if number % 2:
                os.kill(self.call("daemon", "start", "--json").json["pid"], signal.SIGKILL)
                self.open_gate(name)
                self.assertEqual(self.call("daemon", "start").code, 0)
            else:
                self.open_gate(name)
        self.daemon.wait_for("r1", "SUCCEEDED")
        with open(self.daemon.home.run("r1").events, "rb") as file:
            lines = file.readlines()
        for viewer, first in zip(viewers, (1, 1, 3), strict=True):
            out, _ = viewer.communicate(timeout=DEADLINE_SEC)
            self.assertEqual(viewer.returncode, 0)
            self.assertEqual(out, b"".join(lines[first - 1 :]))
        self.daemon.check()

    def test_a_viewer_says_that_it_waits(self) -> None:
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r1", "w.json")
        self.daemon.wait_for_event("r1", "step_started")
        viewer = self.popen("watch", "r1")
        assert viewer.stderr is not None and viewer.stdout is not None
        self.assertTrue(viewer.stdout.readline())
        os.kill(self.call("daemon", "status", "--json").json["pid"], signal.SIGKILL)
        self.assertRegex(viewer.stderr.readline().decode(), "^no daemon answers; waiting for one")
        self.assertEqual(self.call("status", "r1", "--json").json["source"], "log")
        self.assertEqual(self.call("cancel", "r1", "--wait").out, "r1 CANCELLED\n")
        out, _ = viewer.communicate(timeout=DEADLINE_SEC)
        self.assertEqual(viewer.returncode, 5)
        self.assertRegex(out.decode(), r"\(run\) +CANCELLED.*\n$")
        self.daemon.check()

    def test_an_attached_run_starts_a_daemon_again(self) -> None:
        """What it waits for would never come. Each in a home of its own, so that none does it for the others."""
        orphans = []
        for flags in ((), ("-q",), ("--json",)):
            self.setUp()
            self.write(step("a", self.gate()), step("b", "true", "a"))
            viewer = self.popen("run", *flags, "--run-id", "r1", "w.json")
            wait_until(lambda: os.path.exists(self.daemon.home.run("r1").events), "the run")
            self.daemon.wait_for_event("r1", "step_started")
            os.kill(self.call("daemon", "status", "--json").json["pid"], signal.SIGKILL)
            self.open_gate()
            orphans.append((flags, viewer, self.daemon))
        for flags, viewer, daemon in orphans:
            with self.subTest(flags=flags):
                viewer.communicate(timeout=DEADLINE_SEC)
                self.assertEqual(viewer.returncode, 0)
                daemon.check()

    def test_a_stopped_daemon(self) -> None:
        """Questions fall back to the log, and say so; nobody waits for a minute."""
        self.write(step("a", self.gate()))
        self.call("run", "-d", "--run-id", "r1", "w.json")
        self.daemon.wait_for_event("r1", "step_started")
        pid = self.call("daemon", "status", "--json").json["pid"]
        os.kill(pid, signal.SIGSTOP)
        self.addCleanup(os.kill, pid, signal.SIGCONT)
        self.enterContext(mock.patch.object(client, "QUESTION_DEADLINE_SEC", 0.1))
        silent = f"the daemon (pid {pid}) does not answer: is it stopped?"
        for arguments, code, source in ((("status", "r1"), 0, "the log"), (("list",), 0, "the logs")):
            with self.subTest(arguments=arguments):
                result = self.call(*arguments)
                self.assertEqual(
                    (result.code, result.err), (code, f"{silent}\nthis comes from {source}, not from a daemon\n")
                )
        result = self.call("daemon", "status")
        self.assertEqual((result.code, result.out, result.err), (4, "", f"{silent}\n"))
        result = self.call("wait", "r1", "--timeout", "0.2")
        self.assertEqual((result.code, result.err.splitlines()[-1]), (124, "run r1 is not over after 0.2 seconds"))
        os.kill(pid, signal.SIGCONT)
        self.open_gate()
        self.daemon.wait_for("r1", "SUCCEEDED")


class Terminal(Case):
    """What a terminal is sent."""

    def test_a_picture_that_stays(self) -> None:
        self.write(step("a", "sleep 0.2"), step("b", "echo oops; exit 2", "a"), step("c", "true", "b"))
        code, shown = self.on_terminal("run", "w.json")
        self.assertEqual(code, 1)
        lines = shown.replace("\r\n", "\n")
        self.assertRegex(lines, r"^run_id: ")
        self.assertIn("\x1b[4A\r", lines)
        last = re.sub(r"\x1b\[\d*[mKJ]", "", lines.rpartition("A\r")[2]).split("\n")
        self.assertRegex(last[0], r"w  FAILED  \S+  \(1 succeeded, 1 failed, 1 skipped\)$")
        self.assertRegex(last[1], r"^  a  SUCCEEDED +0\.\ds$")
        self.assertRegex(last[2], r"^  b  FAILED +0\.\ds  exit 2$")
        self.assertRegex(last[3], r"^  c  SKIPPED +because of b$")
        self.assertRegex(last[4], r"^step b, attempt 1, printed last")
        self.assertEqual(last[5:], ["  | oops", ""])

    def test_colours(self) -> None:
        self.write(step("a", "true"))
        self.call("run", "-q", "--run-id", "r1", "w.json")
        self.assertIn("\x1b[32mSUCCEEDED", self.on_terminal("status")[1])
        self.assertNotIn("\x1b", self.on_terminal("status", "--color", "never")[1])
        self.assertIn("\x1b[32mSUCCEEDED", self.call("status", "--color", "always").out)
        self.environ["NO_COLOR"] = "1"
        self.assertNotIn("\x1b", self.on_terminal("status")[1])

    def test_ctrl_c_leaves_the_run_alone(self) -> None:
        self.write(step("a", self.gate()))
        code, shown = self.on_terminal("run", "--run-id", "r1", "w.json", until=b"RUNNING", keys=b"\x03")
        self.assertEqual(code, 130)
        self.assertRegex(shown, r"detached; the run goes on")
        self.assertEqual(self.call("daemon", "status").code, 0)
        self.daemon.wait_for_event("r1", "step_started")
        self.open_gate()
        self.daemon.wait_for("r1", "SUCCEEDED")

    def test_what_steps_print_cannot_do_anything(self) -> None:
        self.write(step("a", "printf 'tab\\there \\033]0;title\\007\\n\\303\\244 \\377 \\302\\233'"))
        self.call("run", "-q", "--run-id", "r1", "w.json")
        self.assertEqual(
            self.on_terminal("logs", "r1", "a")[1].replace("\r\n", "\n"), "tab\there \\x1b]0;title\\x07\nä \\xff \\x9b"
        )

    def test_from_the_middle_there_is_no_picture(self) -> None:
        self.write(step("a", "true"))
        self.call("run", "-q", "--run-id", "r1", "w.json")
        shown = self.on_terminal("watch", "r1", "--from", "2", "--color", "never")[1]
        self.assertNotIn("\x1b", shown)
        self.assertRegex(shown, r"a +SUCCEEDED")


if __name__ == "__main__":
    unittest.main()
