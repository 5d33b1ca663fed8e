"""What steps print: the last lines of an attempt's output; copying outputs, with or without following them.

Into a pipe or a file the bytes go as they are. On a terminal they are text, and what could do something to the terminal
is escaped. As JSON each line of output is an object.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable

from wfctl import client, render
from wfctl.errors import NoSuchRun
from wfctl.watch import Watch
from wfd.events import Decision, Line, StepStarted
from wfd.paths import Home, RunFiles
from wfd.state import RUNNING, Run

# What a failed step's last lines are looked for in, and how many of them are shown.
TAIL_BYTES = 16 << 10
TAIL_LINES = 10
# A line without an end, such as a progress bar's, must not fill the screen: `logs` shows it whole.
TAIL_CHARS = 200
_PIECE_BYTES = 1 << 16
# How often the files of running attempts are looked at; nothing portable tells of a file's growth.
FOLLOW_SEC = 0.25
# Step ids that the message about an unknown one shows.
_MAX_IDS_SHOWN = 10


def tail(path: str) -> list[str]:
    """The last lines of an output, escaped. Empty when there are none."""
    try:
        with open(path, "rb", opener=client.open_at_once) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read()
    except OSError:
        return []
    lines = data.decode("utf-8", "backslashreplace").rstrip("\n").split("\n")[-TAIL_LINES:]
    return [render.cut(render.escape(line, keep="\t"), TAIL_CHARS) for line in lines] if data.strip() else []


class _Output:
    """The output of one attempt, and how much of it has been copied."""

    def __init__(self, files: RunFiles, ordinal: int, step: str, attempt: int, form: str) -> None:
        self.path = files.attempt(ordinal, step, attempt).out
        self.step = step
        self.attempt = attempt
        self._form = form
        self._offset = 0
        self._partial = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def read(self, is_last: bool) -> bytes:
        """What has been added since the last call, in its form. `is_last`: nothing more will come."""
        pieces = []
        try:
            with open(self.path, "rb", opener=client.open_at_once) as file:
                # The daemon cuts an output that has become too long.
                self._offset = file.seek(min(self._offset, file.seek(0, os.SEEK_END)))
                while data := file.read(_PIECE_BYTES):
                    self._offset += len(data)
                    pieces.append(self._converted(data))
        except OSError:
            pass
        if is_last and self._partial:
            pieces.append(self._converted(b"\n"))
        return b"".join(pieces)

    def _converted(self, data: bytes) -> bytes:
        if self._form == "raw":
            return data
        if self._form == "terminal":
            return render.escape(self._decoder.decode(data), keep="\n\t").encode("utf-8", "backslashreplace")
        *whole, self._partial = (self._partial + data).split(b"\n")
        texts = [line.decode("utf-8", "surrogateescape") for line in whole]
        records = [{"step": self.step, "attempt": self.attempt, "line": text} for text in texts]
        return "".join(json.dumps(record) + "\n" for record in records).encode("ascii")


class Copier:
    """Copies the outputs of a run's newest attempts, all in order or those of one step, to `write`.

    form: "raw", "terminal" or "json". When there are several, each part gets a heading (in JSON each line names its
    step anyway). Raises NoSuchRun when the run has no such step."""

    def __init__(self, home: Home, run: Run, step: str | None, form: str, write: Callable[[bytes], None]) -> None:
        if step is not None and step not in run.index_of:
            known = ", ".join(render.escape(record.step.id) for record in run.steps[:_MAX_IDS_SHOWN])
            more = ", …" if len(run.steps) > _MAX_IDS_SHOWN else ""
            raise NoSuchRun(f"run {run.run_id} has no step {step!r}; it has {known}{more}")
        self._home = home
        self._run = run
        self._step = step
        self._form = form
        self._write = write
        self._last: _Output | None = None
        self._ends_line = True
        self._growing: dict[str, _Output] = {}

    def copy_all(self) -> bool:
        """Copy what there is. False when no wanted step has begun."""
        has_begun = False
        for record in self._run.steps:
            if record.attempt and self._step in (None, record.step.id):
                has_begun = True
                output = self._output(record.step.id, record.attempt)
                self._copy(output, is_last=record.state is not RUNNING)
                if record.state is RUNNING:
                    self._growing[record.step.id] = output
        return has_begun

    def follow(self, on_wait: Callable[[str], None], on_tick: Callable[[], None]) -> None:
        """Go on copying until the run is over."""
        for line in Watch(self._home, self._run.run_id, self._run.seq + 1, FOLLOW_SEC, on_wait):
            if line is None:
                for output in self._growing.values():
                    self._copy(output, is_last=False)
                on_tick()
            else:
                self._take(line)

    def _take(self, line: Line) -> None:
        event = line.event
        step = getattr(event, "step", None)
        if isinstance(event, StepStarted) and self._step in (None, step):
            self._growing[event.step] = self._output(event.step, event.attempt)
        elif isinstance(event, Decision) and step in self._growing:
            self._copy(self._growing.pop(step), is_last=True)

    def _output(self, step: str, attempt: int) -> _Output:
        files = self._home.run(self._run.run_id)
        return _Output(files, self._run.index_of[step] + 1, step, attempt, self._form)

    def _copy(self, output: _Output, is_last: bool) -> None:
        data = output.read(is_last)
        if not data:
            return
        if self._step is None and self._form != "json" and self._last is not output:
            heading = f"==> {render.escape(output.step)}, attempt {output.attempt} <==\n"
            self._write(("" if self._ends_line else "\n").encode() + heading.encode("utf-8", "backslashreplace"))
        self._last, self._ends_line = output, data.endswith(b"\n")
        self._write(data)
