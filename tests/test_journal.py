"""The log on disk: whole or not at all, torn tails cut, damage named, failed commits undone. On real files throughout.

Two things are exchanged: `journal.sync`, our own seam to the medium, to fail or to crash at the n-th call; and the file
that a reader reads, for one that grows while it is read.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from tests import logs
from tests.hostile_logs import bind
from tests.logs import AT, Log, step, workflow
from wfd import journal
from wfd.events import (
    AttemptExited,
    Line,
    LogRecovered,
    RunCancelRequested,
    RunSubmitted,
    RunTimedOut,
    StepStarted,
)
from wfd.journal import CommitFailed, Damaged, Journal, Newer, Reading
from wfd.paths import RunFiles
from wfd.state import Run

ROOT = Path(__file__).parent.parent
DIAMOND = logs.complete(logs.diamond(), {"b": [1]})
SUBMITTED = DIAMOND.lines[0].event
# For sweeps over every byte: all kinds of batches in few of them.
SMALL = logs.complete(workflow(step("a"), step("b", "a", retries=1)), {"b": [1]})


class Crash(BaseException):
    """The daemon dies here."""


def sync_that(*then: Callable[[], None] | None) -> AbstractContextManager[Any]:
    """journal.sync that does these things at its first calls (None: it works), and works from then on."""
    script = iter(then)
    real = journal.sync

    def sync(fd: int) -> None:
        act = next(script, None)
        if act is not None:
            act()
        real(fd)

    return mock.patch.object(journal, "sync", sync)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def crash() -> None:
    raise Crash


def no_sync() -> AbstractContextManager[Any]:
    """For sweeps over thousands of files, none of which meets a power cut."""
    return mock.patch.object(journal, "sync", lambda fd: None)


class OnDisk(unittest.TestCase):
    def setUp(self) -> None:
        self.home = logs.home(self.enterContext(tempfile.TemporaryDirectory(prefix="wfd-journal-")))

    def create(self, run_id: str = "r1") -> Journal:
        first = RunSubmitted(run_id, 1, 1, "boot-1", "/base", logs.diamond())
        log = journal.create(self.home, run_id, first, b'{"env":{}}', AT, 1_000)
        self.addCleanup(log.close)
        return log

    def recover(self, run_id: str = "r1") -> tuple[Journal, Run, int, str | None]:
        recovered = journal.recover(self.home, run_id)
        self.addCleanup(recovered[0].close)
        return recovered

    def assert_damaged(self, words: str, run_id: str = "r1") -> None:
        """Reading and recovering both refuse, and nothing on disk is touched."""
        before = logs.contents(self.home.directory)
        for act in (lambda: journal.fold(self.home.run(run_id), run_id), lambda: journal.recover(self.home, run_id)):
            with self.assertRaises(Damaged) as caught:
                act()
            self.assertIn(words, caught.exception.why)
            self.assertEqual(caught.exception.run_id, run_id)
            self.assertTrue(str(caught.exception).startswith(f"run {run_id} is damaged and was not touched: "))
        self.assertEqual(logs.contents(self.home.directory), before)


def append_all(log: Journal, batches: list[list[Line]]) -> None:
    for batch in batches:
        for line in batch:
            log.append(line.event, line.at, line.mono_ms)
        log.commit()


def batches_of(log: Log) -> list[list[Line]]:
    """The lines behind line 1 as they were committed."""
    return [list(batch) for _, batch in itertools.groupby(log.lines[1:], key=lambda line: line.durable)]


class Writing(OnDisk):
    def test_a_created_run_is_whole(self) -> None:
        log = self.create()
        files = self.home.run("r1")
        run, reading = journal.fold(files, "r1")
        self.assertEqual((run.run_id, run.seq, log.seq, log.durable, log.size), ("r1", 1, 1, 1, reading.end))
        self.assertEqual(journal.submitted(files, "r1"), SUBMITTED)
        with open(files.environment, "rb") as file:
            self.assertEqual(file.read(), b'{"env":{}}')
        for path in (files.directory, files.attempts):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o700)
        for path in (files.events, files.environment):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(os.listdir(self.home.live), ["r1"])
        self.assertEqual(os.listdir(self.home.runs), ["r1"])

    def test_what_is_committed_is_what_the_events_encode(self) -> None:
        log = self.create()
        append_all(log, batches_of(DIAMOND))
        with open(log.files.events, "rb") as file:
            self.assertEqual(file.read(), DIAMOND.data)
        self.assertEqual((log.seq, log.durable, log.size), (len(DIAMOND.lines), len(DIAMOND.lines), len(DIAMOND.data)))
        self.assertEqual(journal.fold(log.files, "r1")[0].describe(), DIAMOND.run.describe())

    def test_a_batch_is_nowhere_until_it_is_committed(self) -> None:
        log = self.create()
        size = log.size
        self.assertFalse(log.has_pending)
        first, second = log.append(RunTimedOut(), AT, 5), log.append(LogRecovered(0), AT, 6)
        self.assertEqual((first.seq, first.durable, second.seq, second.durable), (2, 1, 3, 1))
        self.assertTrue(log.has_pending)
        self.assertEqual(os.stat(log.files.events).st_size, size)
        batch = log.commit()
        self.assertEqual(batch, logs.encode([first, second]))
        self.assertFalse(log.has_pending)
        self.assertEqual(log.append(LogRecovered(0), AT, 7).durable, 3)

    def test_a_discarded_batch_leaves_no_gap(self) -> None:
        log = self.create()
        log.append(RunCancelRequested("request-1"), AT, 5)
        log.discard()
        self.assertEqual(log.append(RunTimedOut(), AT, 6).seq, 2)
        log.commit()
        self.assertTrue(log.refold().timed_out)

    def test_one_write_and_one_sync_a_batch(self) -> None:
        log = self.create()
        for _ in range(50):
            log.append(LogRecovered(0), AT, 5)
        calls: list[int] = []
        with mock.patch.object(journal, "sync", calls.append):
            log.commit()
        self.assertEqual(len(calls), 1)

    def test_sync_asks_the_medium(self) -> None:
        """What has no medium refuses. (That the bytes reach it is for a power cut to show, not for a unit test.)"""
        reading, writing = os.pipe()
        self.addCleanup(os.close, reading)
        self.addCleanup(os.close, writing)
        with self.assertRaises(OSError):
            journal.sync(writing)


class Creation(OnDisk):
    def test_an_existing_run_is_left_alone(self) -> None:
        self.create()
        before = logs.contents(self.home.directory)
        with self.assertRaises(FileExistsError):
            self.create()
        self.assertEqual(logs.contents(self.home.directory), before)

    def test_a_failure_at_any_point_leaves_nothing(self) -> None:
        for turn in itertools.count():
            with self.subTest(turn=turn), sync_that(*[None] * turn, fail):
                try:
                    self.create()
                    break
                except OSError as error:
                    self.assertEqual(error.errno, errno.EIO)
                    self.assertEqual(logs.contents(self.home.directory), {"live": None, "runs": None})
        self.assertEqual(turn, 6, "the environment, line 1, the marker, the run's directory, the names of both")

    def test_a_crash_at_any_point_leaves_all_or_nothing_and_the_next_try_works(self) -> None:
        wholes = set()
        for turn in itertools.count():
            run_id = f"r{turn}"
            with self.subTest(turn=turn):
                try:
                    with sync_that(*[None] * turn, crash):
                        self.create(run_id)
                    break
                except Crash:
                    pass
                # Too many markers, never too few.
                is_whole = os.path.lexists(self.home.run(run_id).directory)
                wholes.add(is_whole)
                if is_whole:
                    self.assertIn(run_id, os.listdir(self.home.live))
                    self.assertEqual(self.recover(run_id)[1].seq, 1)
                else:
                    with self.assertRaises(FileNotFoundError):
                        journal.recover(self.home, run_id)
                    self.create(run_id)
        self.assertEqual(wholes, {True, False})
        self.assertEqual([name for name in os.listdir(self.home.runs) if name.startswith(".")], [])

    def test_what_is_left_of_a_run_that_never_was_can_be_removed(self) -> None:
        with sync_that(*[None] * 3, crash), self.assertRaises(Crash):
            self.create()
        self.assertGreater(len(logs.contents(self.home.directory)), 2)
        for _ in range(2):
            journal.abandon(self.home, "r1")
            self.assertEqual(logs.contents(self.home.directory), {"live": None, "runs": None})


class TornTails(OnDisk):
    """P7: a torn tail is cut off and kept, and never glued on to."""

    def test_the_log_cut_at_every_byte_after_line_1(self) -> None:
        whole, ends = SMALL.data, logs.line_ends(SMALL.data)
        for length in range(ends[0], len(whole) + 1):
            good = sum(end <= length for end in ends)
            reading = Reading(io.BytesIO(whole[:length]), "r1")
            self.assertEqual(list(reading), SMALL.lines[:good])
            self.assertEqual((reading.seq, reading.end, reading.torn_bytes), (good, ends[good - 1], length - ends[good - 1]))

    def test_recovery_of_a_log_cut_around_every_end_of_a_line(self) -> None:
        whole, ends = SMALL.data, logs.line_ends(SMALL.data)
        files = logs.save(self.home, whole)
        states = prefixes(SMALL)
        with no_sync():
            for length in logs.cuts(whole):
                good = sum(end <= length for end in ends)
                write(files, whole[:length])
                log, run, torn_bytes, kept_as = journal.recover(self.home, "r1")
                log.close()
                self.assertEqual((run.describe(), log.seq, log.durable), (states[good - 1], good, good))
                self.assertEqual((torn_bytes, log.size), (length - ends[good - 1], ends[good - 1]))
                self.assertEqual(read(files), whole[: ends[good - 1]])
                if kept_as is None:
                    self.assertEqual(torn_bytes, 0)
                else:
                    kept = Path(files.directory, kept_as)
                    self.assertEqual(kept.read_bytes(), whole[ends[good - 1] : length])
                    kept.unlink()
        self.assertEqual(sorted(os.listdir(files.directory)), ["attempts", "events.ndjson"])

    def test_line_1_cut_is_damage(self) -> None:
        files = logs.save(self.home, b"")
        first_end = DIAMOND.data.index(b"\n") + 1
        for length in range(0, first_end, 37):
            write(files, DIAMOND.data[:length])
            self.assert_damaged("line 1 is not whole" if length else "the log is empty")

    def test_it_is_never_glued_on_to(self) -> None:
        files = logs.save(self.home, DIAMOND.data[:-5])
        log, run, torn_bytes, kept_as = self.recover()
        log.append(LogRecovered(torn_bytes, kept_as), AT, 9)
        log.commit()
        lines = list(Reading(io.BytesIO(read(files)), "r1"))
        self.assertEqual(lines[:-1], DIAMOND.lines[:-1])
        self.assertEqual(lines[-1].event, LogRecovered(torn_bytes, kept_as))
        self.assertEqual(lines[-1].durable, run.seq)

    def test_any_part_of_an_unsynced_batch_may_be_left(self) -> None:
        """A power cut keeps any set of a batch's lines, in the good case; the others read as zeros."""
        log = Log(logs.diamond()).start("a")
        known = list(log.lines)
        log.exit("a", 0)
        batch = [logs.encode([line]) for line in log.lines[len(known) :]]
        self.assertEqual(len(batch), 4)
        files = logs.save(self.home, b"")
        for kept in itertools.product((True, False), repeat=len(batch)):
            with self.subTest(kept=kept), no_sync():
                pieces = [raw if is_kept else bytes(len(raw)) for raw, is_kept in zip(batch, kept, strict=True)]
                write(files, logs.encode(known) + b"".join(pieces))
                taken, run, torn_bytes, _ = journal.recover(self.home, "r1")
                taken.close()
                good = next((place for place, is_kept in enumerate(kept) if not is_kept), len(batch))
                self.assertEqual(run.seq, len(known) + good)
                self.assertEqual(torn_bytes, sum(map(len, batch[good:])))

    def test_garbage_of_any_kind_behind_the_last_line(self) -> None:
        other = logs.encode([Line(99, AT, 1, 98, RunTimedOut())], "r2")
        late = logs.encode([Line(99, AT, 1, 3, RunTimedOut())])
        repeated = logs.encode(DIAMOND.lines[3:5])
        files = logs.save(self.home, b"")
        plain = (b"x", b"\n", b"\n\n\n", b"{}\n", bytes(5_000), b"\xff" * 9 + b"\n", b"[" * 9_999)
        for tail in (*plain, other, late, repeated):
            with self.subTest(tail=tail[:30]), no_sync():
                write(files, DIAMOND.data + tail)
                log, run, torn_bytes, _ = journal.recover(self.home, "r1")
                log.close()
                self.assertEqual((run.describe(), torn_bytes), (DIAMOND.run.describe(), len(tail)))

    def test_recovering_twice_is_recovering_once(self) -> None:
        files = logs.save(self.home, DIAMOND.data[:-5])
        first = self.recover()
        inode = os.stat(files.events).st_ino
        before = logs.contents(self.home.directory)
        second = self.recover()
        self.assertEqual(second[1].describe(), first[1].describe())
        self.assertEqual((second[2], second[3]), (0, None))
        self.assertEqual(logs.contents(self.home.directory), before)
        self.assertNotEqual(os.stat(files.events).st_ino, inode, "each session writes to an inode of its own")

    def test_a_failure_or_crash_at_any_point_of_a_recovery_changes_nothing(self) -> None:
        for act, error in ((fail, OSError), (crash, Crash)):
            for turn in itertools.count():
                run_id = f"{act.__name__}{turn}"
                cut = logs.complete(logs.diamond(), run_id=run_id).data[:-5]
                good = cut[: cut.rindex(b"\n") + 1]
                files = logs.save(self.home, cut, run_id)
                with self.subTest(act=act.__name__, turn=turn):
                    try:
                        with sync_that(*[None] * turn, act):
                            self.recover(run_id)
                        break
                    except error:
                        self.assertIn(read(files), (cut, good))
                        self.recover(run_id)
                        self.assertEqual(read(files), good)
                        names = os.listdir(files.directory)
                        torn = [Path(files.directory, name) for name in names if name.startswith("torn-")]
                        self.assertEqual([path.read_bytes() for path in torn], [cut[len(good) :]])
                        self.assertNotIn("events.ndjson.new", names)
            self.assertEqual(turn, 6, "marker, names of markers, of runs; the copy of the tail, the log, their directory")


class Damage(OnDisk):
    """P7: damage anywhere else is refused, and nothing is touched."""

    def test_a_later_line_proves_that_a_bad_one_was_on_disk(self) -> None:
        """Every line but the first, altered or missing, with all that was written behind it."""
        files = logs.save(self.home, b"")
        for place in range(1, len(DIAMOND.lines)):
            seq = place + 1
            proves = any(line.durable >= seq for line in DIAMOND.lines)
            before, bad, after = map(logs.encode, (DIAMOND.lines[:place], [DIAMOND.lines[place]], DIAMOND.lines[seq:]))
            kinds = {"altered": bad.replace(b'"seq"', b'"sEq"'), "missing": b"", "zeros": bytes(len(bad))}
            for kind, middle in kinds.items():
                with self.subTest(seq=seq, kind=kind):
                    write(files, before + middle + after)
                    if proves:
                        self.assert_damaged(f"line {seq} is missing or altered, though a later line proves")
                    else:
                        self.assertEqual(journal.fold(files, "r1")[1].seq, place)

    def test_every_byte_flipped(self) -> None:
        """Each is refused, or cuts the log off before the line that holds it. None is read as something else."""
        data = SMALL.data
        refused = torn = 0
        for place, byte in enumerate(data):
            for value in {byte ^ 1, byte ^ 0x20, byte ^ 0x80, 0x0A} - {byte}:
                flipped = data[:place] + bytes([value]) + data[place + 1 :]
                number = data.count(b"\n", 0, place)
                # From the line that holds it on. What is before it is as ever.
                start = data.rfind(b"\n", 0, place) + 1
                reading = Reading(io.BytesIO(flipped[start:]), "r1")
                reading.seq, reading.end = number, start
                lines: list[Line] = []
                try:
                    lines.extend(reading)
                    torn += 1
                    self.assertTrue(reading.torn_bytes)
                    self.assertGreater(number, 0)
                    self.assertEqual(reading.end + reading.torn_bytes, len(data))
                except Damaged:
                    refused += 1
                self.assertEqual(lines, [])
        self.assertGreater(refused, torn)

    def test_lines_that_are_sound_and_cannot_follow(self) -> None:
        def with_last(event: Any, durable: int = 2) -> bytes:
            return logs.encode([*Log(workflow()).lines, Line(3, AT, 1, durable, event)])

        future = logs.encode([Line(3, AT, 1, 2, StepStarted("a", 1))]).replace(b"step_started", b"step_cheered")
        cases = (
            (with_last(StepStarted("b", 1)), "line 3: step_started names the unknown step 'b'"),
            (with_last(AttemptExited("a", 1, 0)), "line 3: attempt_exited of step 'a', which is READY"),
            (with_last(Log(workflow()).lines[0].event), "line 3: run_submitted in a run that is RUNNING"),
            (with_last(RunTimedOut(), durable=3), "line 3 says that line 3 was durable before it"),
            (logs.encode(Log(workflow()).lines) + logs.resealed(future), "line 3: unknown event 'step_cheered'"),
            (logs.encode([Line(1, AT, 1, 0, RunTimedOut())]), "line 1: a log must begin with run_submitted"),
        )
        files = logs.save(self.home, b"")
        for data, words in cases:
            write(files, data)
            self.assert_damaged(words)
        # The last of them has no line 1 that says what was submitted.
        with self.assertRaisesRegex(Damaged, "line 1 is not run_submitted"):
            journal.submitted(files, "r1")

    def test_the_log_of_another_run(self) -> None:
        logs.save(self.home, Log(workflow(), "r2").data)
        self.assert_damaged("line 1 is not whole")
        write(self.home.run("r1"), logs.encode(Log(workflow(), "r2").lines, "r1"))
        self.assert_damaged("the log is of run 'r2'")

    def test_a_newer_log_is_refused_by_name_and_not_called_damaged(self) -> None:
        first, session = logs.encode(DIAMOND.lines[:1]), logs.encode([Line(3, AT, 1, 2, logs.session())])
        start = logs.encode(Log(workflow()).lines)
        # Lines of a later version may be of any kind.
        later = logs.resealed(session.replace(b'"rules":1', b'"rules":2')) + logs.resealed(b'{"seq":4,"crc":"01234567"}\n')
        cases = (
            (logs.resealed(first.replace(b'"format":1', b'"format":2')), "format 2"),
            (logs.resealed(first.replace(b'"rules":1', b'"rules":7')), "rules 7"),
            (start + later, "rules 2"),
        )
        files = logs.save(self.home, b"")
        for data, words in cases:
            write(files, data)
            for act in (journal.fold, lambda files, run_id: journal.recover(self.home, run_id)):
                with self.subTest(words), self.assertRaises(Newer) as caught:
                    act(files, "r1")
                self.assertEqual(
                    str(caught.exception),
                    f"run r1 was written by a newer wfd ({words}; this one reads up to 1): use that version or a later one",
                )
            self.assertEqual(read(files), data)

    def test_an_attempt_that_the_log_does_not_know(self) -> None:
        log = Log(logs.diamond()).start("a").exit("a", 0).start("b")
        files = logs.save(self.home, log.data)
        known = [files.attempt(1, "a", 1).out, files.attempt(2, "b", 1).status]
        for path in (*known, f"{files.attempts}/notes.txt", f"{files.attempts}/.DS_Store"):
            Path(path).touch()
        self.recover()
        for path in (files.attempt(1, "a", 2).out, files.attempt(3, "c", 1).status, files.attempt(5, "e", 1).script):
            with self.subTest(path=path):
                Path(path).touch()
                with self.assertRaises(Damaged) as caught:
                    journal.recover(self.home, "r1")
                self.assertEqual(
                    caught.exception.why,
                    f"attempts/{Path(path).name} exists, but the log ends before that attempt was started",
                )
                os.unlink(path)
        self.recover()

    def test_a_lost_directory_of_attempts_is_made_again_and_a_file_in_its_place_is_damage(self) -> None:
        files = logs.save(self.home, DIAMOND.data)
        os.rmdir(files.attempts)
        self.recover()
        self.assertTrue(os.path.isdir(files.attempts))
        os.rmdir(files.attempts)
        Path(files.attempts).touch()
        with self.assertRaisesRegex(Damaged, "attempts cannot be looked into: Not a directory"):
            journal.recover(self.home, "r1")

    def test_what_is_no_plain_file(self) -> None:
        cases: tuple[tuple[str, Callable[[str], object], str], ...] = (
            ("fifo", os.mkfifo, "not a plain file"),
            ("directory", os.mkdir, "not a plain file"),
            ("socket", bind, "events.ndjson"),
            ("link", lambda path: os.symlink(target, path), "events.ndjson cannot be opened"),
            ("dangling", lambda path: os.symlink("nowhere", path), "events.ndjson cannot be opened"),
            ("empty", lambda path: Path(path).touch(), "the log is empty"),
            ("nothing", lambda path: None, "it has no events.ndjson"),
        )
        target = logs.save(self.home, Log(workflow(), "target").data, "target").events
        for run_id, make, words in cases:
            with self.subTest(kind=run_id):
                os.makedirs(self.home.run(run_id).attempts)
                make(self.home.run(run_id).events)
                self.assert_damaged(words, run_id)
                with self.assertRaises(Damaged):
                    journal.submitted(self.home.run(run_id), run_id)

    def test_a_run_that_is_not_there(self) -> None:
        files = self.home.run("r1")
        for act in (journal.fold, journal.last_line, journal.submitted):
            with self.assertRaises(FileNotFoundError):
                act(files, "r1")
        with self.assertRaises(FileNotFoundError):
            journal.recover(self.home, "r1")

    def test_a_shortage_of_descriptors_says_nothing_about_the_log(self) -> None:
        logs.save(self.home, DIAMOND.data)
        program = """
import os, resource, sys
from wfd import journal
from wfd.paths import RunFiles
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
taken = []
try:
    while True:
        taken.append(os.dup(0))
except OSError:
    pass
try:
    journal.fold(RunFiles(sys.argv[1]), "r1")
except OSError as error:
    print(error.errno)
"""
        self.assertEqual(run_child(program, self.home.run("r1").directory), f"{errno.EMFILE}\n")

    def test_an_interrupted_look_says_nothing_about_the_log(self) -> None:
        # Python repeats an open that a signal has interrupted, but not the opendir of listdir.
        logs.save(self.home, DIAMOND.data)
        interrupted = InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        with mock.patch("os.listdir", side_effect=interrupted), self.assertRaises(InterruptedError):
            journal.recover(self.home, "r1")


class FailedCommits(OnDisk):
    """P2, P8: what did not become durable is undone, and the next commit is right."""

    def assert_undone_and_going_on(self, log: Journal, committed: list[Line]) -> None:
        """After a failed commit: the file ends where it ended, the state is the durable one, and work goes on."""
        self.assertEqual((log.seq, log.durable, log.has_pending), (len(committed), len(committed), False))
        self.assertEqual(read(log.files), logs.encode(committed))
        self.assertEqual(log.refold().seq, len(committed))
        line = log.append(RunCancelRequested("request-2"), AT, 9)
        self.assertEqual((line.seq, line.durable), (len(committed) + 1, len(committed)))
        log.commit()
        self.assertEqual(read(log.files), logs.encode([*committed, line]))
        self.assertEqual(log.refold().requests, {"request-2"})
        inode = os.stat(log.files.events).st_ino
        log.append(LogRecovered(0), AT, 9)
        log.commit()
        self.assertEqual(os.stat(log.files.events).st_ino, inode, "one move is enough")

    def begin(self) -> tuple[Journal, list[Line]]:
        """A run with some lines, and a batch that waits."""
        log = self.create()
        batches = batches_of(DIAMOND)
        append_all(log, batches[:3])
        for line in batches[3]:
            log.append(line.event, line.at, line.mono_ms)
        return log, DIAMOND.lines[: batches[3][0].seq - 1]

    def test_a_failed_sync_is_never_repeated_on_that_inode(self) -> None:
        log, committed = self.begin()
        inode = os.stat(log.files.events).st_ino
        with sync_that(fail), self.assertRaises(CommitFailed) as caught:
            log.commit()
        self.assertEqual((caught.exception.errno, str(caught.exception)), (errno.EIO, "Input/output error"))
        synced: list[int] = []
        with sync_that(), mock.patch.object(journal, "sync", lambda fd: synced.append(os.fstat(fd).st_ino)):
            self.assert_undone_and_going_on(log, committed)
        self.assertNotIn(inode, synced)
        self.assertIn(os.stat(log.files.events).st_ino, synced)
        self.assertNotEqual(os.stat(log.files.events).st_ino, inode)

    def test_syncs_that_fail_again_and_again(self) -> None:
        for failures in range(2, 7):
            with self.subTest(failures=failures):
                self.setUp()
                log, committed = self.begin()
                with sync_that(*[fail] * failures):
                    for _ in range(failures):
                        log.append(RunCancelRequested("request-1"), AT, 9)
                        self.assertRaises(CommitFailed, log.commit)
                        self.assertEqual(read(log.files), logs.encode(committed))
                        self.assertNotIn("events.ndjson.new", os.listdir(log.files.directory))
                    self.assert_undone_and_going_on(log, committed)

    def test_a_move_that_fails_after_the_rename(self) -> None:
        log, committed = self.begin()
        # The batch; then the new file is synced, and its directory fails.
        with sync_that(fail, None, fail):
            self.assertRaises(CommitFailed, log.commit)
            log.append(RunCancelRequested("request-1"), AT, 9)
            self.assertRaises(CommitFailed, log.commit)
        self.assert_undone_and_going_on(log, committed)

    def test_what_is_to_be_written_anew_and_cannot_be_lies_nowhere(self) -> None:
        log, committed = self.begin()
        log.write()
        log.write_anew()
        with sync_that(fail):
            self.assertRaises(CommitFailed, log.commit)
        self.assert_undone_and_going_on(log, committed)

    def test_a_file_that_may_not_grow(self) -> None:
        """A real short write: the kernel takes part of the batch and then refuses."""
        log = self.create()
        program = """
import json, os, resource, sys
from wfd import events, journal
from wfd.events import LogRecovered, RunCancelRequested
from wfd.paths import Home
log, run, *_ = journal.recover(Home(sys.argv[1]), "r1")
for _ in range(9):
    log.append(LogRecovered(0), "at", 5)
resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + 500, resource.RLIM_INFINITY))
found = []
for turn in range(2):
    try:
        log.commit()
    except journal.CommitFailed as error:
        found += [error.errno, os.stat(log.files.events).st_size - log.size, log.seq, log.refold().seq]
    log.append(RunCancelRequested("r"), "at", 5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.commit()
print(json.dumps(found))
"""
        self.assertEqual(json.loads(run_child(program, self.home.directory)), [errno.EFBIG, 0, 1, 1])
        lines = list(Reading(io.BytesIO(read(log.files)), "r1"))
        self.assertEqual([line.event.name for line in lines], ["run_submitted", *["run_cancel_requested"] * 2])

    @unittest.skipUnless(os.path.exists("/dev/full"), "only Linux has a device that is always full")
    def test_a_full_disk(self) -> None:
        log = Journal(self.home.run("r1"), "r1", os.open("/dev/full", os.O_RDWR), 1, 0)
        self.addCleanup(log.close)
        log.append(RunTimedOut(), AT, 5)
        with self.assertRaises(CommitFailed) as caught:
            log.commit()
        self.assertEqual((caught.exception.errno, log.seq, log.has_pending), (errno.ENOSPC, 1, False))

    def test_a_descriptor_that_can_be_neither_written_nor_cut(self) -> None:
        files = logs.save(self.home, DIAMOND.data[:-5])
        good = DIAMOND.lines[:-1]
        size = len(logs.encode(good))
        log = Journal(files, "r1", os.open(files.events, os.O_RDONLY), len(good), size)
        self.addCleanup(log.close)
        log.append(RunTimedOut(), AT, 5)
        with self.assertRaises(CommitFailed) as caught:
            log.commit()
        self.assertEqual(caught.exception.errno, errno.EBADF)
        # What lies behind the durable part could not be cut off, so the next commit goes to a file without it.
        line = log.append(LogRecovered(0), AT, 5)
        log.commit()
        self.assertEqual(read(files), logs.encode([*good, line]))

    def test_a_log_that_became_shorter(self) -> None:
        log, _ = self.begin()
        os.truncate(log.files.events, log.size - 1)
        log.discard()
        with self.assertRaisesRegex(Damaged, f"should have {log.size} durable bytes"):
            log.refold()
        with sync_that(fail):
            self.assertRaises(CommitFailed, log.commit)
        log.append(RunTimedOut(), AT, 5)
        os.truncate(log.files.events, 5)
        with self.assertRaises(CommitFailed, msg="what is left of it must not be taken for the whole"):
            log.commit()
        self.assertEqual(os.stat(log.files.events).st_size, 5)


class Readers(OnDisk):
    def setUp(self) -> None:
        super().setUp()
        self.files = logs.save(self.home, DIAMOND.data)
        self.offsets = list(itertools.accumulate((len(logs.encode([line])) for line in DIAMOND.lines), initial=0))

    def test_offset_of(self) -> None:
        for seq, offset in enumerate(self.offsets, 1):
            self.assertEqual(journal.offset_of(self.files, "r1", seq), offset)
        for seq, offset in ((0, 0), (-3, 0), (9_999, len(DIAMOND.data))):
            self.assertEqual(journal.offset_of(self.files, "r1", seq), offset)
        write(self.files, DIAMOND.data[:-5])
        for seq in (len(DIAMOND.lines), 9_999):
            self.assertEqual(journal.offset_of(self.files, "r1", seq), self.offsets[-2], "a torn line is none")

    def test_read_lines(self) -> None:
        end = len(DIAMOND.data)
        for limit in (1, 100, 333, 4_096, end, 10 * end):
            for start in (0, 3, len(self.offsets) - 1):
                offset, pieces = self.offsets[start], []
                while piece := journal.read_lines(self.files, "r1", offset, end, limit):
                    self.assertTrue(piece.endswith(b"\n"))
                    self.assertLessEqual(len(piece), max(limit, max(map(len, piece.splitlines(keepends=True)))))
                    pieces.append(piece)
                    offset += len(piece)
                self.assertEqual(b"".join(pieces), DIAMOND.data[self.offsets[start] :])

    def test_read_lines_stops_at_the_end_that_it_is_given(self) -> None:
        for end in self.offsets:
            self.assertEqual(journal.read_lines(self.files, "r1", 0, end, 10**6), DIAMOND.data[:end])
        half = self.offsets[2] + 10
        self.assertEqual(journal.read_lines(self.files, "r1", 0, half, 10**6), DIAMOND.data[: self.offsets[2]])
        self.assertEqual(journal.read_lines(self.files, "r1", self.offsets[2], half, 10**6), b"")
        self.assertEqual(journal.read_lines(self.files, "r1", self.offsets[5], self.offsets[2], 10**6), b"")

    def test_read_lines_goes_on_in_a_new_inode(self) -> None:
        first = journal.read_lines(self.files, "r1", 0, self.offsets[3], 10**6)
        self.recover()
        rest = journal.read_lines(self.files, "r1", self.offsets[3], len(DIAMOND.data), 10**6)
        self.assertEqual(first + rest, DIAMOND.data)

    def test_last_line(self) -> None:
        self.assertEqual(journal.last_line(self.files, "r1"), DIAMOND.lines[-1])
        for data in (DIAMOND.data[:-1], DIAMOND.data[:-9], DIAMOND.data + b"x", DIAMOND.data + b"x\n", b"", b"\n"):
            write(self.files, data)
            self.assertIsNone(journal.last_line(self.files, "r1"), data[-20:])

    def test_last_line_of_a_run_that_has_only_a_long_first_one(self) -> None:
        long = Log(workflow(*(step(f"s{n}") for n in range(100))))
        write(self.files, logs.encode(long.lines[:1]))
        self.assertGreater(os.stat(self.files.events).st_size, 10_000)
        self.assertIsNone(journal.last_line(self.files, "r1"))
        write(self.files, long.data)
        self.assertEqual(journal.last_line(self.files, "r1"), long.lines[-1])

    def test_a_reader_of_a_growing_log_sees_good_lines_and_never_damage(self) -> None:
        """The writer goes on while we read, wherever our reads happen to end: half a line is no damage, even when its
        other half and later lines are there a moment later."""
        data = SMALL.data
        for cut in range(data.index(b"\n") + 1, len(data)):
            lines = list(Reading(growing(data[:cut], data[cut:]), "r1"))
            self.assertEqual(lines, SMALL.lines[: len(lines)])
            self.assertGreaterEqual(len(lines), data.count(b"\n", 0, cut))

    def test_a_long_line_is_read_whole(self) -> None:
        huge = Log(workflow(*(step(f"s{n}", command="x" * 1_000) for n in range(2_000))))
        write(self.files, huge.data)
        run, reading = journal.fold(self.files, "r1")
        self.assertEqual((run.describe(), reading.torn_bytes), (huge.run.describe(), 0))


class Descriptors(OnDisk):
    def test_none_is_left_open_whatever_fails(self) -> None:
        logs.save(self.home, DIAMOND.data[:-5], "r1")
        os.makedirs(self.home.run("fifo").attempts)
        os.mkfifo(self.home.run("fifo").events)
        before = descriptors()
        for turn in range(7):
            with sync_that(*[None] * turn, fail), suppress(OSError):
                journal.create(self.home, f"new{turn}", SUBMITTED, b"{}", AT, 1).close()
            with sync_that(*[None] * turn, fail), suppress(OSError):
                journal.recover(self.home, "r1")[0].close()
        log = journal.recover(self.home, "r1")[0]
        with sync_that(fail, fail, None, fail):
            for _ in range(4):
                log.append(LogRecovered(0), AT, 1)
                try:
                    log.commit()
                except CommitFailed:
                    log.refold()
        log.close()
        for act in (journal.fold, journal.last_line, journal.submitted):
            self.assertRaises(Damaged, act, self.home.run("fifo"), "fifo")
            self.assertIsNotNone(act(self.home.run("r1"), "r1"))
        self.assertEqual(descriptors(), before)


class Markers(OnDisk):
    def test_live_markers(self) -> None:
        journal.mark_live(self.home, "r1")
        journal.mark_live(self.home, "r1")
        self.assertEqual(os.listdir(self.home.live), ["r1"])
        journal.unmark_live(self.home, "r1")
        journal.unmark_live(self.home, "r1")
        self.assertEqual(os.listdir(self.home.live), [])

    def test_both_names_of_a_recovered_run_are_made_durable(self) -> None:
        # Whoever made them may have been killed before it did.
        self.create()
        with mock.patch.object(journal, "sync_directory", wraps=journal.sync_directory) as sync:
            self.recover()
        for path in (self.home.live, self.home.runs):
            sync.assert_any_call(path)

    def test_the_marker_of_a_recovered_run_is_synced_and_new(self) -> None:
        # A sync of the old one may have failed before: then another would succeed and mean nothing.
        self.create()
        before = os.stat(f"{self.home.live}/r1").st_ino
        synced: list[int] = []
        with mock.patch.object(journal, "sync", lambda fd: synced.append(os.fstat(fd).st_ino)):
            self.recover()
        after = os.stat(f"{self.home.live}/r1").st_ino
        self.assertNotEqual(after, before)
        self.assertIn(after, synced)
        self.assertEqual(os.listdir(self.home.live), ["r1"])


# -- leaves ------------------------------------------------------------------------------------------------------------


def prefixes(log: Log) -> list[dict[str, object]]:
    """What `describe` says after each line of a log."""

    def states() -> Iterator[dict[str, object]]:
        run = Run(log.lines[0])
        yield run.describe()
        for line in log.lines[1:]:
            run.apply(line)
            yield run.describe()

    return list(states())


def growing(*pieces: bytes) -> io.BufferedReader:
    """A file that seems to end after each piece, until it is read again."""

    class Raw(io.RawIOBase):
        def __init__(self) -> None:
            self.left = [reading for piece in pieces for reading in (piece, b"")]

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            piece = self.left.pop(0) if self.left else b""
            taken = piece[: len(buffer)]
            buffer[: len(taken)] = taken
            if piece[len(taken) :]:
                self.left.insert(0, piece[len(taken) :])
            return len(taken)

    return io.BufferedReader(Raw())


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/dev/fd"))


def run_child(program: str, *arguments: str) -> str:
    """What a program prints that changes limits of its whole process. A deadline, in case it hangs."""
    command = [sys.executable, "-S", "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, timeout=60, stdout=subprocess.PIPE, text=True).stdout


def read(files: RunFiles) -> bytes:
    return Path(files.events).read_bytes()


def write(files: RunFiles, data: bytes) -> None:
    Path(files.events).write_bytes(data)


if __name__ == "__main__":
    unittest.main()
