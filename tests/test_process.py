"""Tests of wfd.process and wfd.machine: one attempt, kept by every shell of this machine, to its end or to its outcome."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator, Mapping
from unittest import mock

from tests.daemon import deadline, wait_until
from wfd import machine, process
from wfd.paths import AttemptFiles
from wfd.process import Attempt, Exit, Launch, Outcome, SpawnStalled, Status, Usage

# Any of them may be somebody's /bin/sh. Only those that are here are asked.
SHELLS = [name for name in ("sh", "dash", "bash", "busybox", "mksh", "zsh") if shutil.which(name)]
PATH = os.environ.get("PATH", os.defpath)
# What shells (and Python) put into the environment by themselves.
SHELL_VARIABLES = {"PWD", "OLDPWD", "SHLVL", "_", "LOGNAME", "LC_CTYPE"}
USAGE = Usage(1, 2, 3)

_low: list[int] = []


def setUpModule() -> None:
    """The daemon keeps its low descriptors occupied, for a spawn would clobber them: so do we. And what whoever runs the
    tests has left open is no business of the steps'."""
    for name in os.listdir("/dev/fd/"):
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)
    while not _low or _low[-1] < 9:
        _low.append(os.open(os.devnull, os.O_RDONLY))


def tearDownModule() -> None:
    while _low:
        os.close(_low.pop())


class Bench:
    """Attempts in a directory of their own, kept by one shell: the shim runs in it, and the command too."""

    def __init__(self, test: unittest.TestCase, shell: str = "sh") -> None:
        self.directory = tempfile.mkdtemp(prefix="wfd-test-")
        test.addCleanup(shutil.rmtree, self.directory)
        self.attempts: list[Attempt] = []
        test.addCleanup(self._end_all)
        path = shutil.which(shell)
        assert path is not None
        # Every one of them behaves as `sh` when it is called so.
        self.shell = f"{self.directory}/sh"
        os.symlink(os.path.realpath(path), self.shell)
        self._shim = process.SHIM.replace("/bin/sh", self.shell)

    def launch(
        self, command: str, cwd: str | None = None, umask: int = 0o022, limits: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> Launch:  # fmt: skip
        number = len(self.attempts) + 1
        stem = f"{self.directory}/{number}"
        variables = process.environment({"PATH": PATH}, environ or {}) | self.marks(number)
        files = AttemptFiles(stem + ".out", stem + ".status", stem + ".sh")
        return Launch(files, command, cwd or self.directory, umask, limits, variables)

    def marks(self, number: int) -> dict[bytes, bytes]:
        return process.markers("w", os.path.basename(self.directory), "step", number)

    def start(self, launch: Launch) -> Attempt:
        with mock.patch.multiple(process, _SHELL=self.shell, SHIM=self._shim):
            pid = process.start(launch)
        assert isinstance(pid, int), pid
        number = len(self.attempts) + 1
        attempt = Attempt(number, launch.files, self.marks(number), pid, 0, True)
        self.attempts.append(attempt)
        return attempt

    def adopt(self, attempt: Attempt) -> Attempt:
        """The same attempt as another daemon finds it."""
        return Attempt(attempt.number, attempt.files, self.marks(attempt.number), None, 0, False)

    def run(self, command: str, **fields: object) -> tuple[Outcome, str]:
        """From its start to its end: the outcome, and what it has printed."""
        attempt = self.start(self.launch(command, **fields))  # type: ignore[arg-type]
        return self.finish(attempt), self.output(attempt)

    def finish(self, attempt: Attempt, *, is_ending: bool = False) -> Outcome:
        """Wait for the shim, then for its group, as the supervisor does."""
        self.reap(attempt)
        return self.sweep(attempt, is_ending=is_ending)

    def reap(self, attempt: Attempt) -> Exit:
        assert attempt.pid is not None
        pid = attempt.pid
        exit = wait_until(lambda: process.reap(pid), "the shim's end")
        assert exit is not None
        attempt.reaped(exit, 0)
        return exit

    def sweep(self, attempt: Attempt, *, in_grace: bool = False, is_ending: bool = False) -> Outcome:
        wait_until(lambda: attempt.look(0, in_grace=in_grace) is None, "the end of the group")
        attempt.settle(is_ending=is_ending, rebooted=False)
        assert attempt.outcome is not None
        return attempt.outcome

    def went_on(self, attempt: Attempt) -> bool:
        """Continue what has stopped; has it ended?"""
        attempt.signal(signal.SIGCONT)
        return not process.probe(attempt.files).held

    def output(self, attempt: Attempt) -> str:
        with open(attempt.files.out, encoding="utf-8", errors="replace") as file:
            return file.read()

    def status(self, attempt: Attempt) -> list[str]:
        with open(attempt.files.status, encoding="utf-8") as file:
            return file.read().splitlines()

    def wait_for(self, attempt: Attempt, words: str) -> None:
        """Until it has printed this."""
        wait_until(lambda: words in self.output(attempt), words, lambda: self.output(attempt))

    def _end_all(self) -> None:
        for attempt in self.attempts:
            if attempt.exit is None and attempt.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(attempt.pid, signal.SIGKILL)
                self.reap(attempt)


class TestCommands(unittest.TestCase):
    """What the command is given, and what becomes of its status."""

    # command -> the exit status that is recorded, and what it printed
    ENDS: tuple[tuple[str, int, str | None], ...] = (
        ("exit 0", 0, ""),
        ("exit 7", 7, ""),
        ("exit 255", 255, ""),
        ("false", 1, ""),
        ("echo out; echo err >&2; exit 3", 3, "out\nerr\n"),
        ("wfd-no-such-command 2>/dev/null", 127, ""),
        ("/ 2>/dev/null", 126, ""),
        ("kill -9 $$", 137, ""),
        ("kill -TERM $$", 143, ""),
        ("kill -INT $$", 130, ""),
        ("kill -PIPE $$", 141, ""),
        ("kill -USR1 $$", 138, ""),
        ("", 0, ""),
        ("   # nothing but a comment", 0, ""),
        # What begins like an option is a command all the same: as an option, -n would end with 0 and do nothing.
        ("-n 2>/dev/null", 127, ""),
        ("-c 'echo option' 2>/dev/null", 127, ""),
        ("+x 2>/dev/null", 127, ""),
        ("--help 2>/dev/null", 127, ""),
        # Nothing in a command is looked at by anybody but its own shell.
        ("""printf '%s|' 'a b' "c'd" e\\ f '$HOME' "\\$1" '`x`' '*' '\\n' '%s' '!'""", 0,
         "a b|c'd|e f|$HOME|$1|`x`|*|\\n|%s|!|"),
        ("printf %s \"$0$1$#\" | sed 's/.*sh//'", 0, "0"),
        ("echo one\necho two\n\nexit 4\necho three", 4, "one\ntwo\n"),
        ("cat <<end\n$((1 + 1)) é\nend\n", 0, "2 é\n"),
        ("exit 5 # \\", 5, ""),
        ("(exit 6)", 6, ""),
        ("exec false", 1, ""),
        ("true | exit 9", 9, ""),
        ("set -e; false; echo no", 1, ""),
        ("trap 'echo bye' EXIT; exit 2", 2, "bye\n"),
        # Standard input is empty, not a terminal and not the daemon's.
        ("cat; read line || exit 8", 8, ""),
        # Plain words, which the shim's subshell starts without a shell of the command's own.
        ("true", 0, ""),
        ("false", 1, ""),
        ("\t echo  two   words ", 0, "two words\n"),
        ("printf %s,%s. a=b c:d", 0, "a=b,c:d."),
        ("test a = b", 1, ""),
        ("expr 1 + 2", 0, "3\n"),
        ("/bin/sh -c exit", 0, ""),
        ("env -i A=b env", 0, "A=b\n"),
        ("no-such-command", 127, None),
        ("/", 126, None),
        # What only a shell can do is done by one of the command's own.
        ("exit 7", 7, ""),
        ("A=b", 0, ""),
        ("cd /", 0, ""),
        ("exec expr 1 + 2", 0, "3\n"),
        ("command echo yes", 0, "yes\n"),
        ("eval echo yes", 0, "yes\n"),
    )  # fmt: skip

    def test_every_end_is_recorded(self) -> None:
        for shell in SHELLS:
            bench = Bench(self, shell)
            for command, exit_code, output in self.ENDS:
                with self.subTest(shell=shell, command=command):
                    outcome, printed = bench.run(command, limits="ulimit -c 0")
                    # None: words of the shell's own, which say what is missing.
                    self.assertTrue(printed if output is None else printed == output, printed)
                    self.assertEqual((outcome.kind, outcome.exit_code), ("exited", exit_code))
                    attempt = bench.attempts[-1]
                    self.assertEqual(bench.status(attempt), ["status 1", f"pid {attempt.pid}", f"exit {exit_code}"])

    def test_a_command_that_kills_its_shell_does_not_kill_the_shim(self) -> None:
        for shell in SHELLS:
            bench = Bench(self, shell)
            script = f"{bench.directory}/suicide"
            with open(script, "w") as file:
                file.write("kill -9 $$\n")
            os.chmod(script, 0o700)
            for command in ("kill -9 $$", "./suicide", ". ./suicide", "eval . ./suicide", "command . ./suicide"):
                with self.subTest(shell=shell, command=command):
                    outcome, _ = bench.run(command)
                    self.assertEqual((outcome.kind, outcome.exit_code), ("exited", 137))

    def test_a_function_in_the_environment_is_not_passed_over(self) -> None:
        if "bash" not in SHELLS:
            self.skipTest("no bash here")
        environ = {"BASH_FUNC_greet%%": "() { echo hello; }"}
        self.assertEqual(Bench(self, "bash").run("greet", environ=environ)[1], "hello\n")

    def test_a_function_in_the_environment_does_not_run_in_the_shim(self) -> None:
        if "bash" not in SHELLS:
            self.skipTest("no bash here")
        suicide = "() { builtin kill -9 $$; }"
        for name in ("cd", "umask", "ulimit", "echo", "kill", "true", "false"):
            bench = Bench(self, "bash")
            environ = {f"BASH_FUNC_{name}%%": suicide}
            with self.subTest(name=name):
                outcome, printed = bench.run("expr 1 + 2", environ=environ, limits="command ulimit -c 0")
                self.assertEqual((outcome.kind, outcome.exit_code, printed), ("exited", 0, "3\n"))
                self.assertEqual(bench.run(f"{name} a", environ=environ)[0].exit_code, 137)

    def test_where_bash_exports_functions(self) -> None:
        for name in ("true", "expr"):
            for variable in (name, f"BASH_FUNC_{name}%%", f"BASH_FUNC_{name}()", f"__BASH_FUNC<{name}>()"):
                with self.subTest(variable=variable):
                    bench = Bench(self, "sh")
                    launch = bench.launch(name, environ={variable: "() { :; }"})
                    self.assertEqual(process.words(launch), [b"exec", b"/bin/sh", b"-c", name.encode()])

    def test_what_the_shim_does_itself_has_the_limits_of_the_submitter(self) -> None:
        for shell in SHELLS:
            for command in ("echo hello", "echo 'hello'"):
                with self.subTest(shell=shell, command=command):
                    # A file that may have no byte: whoever writes to one is ended, or told.
                    outcome, printed = Bench(self, shell).run(command, limits=process.limits({"fsize": 0}))
                    self.assertEqual((outcome.kind, printed), ("exited", ""))
                    self.assertNotEqual(outcome.exit_code, 0)

    def test_a_command_of_200_kb(self) -> None:
        for shell in SHELLS:
            for first in (": ", "-n "):
                with self.subTest(shell=shell, first=first):
                    text = "é'\"$`\\ " * 30_000
                    command = f"{first}2>/dev/null\ncat <<'end' | cksum\n{text}\nend\nexit 3"
                    self.assertGreater(len(command), 200_000)
                    sum_ = subprocess.run(["cksum"], input=text.encode() + b"\n", capture_output=True, check=True).stdout
                    outcome, printed = Bench(self, shell).run(command)
                    self.assertEqual((outcome.exit_code, printed), (3, sum_.decode()))

    def test_the_environment_is_the_step_s_alone(self) -> None:
        # Names that a shim could stumble over are among them.
        given = {"t": "1", "s": "2", "IFS": "x", "CDPATH": "/", "ENV": "/dev/null", "A": "a b\n'\"$(x)\\"}
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                outcome, printed = bench.run(f"exec {shlex.quote(sys.executable)} -ISc 'import os; print(dict(os.environ))'",
                                             environ=given)  # fmt: skip
                self.assertEqual(outcome.exit_code, 0)
                seen: dict[str, str] = eval(printed)
                wanted = {"PATH": PATH, **given, **{k.decode(): v.decode() for k, v in bench.marks(1).items()}}
                # A few shells neither take IFS over nor pass it on. A shell must reset it, so nobody can miss it.
                self.assertEqual(set(seen) - set(wanted) - SHELL_VARIABLES, set())
                del wanted["IFS"]
                self.assertEqual({name: seen.get(name) for name in wanted}, wanted)
                for name in ("PWD", "OLDPWD"):
                    self.assertEqual(seen.get(name, bench.directory), bench.directory)

    def test_options_of_the_environment_do_not_lose_the_status(self) -> None:
        # bash takes these over; others do not know them.
        for shell in SHELLS:
            for options in ("errexit", "errexit:nounset", "noglob:xtrace"):
                with self.subTest(shell=shell, options=options):
                    bench = Bench(self, shell)
                    self.assertEqual(bench.run("exit 3", environ={"SHELLOPTS": options})[0].exit_code, 3)
                    self.assertEqual(bench.status(bench.attempts[0])[-1], "exit 3")

    def test_the_umask_is_the_submitter_s(self) -> None:
        for shell in SHELLS:
            for umask in (0o022, 0o077, 0o000, 0o027, 0o777):
                with self.subTest(shell=shell, umask=oct(umask)):
                    self.assertEqual(int(Bench(self, shell).run("umask", umask=umask)[1], 8), umask)

    def test_the_directory_may_be_called_anything(self) -> None:
        for shell in SHELLS:
            bench = Bench(self, shell)
            for name in ("plain", "with space", "-n", "'quoted\"", "$HOME", "`x`", "new\nline", "é", "*", "\\"):
                with self.subTest(shell=shell, name=name):
                    cwd = f"{bench.directory}/{name}"
                    os.mkdir(cwd)
                    self.assertEqual(bench.run("pwd -P; echo .", cwd=cwd)[1], f"{os.path.realpath(cwd)}\n.\n")

    def test_a_directory_that_cannot_be_entered(self) -> None:
        for shell in SHELLS:
            bench = Bench(self, shell)
            file = f"{bench.directory}/file"
            with open(file, "w"):
                pass
            for cwd in (f"{bench.directory}/missing", file, f"{file}/below"):
                with self.subTest(shell=shell, cwd=cwd):
                    outcome, printed = bench.run("echo ran", cwd=cwd)
                    self.assertEqual((outcome.kind, outcome.why, printed), ("not_started", "cwd", ""))

    def test_the_limits_are_the_submitter_s(self) -> None:
        wanted = {"nofile": 333, "core": 512 * 7, "fsize": 512 << 20, "cpu": 3_600, "stack": 4096 << 10,
                  "data": 2 << 30, "as": 8 << 30}  # fmt: skip
        show = f"for name in {list(wanted)}: print(resource.getrlimit(getattr(resource, 'RLIMIT_' + name.upper()))[0])"
        for shell in SHELLS:
            with self.subTest(shell=shell):
                program = "import resource\n" + show
                command = f"exec {shlex.quote(sys.executable)} -ISc {shlex.quote(program)}"
                printed = Bench(self, shell).run(command, limits=process.limits(wanted))[1]
                self.assertEqual([int(line) for line in printed.splitlines()], list(wanted.values()))

    def test_a_limit_that_cannot_be_set_stops_nothing(self) -> None:
        # More than the hard limit: no process may raise its soft limit beyond it.
        with soft_limit(resource.RLIMIT_NOFILE, 256):
            text = process.limits({"nofile": 1 << 30, "stack": 1 << 20})
        for shell in SHELLS:
            with self.subTest(shell=shell):
                self.assertEqual(Bench(self, shell).run("echo ran; ulimit -s", limits=text)[1], "ran\n1024\n")

    def test_no_descriptor_but_the_three_is_passed_on(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                # The directory itself is open too while it is listed.
                self.assertEqual(Bench(self, shell).run("exec ls /dev/fd/")[1].split(), ["0", "1", "2", "3"])

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "only Linux shows a process's signals")
    def test_no_signal_is_ignored_or_blocked(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                printed = Bench(self, shell).run("exec grep -E '^Sig(Ign|Blk)' /proc/self/status")[1]
                # The numbers that the C library keeps for itself (32, 33) cannot be changed by anybody.
                ours = sum(1 << (number - 1) for number in signal.valid_signals())
                self.assertEqual([int(line.split()[1], 16) & ours for line in printed.splitlines()], [0, 0])

    def test_usage_is_measured(self) -> None:
        outcome, _ = Bench(self).run("i=0; while [ $i -lt 60000 ]; do i=$((i + 1)); done")
        assert outcome.usage is not None
        self.assertGreater(outcome.usage.user_ms + outcome.usage.system_ms, 0)
        self.assertGreater(outcome.usage.peak_rss_kib, 100)


@contextlib.contextmanager
def soft_limit(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# A command that says when it is ready and then stays.
STAYS = "echo ready; while :; do sleep 0.02; done"


def _end(group: int, members: list[int]) -> None:
    """Kill a group whose shim was reaped. Its members are our children now, if this process has become a subreaper."""
    process.signal_group(group, signal.SIGKILL)
    for pid in members:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


class TestSignals(unittest.TestCase):
    """What reaches the command, what the shim survives, and what is left of the group."""

    def test_each_attempt_is_a_session_of_its_own(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch(STAYS))
                bench.wait_for(attempt, "ready")
                assert attempt.pid is not None
                self.assertEqual((os.getsid(attempt.pid), os.getpgid(attempt.pid)), (attempt.pid, attempt.pid))
                self.assertEqual(process.probe(attempt.files).pid, attempt.pid)

    def test_a_signal_to_the_group_ends_the_command_and_not_its_record(self) -> None:
        for shell in SHELLS:
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
                with self.subTest(shell=shell, signal=number.name):
                    bench = Bench(self, shell)
                    # The command itself says that it is there: bash, which would have said so before, ignores SIGQUIT.
                    with open(f"{bench.directory}/says", "w", encoding="utf-8") as file:
                        file.write("ready\n")
                    attempt = bench.start(bench.launch("exec tail -f says", limits="ulimit -c 0"))
                    bench.wait_for(attempt, "ready")
                    self.assertTrue(attempt.signal(number))
                    self.assertEqual(bench.finish(attempt).exit_code, 128 + number)

    def test_the_command_may_clean_up(self) -> None:
        command = f"trap 'echo cleaning; sleep 0.05; echo clean; exit 3' TERM; {STAYS}"
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch(command))
                bench.wait_for(attempt, "ready")
                self.assertTrue(attempt.signal(signal.SIGTERM))
                outcome = bench.finish(attempt)
                self.assertEqual(outcome.exit_code, 3)
                # Some shells say in between what became of their `sleep`.
                self.assertTrue(bench.output(attempt).endswith("cleaning\nclean\n"))

    def test_a_command_that_ignores_term_is_killed_with_its_shim(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch(f"trap '' TERM; {STAYS}"))
                bench.wait_for(attempt, "ready")
                attempt.signal(signal.SIGTERM)
                attempt.signal(signal.SIGKILL)
                outcome = bench.finish(attempt, is_ending=True)
                self.assertEqual((outcome.kind, outcome.exit_code), ("exited", None))
                assert attempt.pid is not None
                self.assertEqual(machine.group_members(attempt.pid), [])

    def test_the_group_keeps_its_grace_after_the_shim(self) -> None:
        child = f"(trap 'while [ ! -e go ]; do sleep 0.02; done; echo done; exit' TERM; {STAYS})"
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch(f"{child} & wait"))
                bench.wait_for(attempt, "ready")
                attempt.signal(signal.SIGTERM)
                bench.reap(attempt)
                self.assertEqual(bench.status(attempt)[-1], "exit 143")
                self.assertIsNotNone(attempt.look(0, in_grace=True), "somebody of the group is still cleaning up")
                with open(f"{bench.directory}/go", "w"):
                    pass
                outcome = bench.sweep(attempt, in_grace=True, is_ending=True)
                self.assertEqual(outcome.exit_code, 143)
                self.assertTrue(bench.output(attempt).endswith("done\n"))

    def test_who_outstays_the_grace_is_killed(self) -> None:
        bench = Bench(self)
        attempt = bench.start(bench.launch(f"(trap '' TERM; {STAYS}) & wait"))
        bench.wait_for(attempt, "ready")
        attempt.signal(signal.SIGTERM)
        bench.reap(attempt)
        self.assertIsNotNone(attempt.look(0, in_grace=True))
        bench.sweep(attempt)
        assert attempt.pid is not None
        self.assertEqual(machine.group_members(attempt.pid), [])

    def test_a_stopped_command_hears_term(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch("trap 'exit 5' TERM; echo ready; kill -STOP $$; sleep 1000"))
                bench.wait_for(attempt, "ready")
                attempt.signal(signal.SIGTERM)
                self.assertEqual(bench.finish(attempt).exit_code, 5)

    def test_a_stopped_command_goes_on(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                attempt = bench.start(bench.launch("echo ready; kill -STOP $$; exit 4"))
                bench.wait_for(attempt, "ready")
                # It may not have stopped yet when the first one comes.
                wait_until(functools.partial(bench.went_on, attempt), "the command's end")
                self.assertEqual(bench.finish(attempt).exit_code, 4)

    def test_children_in_the_background_end_with_the_step(self) -> None:
        command = "trap '' TERM HUP INT; (sleep 1000; echo no) & sleep 1000 & echo ready"
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                outcome, printed = bench.run(command)
                self.assertEqual((outcome.kind, outcome.exit_code, printed), ("exited", 0, "ready\n"))
                group = bench.attempts[0].pid
                assert group is not None
                self.assertEqual(machine.group_members(group), [])

    def test_a_shim_that_is_killed_alone_leaves_a_command_that_is_found(self) -> None:
        for shell in SHELLS:
            for adopted in (False, True):
                with self.subTest(shell=shell, adopted=adopted):
                    bench = Bench(self, shell)
                    attempt = bench.start(bench.launch(STAYS))
                    bench.wait_for(attempt, "ready")
                    assert attempt.pid is not None
                    os.kill(attempt.pid, signal.SIGKILL)
                    bench.reap(attempt)
                    self.assertFalse(process.probe(attempt.files).held)
                    self.assertNotEqual(machine.group_members(attempt.pid), [], "the command does not notice")
                    outcome = bench.sweep(bench.adopt(attempt) if adopted else attempt)
                    self.assertEqual((outcome.kind, outcome.why), ("lost", "killed"))
                    self.assertEqual(machine.group_members(attempt.pid), [])

    def test_a_shim_that_never_got_far_never_began(self) -> None:
        # Its shell dies before it has read a word of ours.
        with mock.patch.multiple(process, SHIM="kill -9 $$"):
            bench = Bench(self)
        self.assertEqual(bench.run("echo no")[0].why, "never_began")

    def test_what_is_not_alive_is_not_signalled(self) -> None:
        bench = Bench(self)
        attempt = bench.start(bench.launch(STAYS))
        bench.wait_for(attempt, "ready")
        adopted = bench.adopt(attempt)
        self.assertTrue(adopted.signal(signal.SIGCONT), "an adopted one is signalled by what its file says")
        attempt.signal(signal.SIGKILL)
        bench.reap(attempt)
        for one in (attempt, adopted):
            self.assertFalse(one.signal(signal.SIGTERM))

    def test_a_term_waits_until_the_command_has_begun(self) -> None:
        bench = Bench(self)
        attempt = bench.start(bench.launch(STAYS))
        bench.wait_for(attempt, "ready")
        early = Status(True, True, None)
        with mock.patch.object(process, "probe", return_value=early), mock.patch.object(process, "signal_group") as sent:
            self.assertFalse(attempt.signal(signal.SIGTERM), "it would reach the shim alone")
            sent.assert_not_called()
            self.assertTrue(attempt.signal(signal.SIGKILL))
            sent.assert_called_once_with(attempt.pid, signal.SIGKILL)

    def test_a_stranger_with_the_group_s_number_is_left_alone(self) -> None:
        bench = Bench(self)
        stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        attempt = Attempt(1, bench.launch("true").files, bench.marks(1), None, 0, False)
        with open(attempt.files.status, "w") as file:
            file.write(f"status 1\npid {stranger.pid}\n")
        self.assertFalse(attempt.signal(signal.SIGKILL))
        with open(attempt.files.status, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for number in (signal.SIGTERM, signal.SIGKILL):
                self.assertFalse(attempt.signal(number), "the lock proves that the shim lives, not that this is its number")
        self.assertEqual(bench.sweep(attempt).why, "killed")
        self.assertIsNone(stranger.poll())

    def test_a_group_without_marks_is_known_by_who_has_just_seen_its_shim(self) -> None:
        for later_ms, is_ended in ((process.GROUP_STAYS_MS, True), (process.GROUP_STAYS_MS + 1, False)):
            with self.subTest(later_ms=later_ms):
                bench = Bench(self)
                attempt = bench.start(bench.launch("env -i PATH=/bin:/usr/bin sh -c 'echo ready; exec sleep 1000'; true"))
                bench.wait_for(attempt, "ready")
                adopted = bench.adopt(attempt)
                self.assertEqual(adopted.look(0, in_grace=False), process.ADOPTED_POLL_MS)
                assert attempt.pid is not None
                members = machine.group_members(attempt.pid)
                self.addCleanup(_end, attempt.pid, members)
                for pid in members:
                    if machine.carries(pid, bench.marks(1)):
                        os.kill(pid, signal.SIGKILL)
                bench.reap(attempt)
                self.assertTrue(machine.group_members(attempt.pid))
                wait_until(lambda: adopted.look(later_ms, in_grace=False) is None, "the end of the group")  # noqa: B023
                self.assertEqual(machine.group_members(attempt.pid) == [], is_ended)

    def test_a_group_that_nobody_has_looked_at_for_long_is_known_by_its_marks_alone(self) -> None:
        for later_ms, is_known in ((process.GROUP_STAYS_MS, True), (process.GROUP_STAYS_MS + 1, False)):
            with self.subTest(later_ms=later_ms), mock.patch.object(process, "signal_group") as signal_group:
                bench = Bench(self)
                attempt = Attempt(1, bench.launch("true").files, bench.marks(1), os.getpgid(0), 0, True)
                attempt.reaped(process.Exit(os.getpgid(0), 0, process.Usage(0, 0, 0)), 0)
                self.assertEqual(attempt.look(later_ms, in_grace=False) is not None, is_known)
                self.assertEqual(mock.call(os.getpgid(0), signal.SIGKILL) in signal_group.call_args_list, is_known)

    def test_a_group_is_not_looked_at_again_when_it_is_gone(self) -> None:
        """What keeps an attempt from being settled may last for long, and then its number may be another's."""
        bench = Bench(self)
        attempt = bench.start(bench.launch("true"))
        bench.reap(attempt)
        wait_until(lambda: attempt.look(0, in_grace=False) is None, "the end of the group")
        attempt.pid = os.getpgid(0)
        with mock.patch.object(process, "signal_group") as signal_group:
            self.assertIsNone(attempt.look(1, in_grace=False))
        signal_group.assert_not_called()

    def test_a_shim_of_ours_is_signalled_by_its_own_number(self) -> None:
        bench = Bench(self)
        stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self.addCleanup(stranger.wait)
        self.addCleanup(stranger.kill)
        attempt = bench.start(bench.launch(STAYS))
        bench.wait_for(attempt, "ready")
        with open(attempt.files.status, "r+") as file:
            file.truncate(0)
            file.write(f"status 1\npid {stranger.pid}\n")
        self.assertTrue(attempt.signal(signal.SIGTERM))
        bench.reap(attempt)
        self.assertIsNone(stranger.poll())


class TestLock(unittest.TestCase):
    def test_held_while_alive_and_free_after(self) -> None:
        for shell in SHELLS:
            with self.subTest(shell=shell):
                bench = Bench(self, shell)
                # The one in the background must not hold it on.
                command = f"trap 'exit 7' TERM; ({STAYS}) & while :; do sleep 0.01; done"
                attempt = bench.start(bench.launch(command))
                bench.wait_for(attempt, "ready")
                for _ in range(2):
                    self.assertEqual(process.probe(attempt.files), Status(True, True, attempt.pid))
                adopted = bench.adopt(attempt)
                self.assertEqual(adopted.look(0, in_grace=False), process.ADOPTED_POLL_MS)
                assert attempt.pid is not None
                # Only the command hears this, so nobody sweeps its group.
                for pid in machine.group_members(attempt.pid):
                    # A `sleep` may have ended meanwhile.
                    with contextlib.suppress(ProcessLookupError):
                        if pid != attempt.pid:
                            os.kill(pid, signal.SIGTERM)
                self.assertEqual(bench.reap(attempt).code, -signal.SIGKILL, "it ends its group, itself too")
                self.assertEqual(process.probe(attempt.files), Status(False, True, attempt.pid, 7))
                self.assertEqual(bench.sweep(adopted).exit_code, 7)

    def test_two_who_look_do_not_take_each_other_for_the_shim(self) -> None:
        bench = Bench(self)
        bench.run("true")
        files = bench.attempts[0].files
        with open(files.status) as other:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self.assertFalse(process.probe(files).held)

    def test_an_attempt_that_was_begun_is_not_begun_again(self) -> None:
        bench = Bench(self)
        launch = bench.launch("echo once")
        attempt = bench.start(launch)
        bench.finish(attempt)
        before = bench.status(attempt)
        with self.assertRaises(FileExistsError):
            process.start(launch)
        self.assertEqual((bench.status(attempt), bench.output(attempt)), (before, "once\n"))

    def test_what_lies_in_the_place_of_its_output_is_not_opened(self) -> None:
        """Opening a FIFO would hold up the daemon until somebody reads from it."""
        for put_there in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/null", path)):
            bench = Bench(self)
            launch = bench.launch("true")
            put_there(launch.files.out)
            outcome = process.start(launch)
            assert isinstance(outcome, Outcome)
            self.assertEqual((outcome.kind, outcome.why, outcome.detail), ("not_started", "exec", "File exists"))
            self.assertFalse(process.probe(launch.files).exists, "it never began")

    def test_a_file_that_is_taken_away_hides_nothing(self) -> None:
        bench = Bench(self)
        self.assertEqual(bench.run("rm -f *.status")[0].why, "killed", "it began; how it ended was in the file")
        attempt = bench.start(bench.launch(STAYS))
        bench.wait_for(attempt, "ready")
        adopted = bench.adopt(attempt)
        adopted.look(0, in_grace=False)
        os.unlink(attempt.files.status)
        self.assertIsNotNone(adopted.look(0, in_grace=False), "it is still alive, and is swept")
        self.assertEqual(bench.sweep(adopted).kind, "lost")
        bench.reap(attempt)
        assert attempt.pid is not None
        self.assertEqual(machine.group_members(attempt.pid), [])


class TestStarts(unittest.TestCase):
    """What cannot be started leaves nothing behind."""

    def refused(self, launch: Launch) -> Outcome:
        begun = process.start(launch)
        assert isinstance(begun, Outcome), begun
        self.assertFalse(os.path.exists(launch.files.status))
        self.assertFalse(os.path.exists(launch.files.out))
        return begun

    def test_too_much_environment(self) -> None:
        launch = Bench(self).launch("true", environ={f"A{number}": "x" * 100_000 for number in range(100)})
        self.assertEqual(self.refused(launch).why, "exec")
        self.assertIn("too long", self.refused(launch).detail)

    def test_no_shell(self) -> None:
        with mock.patch.object(process, "_SHELL", "/no/such/shell"):
            self.assertEqual(self.refused(Bench(self).launch("true")).why, "exec")

    def test_no_directory_for_its_files(self) -> None:
        launch = Bench(self).launch("true")
        files = AttemptFiles("/no/such/1.out", "/no/such/1.status", "/no/such/1.sh")
        self.assertEqual(self.refused(launch._replace(files=files)).why, "exec")

    def test_a_shortage_passes(self) -> None:
        bench = Bench(self)
        launch = bench.launch("true")
        lowest_free = os.dup(0)
        os.close(lowest_free)
        # With none, the status file cannot be opened; with one more, it can, and the spawn goes on.
        with soft_limit(resource.RLIMIT_NOFILE, lowest_free), self.assertRaises(SpawnStalled):
            process.start(launch)
        self.assertEqual(os.listdir(bench.directory), ["sh"])
        self.assertEqual(bench.finish(bench.start(launch)).exit_code, 0)

    def test_which_errors_pass(self) -> None:
        for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENOSPC):
            with self.subTest(errno=errno.errorcode[number]), self.assertRaises(SpawnStalled):
                process._cannot_start(OSError(number, os.strerror(number)))
        for number in (errno.E2BIG, errno.ENOENT, errno.EACCES):
            with self.subTest(errno=errno.errorcode[number]):
                self.assertEqual(process._cannot_start(OSError(number, os.strerror(number))).kind, "not_started")


# What lies in a status file -> what it says: pid, exit status, error.
CONTENTS: tuple[tuple[bytes, int | None, int | None, str | None], ...] = (
    (b"", None, None, None),
    (b"stat", None, None, None),
    (b"status 1\n", None, None, None),
    (b"status 1\npid 4242\n", 4242, None, None),
    (b"status 1\npid 4242\nexit 0\n", 4242, 0, None),
    (b"status 1\npid 4242\nexit 255\n", 4242, 255, None),
    (b"status 1\nerror cwd\n", None, None, "cwd"),
    # Only whole lines count.
    (b"status 1\npid 42", None, None, None),
    (b"status 1\npid 4242\nexit 1", 4242, None, None),
    (b"status 1\nerror cwd", None, None, None),
    # What its shell writes when it was refused a process for the command.
    (b"status 1\nexit 2\n", None, 2, None),
    # What no shim of ours writes: nobody can tell what has become of the attempt, P9.
    *((content, None, None, "strange") for content in (
        b"status 1\npid 1\n", b"status 1\npid 0\n", b"status 1\npid -1\n", b"status 1\npid 2147483648\n",
        b"status 1\npid 9999999999\n", b"status 1\npid 99999999999\n", b"status 1\npid 04242\n",
        b"status 1\npid 4242\npid 4243\n", b"status 1\npid 4242\nexit 0\nexit 0\n", b"status 1\nexit 0\npid 4242\n",
        b"status 1\npid 4242\nexit 256\n", b"status 1\npid 4242\nexit 999\n", b"status 1\npid 4242\nexit -1\n",
        b"status 1\npid 4242\nexit cwd\n", b"status 1\npid cwd\nerror 5\n", b"status 1\nPID 4242\nEXIT 0\n",
        b"status 1\npid 4242 \nexit  0\n", b"status 1\npid 4242\r\nexit 0\r\n", b"status 1\npid \xef\xbc\x94\xef\xbc\x92\n",
        b"status 1\npid 4242\nerror cwd\n", b"status 1\nexit 0\ngarbage\n", b"status 1\nstatus 1\npid 4242\n",
        b"nonsense\n", b"nonsense", b"\n", bytes(5_000), b"status 2\npid 4242\n", b"status 2\npid 4242\nexit 0\n",
    )),
)

# pid known, exit status, error, is_ending, rebooted, status of the shim if it was ours -> kind, exit status, why
OUTCOMES: tuple[tuple[bool, int | None, str | None, bool, bool, int | None, str, int | None, str], ...] = (
    # The command's status was written: nothing else matters.
    (True, 0, None, False, False, 0, "exited", 0, ""),
    (True, 7, None, False, False, None, "exited", 7, ""),
    (True, 7, None, True, False, None, "exited", 7, ""),
    (True, 7, None, False, True, None, "exited", 7, ""),
    (True, 7, None, True, True, -9, "exited", 7, ""),
    # The directory could not be entered.
    (False, None, "cwd", False, False, 125, "not_started", None, "cwd"),
    (False, None, "cwd", True, False, None, "not_started", None, "cwd"),
    (False, None, "cwd", False, True, None, "not_started", None, "cwd"),
    # It began and nothing was written: a parent was told, or a timeout or cancel explains it, or it is lost.
    (True, None, None, False, False, 3, "exited", 3, ""),
    (True, None, None, True, False, 3, "exited", 3, ""),
    (True, None, None, True, False, -9, "exited", None, ""),
    (True, None, None, True, False, None, "exited", None, ""),
    (True, None, None, True, True, None, "exited", None, ""),
    (True, None, None, False, False, -9, "lost", None, "killed"),
    (True, None, None, False, False, None, "lost", None, "killed"),
    (True, None, None, False, True, None, "lost", None, "rebooted"),
    # It certainly never began, unless another boot makes that uncertain.
    (False, None, None, False, False, -9, "not_started", None, "never_began"),
    (False, None, None, False, False, None, "not_started", None, "never_began"),
    (False, None, None, True, False, None, "not_started", None, "stopped"),
    (False, None, None, True, False, -15, "not_started", None, "stopped"),
    (False, None, None, False, True, None, "lost", None, "rebooted"),
    (False, None, None, True, True, None, "exited", None, ""),
    # Nobody can tell what that file is: P9.
    (False, None, "strange", False, False, None, "lost", None, "killed"),
    (False, None, "strange", False, True, None, "lost", None, "rebooted"),
    (False, None, "strange", True, False, None, "exited", None, ""),
)


class TestStatusFile(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = directory.name + "/1.status"
        self.files = AttemptFiles(directory.name + "/1.out", self.path, directory.name + "/1.sh")

    def test_contents_with_the_lock_held_and_free(self) -> None:
        for content, pid, exit_code, error in CONTENTS:
            for held in (False, True):
                with self.subTest(content=content[:60], held=held):
                    with open(self.path, "wb") as file:
                        file.write(content)
                    with open(self.path, "ab") as holder:
                        if held:
                            fcntl.flock(holder, fcntl.LOCK_EX)
                        self.assertEqual(process.probe(self.files), Status(held, True, pid, exit_code, error))

    def test_what_is_no_file(self) -> None:
        strange = Status(False, True, error="strange")
        self.assertEqual(process.probe(self.files), Status(False, False))
        os.mkdir(self.path)
        self.assertEqual(process.probe(self.files), strange, "a directory")
        os.rmdir(self.path)
        os.mkfifo(self.path)
        with deadline():
            self.assertEqual(process.probe(self.files), strange, "a FIFO, which must not be waited for")
        os.unlink(self.path)
        with open(self.files.out, "w") as file:
            file.write("status 1\npid 4242\nexit 0\n")
        os.symlink(self.files.out, self.path)
        self.assertEqual(process.probe(self.files), strange, "a symbolic link")
        os.unlink(self.path)
        os.symlink("/no/such/file", self.path)
        self.assertEqual(process.probe(self.files), strange, "a dangling one")

    def test_a_shortage_is_no_answer(self) -> None:
        with open(self.path, "wb"):
            pass
        lowest_free = os.dup(0)
        os.close(lowest_free)
        with soft_limit(resource.RLIMIT_NOFILE, lowest_free), self.assertRaises(OSError):
            process.probe(self.files)

    def test_outcomes(self) -> None:
        for has_pid, code, error, is_ending, rebooted, shim, kind, exit_code, why in OUTCOMES:
            exit = None if shim is None else Exit(4242, shim, USAGE)
            status = Status(False, True, 4242 if has_pid else None, code, error)
            with self.subTest(status=status, is_ending=is_ending, rebooted=rebooted, shim=shim):
                outcome = process.outcome_of(status, is_ending=is_ending, rebooted=rebooted, exit=exit)
                self.assertEqual((outcome.kind, outcome.exit_code, outcome.why), (kind, exit_code, why))
                if kind == "exited":
                    self.assertEqual(outcome.usage, None if shim is None else USAGE)


class TestOutput(unittest.TestCase):
    LIMIT = 1_000

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = directory.name + "/1.out"

    def write(self, size: int) -> None:
        with open(self.path, "wb") as file:
            file.write(b"x" * size)

    def test_up_to_the_limit_nothing_is_done(self) -> None:
        for size in (0, 1, self.LIMIT):
            with self.subTest(size=size):
                self.write(size)
                self.assertFalse(process.trim_output(self.path, self.LIMIT))
                self.assertEqual(os.stat(self.path).st_size, size)

    def test_beyond_it_is_cut_and_marked(self) -> None:
        self.write(5 * self.LIMIT)
        with open(self.path, "ab", buffering=0) as step:
            self.assertTrue(process.trim_output(self.path, self.LIMIT))
            self.assertEqual(os.stat(self.path).st_size, self.LIMIT)
            self.assertFalse(process.trim_output(self.path, self.LIMIT), "once is enough")
            step.write(b"on it goes")
        with open(self.path, "rb") as file:
            text = file.read()
        self.assertEqual(text[-10:], b"on it goes")
        self.assertIn(b"[wfd: the output grew beyond 1000 bytes", text)
        self.assertNotIn(b"\0", text, "no hole")

    def test_what_is_no_file_is_left_alone(self) -> None:
        self.assertFalse(process.trim_output(self.path, self.LIMIT))
        target = self.path + ".target"
        with open(target, "wb") as file:
            file.write(b"x" * 5_000)
        os.symlink(target, self.path)
        self.assertFalse(process.trim_output(self.path, self.LIMIT))
        self.assertEqual(os.stat(target).st_size, 5_000)

    def test_a_step_goes_on_writing_behind_the_mark(self) -> None:
        bench = Bench(self)
        attempt = bench.start(bench.launch("i=0; while [ ! -e stop ]; do echo 0123456789; done; echo end"))
        out = attempt.files.out
        wait_until(lambda: process.trim_output(out, self.LIMIT), "more output than the limit")
        wait_until(lambda: process.trim_output(out, self.LIMIT), "more again")
        with open(f"{bench.directory}/stop", "w"):
            pass
        self.assertEqual(bench.finish(attempt).exit_code, 0)
        self.assertTrue(bench.output(attempt).endswith("end\n"))
        self.assertNotIn("\0", bench.output(attempt))


class TestPureParts(unittest.TestCase):
    def test_environment_layers(self) -> None:
        service = {"LISTEN_FDS": "1", "LISTEN_PID": "2", "NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3"}
        self.assertEqual(
            process.environment({"A": "1", "B": "1", **service}, {"B": "2", "C": "\udcff"}),
            {b"A": b"1", b"B": b"2", b"C": b"\xff"},
        )

    def test_markers(self) -> None:
        self.assertEqual(
            process.markers("w", "r1", "é", 12),
            {b"WFD_WORKFLOW_ID": b"w", b"WFD_RUN_ID": b"r1", b"WFD_STEP_ID": "é".encode(), b"WFD_ATTEMPT": b"12"},
        )

    def test_limits_that_are_as_wanted_cost_nothing(self) -> None:
        names = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE, "stack": resource.RLIMIT_STACK}
        ours = {name: resource.getrlimit(number)[0] for name, number in names.items()}
        ours = {name: -1 if value == resource.RLIM_INFINITY else value for name, value in ours.items()}
        self.assertEqual(process.limits(ours), "")
        self.assertEqual(process.limits({"unheard-of": 1}), "")
        with soft_limit(resource.RLIMIT_CORE, 0):
            self.assertEqual(process.limits({"core": -1}), "command ulimit -S -c unlimited 2>/dev/null")
            self.assertEqual(process.limits({"core": 1024}), "command ulimit -S -c 2 2>/dev/null")


class TestChildren(unittest.TestCase):
    def setUp(self) -> None:
        # Whatever child has ended is shown and reaped here, not only our own.
        left = process.next_dead_child()
        who = "left by an earlier test; or by a process that became ours, since one had this process keep orphans"
        self.assertIsNone(left, f"a dead child is there already, {who}")

    def spawn(self, command: str) -> int:
        return os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ)

    @unittest.skipUnless(hasattr(os, "waitid"), "this system cannot show a dead child without reaping it")
    def test_a_dead_child_is_seen_before_it_is_reaped(self) -> None:
        self.assertIsNone(process.next_dead_child(), "there is none")
        pid = self.spawn("exit 3")
        for _ in range(2):
            self.assertEqual(wait_until(process.next_dead_child, "the child's end"), pid)
        os.kill(pid, 0)
        exit = process.reap(pid)
        assert exit is not None
        self.assertEqual((exit.pid, exit.code), (pid, 3))
        self.assertIsNone(process.next_dead_child())
        self.assertIsNone(process.reap())

    def test_reaping_where_nothing_can_be_seen_before(self) -> None:
        if hasattr(os, "waitid"):
            self.addCleanup(setattr, os, "waitid", os.waitid)
            del os.waitid
        pids = {self.spawn("exit 3"), self.spawn("kill -9 $$")}
        self.assertIsNone(process.next_dead_child())
        exits = [wait_until(process.reap, "a child's end") for _ in pids]
        self.assertEqual({exit.pid for exit in exits if exit}, pids)
        self.assertEqual({exit.code for exit in exits if exit}, {3, -9})
        self.assertIsNone(process.reap())

    def test_a_living_child_is_not_reaped(self) -> None:
        pid = self.spawn("exec sleep 1000")
        try:
            self.assertIsNone(process.next_dead_child())
            self.assertIsNone(process.reap())
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class TestMachine(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name

    def test_members_of_a_group(self) -> None:
        # The name of one of them looks like the end of a field list; one is a zombie.
        odd = f"{self.directory}/) Z 1 1 ("
        os.symlink(shutil.which("sleep") or "/bin/sleep", odd)
        program = "(exit 0) & sleep 1000 & './) Z 1 1 (' 1000 & echo ready; exec sleep 1000"
        leader = subprocess.Popen(
            ["/bin/sh", "-c", program], cwd=self.directory, stdout=subprocess.PIPE, start_new_session=True,
            env={"PATH": PATH, "MINE": "yes"},
        )  # fmt: skip
        assert leader.stdout is not None
        self.addCleanup(leader.stdout.close)
        self.addCleanup(leader.wait)
        self.addCleanup(os.killpg, leader.pid, signal.SIGKILL)
        leader.stdout.readline()
        wait_until(lambda: len(machine._members_from_ps(leader.pid)) == 3, "three live members")
        self.assertIn(leader.pid, machine._members_from_ps(leader.pid))
        self.assertEqual(machine.group_members(leader.pid), machine._members_from_ps(leader.pid))
        wait_until(lambda: len(machine.group_members(leader.pid, {b"MINE": b"yes"})) == 3, "three marked members")
        for mark in ({b"MINE": b"ye"}, {b"MINE": b"yes", b"YOURS": b"yes"}, {b"INE": b"yes"}):
            self.assertEqual(machine.group_members(leader.pid, mark), [])
        os.killpg(leader.pid, signal.SIGKILL)
        wait_until(lambda: not machine.group_members(leader.pid), "none: the leader is a zombie")
        self.assertTrue(process.group_exists(leader.pid), "its number is still taken")
        self.assertEqual(machine._members_from_ps(leader.pid), [])

    def test_locks_are_inherited_here(self) -> None:
        self.assertTrue(machine.inherits_locks(self.directory))
        self.assertEqual(os.listdir(self.directory), [])
        with self.assertRaises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_locks_of_a_process_are_found_out(self) -> None:
        # What NFS makes of flock.
        with mock.patch.object(fcntl, "flock", fcntl.lockf):
            self.assertFalse(machine.inherits_locks(self.directory))
        self.assertEqual(os.listdir(self.directory), [])

    def test_this_boot_has_a_name(self) -> None:
        self.assertTrue(machine.boot_id())
        self.assertEqual(machine.boot_id(), machine.boot_id())


if __name__ == "__main__":
    unittest.main()
