"""Somebody looks at a run: its story line by line, its events as JSON, or a live picture on a terminal.

The work belongs to the daemon. A viewer may come, go and be killed at any moment without changing anything.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable

from wfctl import logs, render
from wfctl.errors import RunDamaged
from wfctl.watch import Watch
from wfd import events
from wfd.events import Line, StepFailed
from wfd.paths import Home
from wfd.state import Impossible, Run

# How long nothing happens before a viewer looks around: is its reader still there, is the picture old?
TICK_SEC = 0.25
# A picture is drawn at most so often while events pour in, and at least so often while durations grow.
_MIN_REDRAW_SEC, _MAX_REDRAW_SEC = 0.1, 1.0
# Failed steps whose last lines of output are shown below a live picture; `logs` shows the others.
MAX_TAILS_SHOWN = 10

Say = Callable[[str], None]


def follow(home: Home, run_id: str, view: View, from_seq: int = 1, revives: bool = False) -> str:
    """Show a run to its end, and return its end state. With `revives` a daemon that crashes is started again.
    Raises BrokenPipeError when nobody reads what is shown, and what Watch raises."""
    watch = Watch(home, run_id, from_seq, TICK_SEC, view.wait, revives, only_end=type(view) is View)
    for line in watch:
        if line is None:
            check_reader()
            view.tick()
        else:
            view.show(line)
    assert watch.state is not None
    view.end()
    return watch.state


def check_reader() -> None:
    """Raise BrokenPipeError when whoever reads our output is gone: between two events nothing would tell us."""
    try:
        fd = sys.stdout.fileno()
    except (AttributeError, ValueError, OSError):
        return  # Closed, or no file at all.
    poll = select.poll()
    poll.register(fd, 0)
    if any(mask & (select.POLLERR | select.POLLHUP) for _, mask in poll.poll(0)):
        raise BrokenPipeError


class View:
    """Shows nothing, and says on stderr what there is to say. The others build on it."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def show(self, line: Line) -> None:
        """One more event."""

    def tick(self) -> None:
        """Nothing has happened for a while."""

    def wait(self, why: str) -> None:
        """The daemon is gone, or silent."""
        self.say(why)

    def end(self) -> None:
        """The run is over."""


class JsonView(View):
    """The log's own lines."""

    def __init__(self, say: Say, run_id: str) -> None:
        super().__init__(say)
        self._seed = events.seed(run_id)

    def show(self, line: Line) -> None:
        print(events.encode(line, self._seed).decode("ascii"), end="", flush=True)


class StoryView(View):
    """A line for each transition. With `home` it also shows the result and, on stderr, the last lines of what a failed
    step printed."""

    def __init__(self, say: Say, colour: bool, home: Home | None = None) -> None:
        super().__init__(say)
        self._story = render.Story(colour)
        self._home = home
        self._run: Run | None = None

    def show(self, line: Line) -> None:
        told = self._story.tell(line)
        if told is not None:
            print(told, flush=True)
        if self._home is None:
            return
        self._run = _fold(self._run, line)
        if isinstance(line.event, StepFailed):
            _show_tail(self.say, self._home, self._run, line.event.step)

    def end(self) -> None:
        if self._run is not None:
            lasted = render.took(self._run.submitted_at, self._run.finished_at, 0)
            counted = render.counts(record.state.value for record in self._run.steps)
            print(f"result: {self._run.state.value} after {lasted} {counted}", flush=True)


class LiveView(View):
    """A picture that is drawn again in its place. The last one stays; what failed steps printed follows it."""

    def __init__(self, say: Say, colour: bool, home: Home) -> None:
        super().__init__(say)
        self._colour = colour
        self._home = home
        self._run: Run | None = None
        self._failed: dict[str, None] = {}
        self._lines_drawn = 0
        self._drawn_sec = 0.0
        self._is_new = False

    def show(self, line: Line) -> None:
        self._run = _fold(self._run, line)
        self._is_new = True
        if isinstance(line.event, StepFailed):
            self._failed[line.event.step] = None
        if time.monotonic() - self._drawn_sec >= _MIN_REDRAW_SEC:
            self._draw()

    def tick(self) -> None:
        if self._is_new or time.monotonic() - self._drawn_sec >= _MAX_REDRAW_SEC:
            self._draw()

    def wait(self, why: str) -> None:
        super().wait(why)
        self._lines_drawn = 0  # The next picture comes below what was said.

    def end(self) -> None:
        self._draw()
        if self._run is None:
            return
        for step in list(self._failed)[:MAX_TAILS_SHOWN]:
            _show_tail(self.say, self._home, self._run, step)
        if len(self._failed) > MAX_TAILS_SHOWN:
            self.say(f"… and {len(self._failed) - MAX_TAILS_SHOWN} more steps failed; `logs` shows what they printed")

    def _draw(self) -> None:
        if self._run is None:
            return
        try:
            width, height = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            width, height = 80, 24
        # One line less than there are: the cursor stands below the picture.
        lines = render.frame(self._run, time.time(), max(2, height - 1), max(20, width), self._colour)
        print(render.redraw(lines, self._lines_drawn), end="", flush=True)
        self._lines_drawn, self._drawn_sec, self._is_new = len(lines), time.monotonic(), False


def _fold(run: Run | None, line: Line) -> Run:
    try:
        if run is None:
            return Run(line)
        run.apply(line)
    except Impossible as error:
        raise RunDamaged(f"line {line.seq} cannot follow what was before it: {error}") from None
    return run


def _show_tail(say: Say, home: Home, run: Run, step: str) -> None:
    index = run.index_of[step]
    attempt = run.steps[index].attempt
    path = home.run(run.run_id).attempt(index + 1, step, attempt).out
    lines = logs.tail(path)
    name = f"step {render.escape(step)}, attempt {attempt}"
    if lines:
        say("\n".join([f"{name}, printed last ({path}):", *(f"  | {line}" for line in lines)]))
    else:
        say(f"{name}, printed nothing")
