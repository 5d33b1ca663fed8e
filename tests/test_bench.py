"""The benchmark, made little: every case gives its figures, what is wrong is noticed, the table says what was measured."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

from tests import bench, bench_profile, bench_results, bench_runs, bench_watchers, logs
from tests.bench_results import BARS, Options, Result, Sizes, Skipped, WrongResult, rate, ratio, rounds
from tests.bench_runs import RACES, Race
from tests.bench_subjects import Daemon, Graph, chain, fan_out, layers, loose, traced, workflow_file
from tests.daemon import ROOT, deadline, wait_until
from wfd.events import StepSucceeded
from wfd.paths import Home

LITTLE = Sizes(
    fan_out=3, layers=2, layer_steps=2, chain=2, sleeps=2, steps=3, steps_10k=5, steps_100k=4, runs=2, run_steps=4,
    traced_runs=2, finished=3, unfinished=2, watchers=2, most_watchers=3, live_steps=2, settle_sec=0, idle_sec=0.05,
)  # fmt: skip
SLOW = "without them, steps of `sleep 0.1`"
# Cases that are others with other numbers.
MORE_OF_THE_SAME = frozenset({"fan-out-2", "layers", "layers-2", "sleep", "100k"})


class LittleTest(unittest.TestCase):
    """A test with a place for the files of the benchmark."""

    def setUp(self) -> None:
        self.options = Options(self.enterContext(bench.place()), rounds=1, sizes=LITTLE, warms_up=False)


class Cases(LittleTest):
    def test_each_gives_its_figures(self) -> None:
        names = [name for name in bench.CASES if name not in MORE_OF_THE_SAME]
        found = list(bench.measure(names, self.options))
        self.assertEqual({each.case for each in found}, set(names))
        skipped = {each.case for each in found if isinstance(each, Skipped)}
        results = [each for each in found if isinstance(each, Result)]
        wanted = {(case, figure) for case, figure in BARS if case in names and case not in skipped}
        self.assertEqual(wanted - {(each.case, each.figure) for each in results}, set())
        for each in results:
            with self.subTest(case=each.case, figure=each.figure):
                self.assertGreaterEqual(min(each.values), 0)
                self.assertEqual(len(each.values), 1)

    def test_each_bar_has_a_case(self) -> None:
        self.assertEqual({case for case, _ in BARS}, bench.CASES.keys())
        for case, race in RACES.items():
            self.assertIn((case, f"ninja -j{race.parallel}"), BARS)

    def test_where_too_few_files_may_be_open(self) -> None:
        options = replace(self.options, sizes=replace(LITTLE, most_watchers=1_000))
        for limit, figures, why in (
            (1_100, ["without them", SLOW, "without them, 1,000"], []),
            (1_099, ["without them", SLOW], ["1,000 watchers need 1,100 open files, and no more than 1,099 may be"]),
            (101, [], ["2 watchers need 102 open files, and no more than 101 may be"]),
        ):
            with (
                self.subTest(limit),
                mock.patch("resource.getrlimit", return_value=(limit, limit)),
                mock.patch.object(bench_watchers, "_watched_run", return_value=1.0),
            ):
                found = list(bench_watchers.watchers(options))
            self.assertEqual([each.figure for each in found if isinstance(each, Result)], figures)
            self.assertEqual([each.why for each in found if isinstance(each, Skipped)], why)

    def test_where_nothing_else_is_installed(self) -> None:
        with mock.patch.dict(os.environ, {"PATH": self.options.base}):
            found = [*bench_runs.disk(self.options), *bench_runs.race("chain", self.options)]
        self.assertEqual({(type(each), each.case) for each in found}, {(Skipped, "disk"), (Skipped, "chain")})
        self.assertIn("chain        skipped: ninja is not installed", [each.row() for each in found])


class Profile(LittleTest):
    def test_it_says_where_the_time_went(self) -> None:
        found = {each.figure: each for each in bench_profile.profile("chain", self.options)}
        parts = {f"profile: {part}" for part in ("spawn", "attempt files", "fsync", "encode", "fold", "wait", "the rest")}
        self.assertEqual(parts - found.keys(), set())
        self.assertTrue(found["profile: spawn"].note.endswith(", 1.0 calls"), found["profile: spawn"])

    def test_a_part_has_no_time_of_those_that_it_calls(self) -> None:
        with mock.patch("time.perf_counter_ns", iter(range(0, 1000, 10)).__next__):
            clock = bench_profile.Clock()
            clock.turn_to(bench_profile.REST)
            inner = clock.wrapped("inner", lambda: None)
            clock.wrapped("outer", lambda: [inner(), inner()])()
        self.assertEqual(clock.spent_ns, {bench_profile.IDLE: 10, bench_profile.REST: 10, "outer": 30, "inner": 20})
        self.assertEqual(clock.calls, {"outer": 1, "inner": 2})


class Wrong(LittleTest):
    """A time that means nothing is not shown."""

    def test_a_step_that_fails(self) -> None:
        with (
            mock.patch.dict(RACES, {"wrong": Race(lambda sizes: loose(2, "false"), 2)}),
            self.assertRaisesRegex(WrongResult, "run -q .* ended with 1"),
        ):
            list(bench_runs.race("wrong", self.options))

    def test_a_log_that_tells_of_something_else(self) -> None:
        workflow = logs.workflow(logs.step("s0", retries=1, backoff={"initial_sec": 0}), logs.step("s1", "s0"))
        lost = logs.Log(workflow, "lost").start("s0").lose("s0")
        for name in ("s0", "s1"):
            lost.start(name).exit(name, 0)
        forged = [
            line._replace(event=line.event._replace(cause=1)) if isinstance(line.event, StepSucceeded) else line
            for line in logs.complete(workflow, run_id="forged").lines
        ]
        cases = {
            "good": (logs.complete(workflow, run_id="good").data, ""),
            "forged": (logs.encode(forged, "forged"), "does not replay"),
            "begun": (logs.Log(workflow, "begun").data, "is RUNNING"),
            "again": (logs.complete(workflow, {"s0": [1]}, "again").data, "not each of its 2 steps ran exactly once"),
            "lost": (lost.data, "not each of its 2 steps ran exactly once"),
        }
        for run_id, (data, why) in cases.items():
            self.check_log(data, run_id, chain(2), why)

    def test_a_log_in_which_a_sleep_is_too_short(self) -> None:
        for run_id, lasted_ms, why in (("slept", 100, ""), ("hasty", 10, "s0 was to sleep for 0.1 s, and took 10 ms")):
            log = logs.Log(logs.workflow(logs.step("s0", command="sleep 0.1")), run_id).start("s0")
            log.now_ms += lasted_ms
            self.check_log(log.exit("s0", 0).data, run_id, loose(1, "sleep 0.1"), why)

    def check_log(self, data: bytes, run_id: str, graph: Graph, why: str) -> None:
        """why: what is said to be wrong with it, "" when nothing is."""
        daemon = Daemon()
        os.mkdir(daemon.home.directory, 0o700)
        logs.save(logs.home(daemon.home.directory), data, run_id)
        with self.subTest(run_id), self.assertRaisesRegex(WrongResult, why) if why else contextlib.nullcontext():
            daemon.check_run(run_id, graph)

    def test_commands_that_are_not_executed_once(self) -> None:
        graph = traced(chain(2))
        with Daemon() as daemon:
            _, run_id = daemon.run(workflow_file(graph))
        daemon.check_traces(run_id, graph)
        files = [daemon.home.run(run_id).attempt(ordinal, step.id, 1).out for ordinal, step in enumerate(graph, 1)]
        for text in ("", "s1", "s0\n", "s1\ns1\n"):
            with open(files[1], "w", encoding="utf-8") as file:
                file.write(text)
            with self.subTest(text), self.assertRaisesRegex(WrongResult, "s1 was not executed exactly once, it said"):
                daemon.check_traces(run_id, graph)
        os.unlink(files[1])
        with self.assertRaisesRegex(WrongResult, "s1 was not executed, it has no output file"):
            daemon.check_traces(run_id, graph)
        again = daemon.home.run(run_id).attempt(1, "s0", 2).status
        with open(again, "w"), self.assertRaisesRegex(WrongResult, r"1-s0\.2\.status is not a file of the first attempt"):
            daemon.check_traces(run_id, graph)

    def test_no_time_is_taken_before_a_trace_was_seen(self) -> None:
        cases: dict[str, Callable[[Options], bench_runs.Found]] = {
            "chain": partial(bench_runs.race, "chain"),
            "10k": partial(bench_runs.many_steps, "10k"),
            "runs": bench_runs.many_runs,
        }
        for name, case in cases.items():
            with (
                self.subTest(name),
                mock.patch.object(Daemon, "check_traces", side_effect=WrongResult("no trace")),
                mock.patch.object(bench_runs, "rounds", side_effect=AssertionError("it takes a time")),
                self.assertRaisesRegex(WrongResult, "no trace"),
            ):
                list(case(self.options))

    def test_a_watcher_that_sees_something_else(self) -> None:
        stream = bytearray(b"one\ntwo\n")
        self.assertEqual(bench_watchers._take(stream, 4, b"two\nthree\n"), 14)
        self.assertEqual(stream, b"one\ntwo\nthree\n")
        with self.assertRaises(WrongResult):
            bench_watchers._take(stream, 4, b"too\n")

    def test_a_daemon_that_hangs_up_on_a_watcher(self) -> None:
        path = f"{self.options.base}/socket"

        def hang_up() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1000)

        with deadline(), socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            hangs_up = threading.Thread(target=hang_up)
            hangs_up.start()
            with self.assertRaisesRegex(WrongResult, "the daemon has hung up"):
                bench_watchers._watch(path, "r1")
            hangs_up.join()

    def test_a_command_that_does_not_end(self) -> None:
        start = time.monotonic()
        with (
            mock.patch.object(bench_results, "TIMEOUT_SEC", 0.05),
            self.assertRaisesRegex(WrongResult, r"^sh -c .* has not ended after 0\.05 s$"),
        ):
            # The second one holds the pipes for as long as it lives, which is not waited for.
            bench_results.timed(["sh", "-c", "sleep 5 & wait"])
        self.assertLess(time.monotonic() - start, 4)
        self.assertEqual(signal.getitimer(signal.ITIMER_REAL), (0, 0))

    def test_the_command_ends_with_1(self) -> None:
        def wrong(options: Options) -> bench_runs.Found:
            raise WrongResult("nothing was right")
            yield

        with (
            mock.patch.dict(bench.CASES, {"wrong": ("", wrong)}),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
        ):
            self.assertEqual(bench.main(["wrong"]), 1)
            for arguments in (["unknown"], ["--pairs", "0"], ["--pairs", "-1"], ["--json", "/no/such/file"], ["--json", ""]):
                with self.assertRaises(SystemExit) as caught:
                    bench.main(arguments)
                self.assertEqual(caught.exception.code, 2)
        self.assertIn("bench: nothing was right\n", stderr.getvalue())
        self.assertIn("/no/such/file: No such file", stderr.getvalue())

    @unittest.skipUnless(os.path.exists("/dev/full"), "/dev/full is not here")
    def test_figures_that_cannot_be_written(self) -> None:
        with (
            mock.patch.dict(bench.CASES, {"right": ("", lambda options: iter([Result("idle", "memory", "MB", [17.0])]))}),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as stderr,
        ):
            self.assertEqual(bench.main(["right", "--json", "/dev/full"]), 1)
        self.assertEqual(stderr.getvalue(), "bench: /dev/full: No space left on device\n")
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "tests.bench"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stderr), (1, b"bench: standard output: No space left on device\n"))

    def test_what_was_measured_before_an_interrupt_is_kept(self) -> None:
        def interrupted(options: Options) -> bench_runs.Found:
            yield Result("idle", "memory", "MB", [17.0])
            raise KeyboardInterrupt

        with (
            mock.patch.dict(bench.CASES, {"interrupted": ("", interrupted)}),
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.NamedTemporaryFile() as file,
        ):
            self.assertEqual(bench.main(["interrupted", "--json", file.name]), 130)
            self.assertEqual([each["median"] for each in json.load(file)["results"]], [17.0])


class Interrupted(unittest.TestCase):
    def test_no_file_no_daemon_and_no_traceback_is_left(self) -> None:
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number.name), tempfile.TemporaryDirectory() as base:
                command, environ = [sys.executable, "-m", "tests.bench", "sleep"], {**os.environ, "TMPDIR": base}
                pipe = subprocess.PIPE
                process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe)
                pid = wait_until(partial(daemon_of, base), "the daemon's start")
                # Then it waits for a command. A signal in the midst of making a socket would have Python itself complain.
                wait_until(partial(logs_in, base), "its first run")
                # Again and again, so in the midst of what the first one has it do, too.
                while process.poll() is None:
                    process.send_signal(number)
                    time.sleep(0.005)
                with self.assertRaises(ProcessLookupError):
                    os.kill(pid, 0)
                self.assertEqual((process.returncode, process.communicate()[1]), (status, b""))
                self.assertEqual(os.listdir(base), [])


def logs_in(base: str) -> list[str]:
    """The logs of all runs below this directory."""
    return glob.glob(f"{base}/**/runs/*/events.ndjson", recursive=True)


def daemon_of(base: str) -> int:
    """The pid of the daemon that has its home below this directory, 0 before it says so."""
    for path in glob.glob(f"{base}/*/*/stderr"):
        with open(path, encoding="utf-8") as file:
            if found := re.search("pid ([0-9]+), owns", file.read()):
                return int(found[1])
    return 0


ROWS = """\
chain        ninja -j1                                 3.00 x   2.00 to 9.00       bar <= 2 MISSED    300 ms / 100 ms
log          recovery                                 25.00 %                      bar >= 45 MISSED   400 ms / 100 ms
idle         wake-ups                                  0.00                        bar <= 0 met
chain        skipped: make is not installed
chain        profile: spawn                            0.40 ms                                        52.0%, 1.0 calls
"""


class Table(unittest.TestCase):
    FOUND = (
        ratio("chain", "ninja -j1", [0.2, 0.3, 0.9], [0.1, 0.1, 0.1]),
        rate("log", "recovery", [0.4], [0.1]),
        Result("idle", "wake-ups", "", [0]),
        Skipped("chain", "make is not installed"),
        Result("chain", "profile: spawn", "ms", [0.4], note="52.0%, 1.0 calls"),
    )

    def test_rows(self) -> None:
        self.assertEqual([each.row() for each in self.FOUND], ROWS.splitlines())

    def test_what_is_printed_and_written(self) -> None:
        with bench.place() as base, contextlib.redirect_stdout(io.StringIO()) as stdout:
            path = f"{base}/figures.json"
            with open(path, "w", encoding="utf-8") as file:
                bench.show({"cores": 2}, iter(self.FOUND), file)
            with open(path, encoding="utf-8") as file:
                written = json.load(file)
        self.assertEqual(stdout.getvalue().splitlines(), ["cores:       2", *(each.row() for each in self.FOUND)])
        self.assertEqual(written["machine"], {"cores": 2})
        self.assertEqual(written["skipped"], [{"case": "chain", "why": "make is not installed"}])
        chain = written["results"][0]
        self.assertEqual((chain["case"], chain["figure"], chain["unit"]), ("chain", "ninja -j1", "x"))
        self.assertEqual([round(value) for value in chain["values"]], [2, 3, 9])
        self.assertEqual((chain["bar"], chain["is_met"]), ({"limit": 2.0, "goal": 1.4, "is_floor": False}, False))
        self.assertEqual([each["is_met"] for each in written["results"]], [False, False, True, None])

    def test_the_machine(self) -> None:
        self.assertEqual(
            list(bench.machine("/")), ["cpu", "cores", "kernel", "python", "file_system", "load"]
        )


class Rounds(unittest.TestCase):
    def test_calls_take_turns_and_the_first_round_is_not_counted(self) -> None:
        called: list[str] = []

        def call(name: str) -> float:
            called.append(name)
            return float(len(called))

        times = rounds({"a": lambda: call("a"), "b": lambda: call("b")}, 2, warms_up=True)
        self.assertEqual((called, times), (["a", "b"] * 3, {"a": [3, 5], "b": [4, 6]}))

    def test_graphs(self) -> None:
        for graph, count, edges in ((fan_out(3), 5, 6), (layers(3, 4), 12, 32), (chain(3), 3, 2), (loose(3, "true"), 3, 0)):
            self.assertEqual((len(graph), sum(len(step.needs) for step in graph)), (count, edges))
            known = {step.id for step in graph}
            self.assertEqual(len(known), count)
            self.assertTrue(all(known.issuperset(step.needs) for step in graph))

    def test_turns_of_a_trace(self) -> None:
        turns = bench_runs.syncs_by_turn([
            "fsync(5</h/live>) = 0\n",
            "epoll_wait(4<anon_inode:[eventpoll]>, [{...}], 7, 24) = 1\n",
            "fsync(12</h/runs/r1/events.ndjson>)   = 0\n",
            "--- SIGCHLD {si_signo=SIGCHLD, ...} ---\n",
            "fdatasync(12</h/runs/r1/events.ndjson>) = 0\n",
            "fsync(13</h/runs/r2/events.ndjson>) = -1 EIO (Input/output error)\n",
            "epoll_pwait(4<anon_inode:[eventpoll]>, [], 7, 0, NULL, 8) = 0\n",
        ])  # fmt: skip
        self.assertEqual(turns, [{"/h/live": 1}, {"/h/runs/r1/events.ndjson": 2}, {}])

    def test_the_log_of_a_run_that_is_created_in_a_turn(self) -> None:
        new, log, other = (f"/h/runs/{run_id}/events.ndjson" for run_id in (".new-r1", "r1", "r2"))
        turns = [Counter({other: 5}), Counter({new: 2, log: 1, other: 5}), Counter({log: 4}), Counter[str]()]
        self.assertEqual(bench_runs.syncs_of_log(turns, Home("/h"), "r1"), (3, [0, 4, 0]))
        # One that was not created in sight.
        self.assertEqual(bench_runs.syncs_of_log(turns, Home("/h"), "r2"), (0, [5, 5, 0, 0]))


if __name__ == "__main__":
    unittest.main()
