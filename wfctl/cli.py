"""The command line: one table of commands, one function for each.

Exit codes
    0    fine; the run succeeded
    1    the run failed
    2    wrong usage, an invalid workflow, or a request that cannot be granted
    3    no such run or step, or more than one run is meant
    4    the daemon cannot be reached or started, or cannot do it now
    5    the run was cancelled
    6    the log is damaged, or the replay differs
    74   stdout cannot be written (the disk is full, …); a run goes on without its viewer
    124  `wait --timeout` was over before the run
    130  interrupted; a run goes on without its viewer
    141  whoever read our output is gone

`run`, `watch` and `wait` return the run's outcome; so does `status --exit-status` for a run that is over.
stdout is data, stderr is talk. What cannot be said on stderr is left out and changes no exit code. With --json both are
JSON: an object for a question, an object a line for a stream, and {"error": {"code", "message"}} or {"note": …} on
stderr. The last lines of what a failed step printed are talk, and --json leaves them out.

Start-up time is most of what a command costs, so only the parser of the given command is built, and what only some
commands need is imported where it is needed.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from wfctl import client, history, render
from wfctl.errors import DaemonUnavailable, InvalidRequest, InvalidWorkflow, NoSuchRun, RunDamaged, WorkflowError

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

    from wfctl.viewer import View
    from wfd.events import Line

# What it says of itself is English, as all else here. To look for translations that nobody has takes 1.5 ms of each command.
argparse._ = str  # type: ignore[attr-defined]

FINE, USAGE, NO_SUCH_RUN, NO_DAEMON, DAMAGED = 0, 2, 3, 4, 6
UNWRITABLE, TIMED_OUT, INTERRUPTED, READER_GONE = 74, 124, 130, 141
OUTCOMES = {"SUCCEEDED": FINE, "FAILED": 1, "CANCELLED": 5}

_ERROR_CODES: dict[type[WorkflowError], int] = {
    InvalidWorkflow: USAGE,
    InvalidRequest: USAGE,
    NoSuchRun: NO_SUCH_RUN,
    DaemonUnavailable: NO_DAEMON,
    RunDamaged: DAMAGED,
}

# Of a number, and what is shown of a text that is none.
_MAX_DIGITS, _MAX_SHOWN = 18, 40
# What `list` shows unless it is asked for all.
LIST_LIMIT = 50


class UsageError(WorkflowError):
    """The command line itself is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command line (without the program's name) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        # A locale that cannot say a character must not turn a status into a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except WorkflowError as error:
        return _report(error, "--json" in arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_unwritable_output()
        return READER_GONE
    except OSError as error:
        if _drop_unwritable_output() or _is_unbuffered_output(error):
            _report(UsageError(f"stdout cannot be written: {error.strerror or error}"), "--json" in arguments)
            return UNWRITABLE
        where = f"{error.filename}: " if error.filename else ""
        return _report(UsageError(f"{where}{error.strerror or error}"), "--json" in arguments)


def _open_missing_streams() -> None:
    """Whoever started us without stdin, stdout or stderr (`>&-`) wants nothing read from them or written to them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open until the process ends


def _drop_unwritable_output() -> bool:
    """What is still buffered and cannot go anywhere must not fail once more at the end of the process. True when there
    is such on stdout."""
    try:
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)
        return True
    return False


def _is_unbuffered_output(error: OSError) -> bool:
    """Was it stdout? With PYTHONUNBUFFERED nothing is left that could fail once more. What else fails so has a name."""
    return sys.stdout.write_through and error.filename is None and error.errno in _FULL  # type: ignore[union-attr]


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def _silence(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _talk(text: str) -> None:
    """A line on stderr, if it can be written at all."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help", "help"):
        print(_help())
        return FINE
    if name == "--version":
        from wfd import VERSION

        print(VERSION)
        return FINE
    if name not in COMMANDS:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        raise UsageError(f"{problem}; there are {', '.join(COMMANDS)}")
    function, summary, options = COMMANDS[name]
    parser = _Parser(prog=f"{_program()} {name}", description=summary, allow_abbrev=False, formatter_class=_formatter)
    for flags, settings in options:
        parser.add_argument(*flags, **settings)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return function(parser.parse_args(arguments[1:]))


def _formatter(prog: str) -> argparse.HelpFormatter:
    # argparse asks shutil for the width, for every option, and importing that costs a tenth of a whole `status`.
    # No terminal needs more than four digits, and int() takes no more than 4,300.
    width = os.environ.get("COLUMNS", "")[:4]
    return argparse.HelpFormatter(prog, width=int(width) - 2 if width.isdecimal() and int(width) > 40 else 100)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _program() -> str:
    """What the user typed to get here, for messages that say what to type next."""
    path, python = render.escape(sys.argv[0]), os.path.basename(sys.executable or "")
    if not python.startswith("python"):
        python = "python3"
    if os.path.basename(path) == "__main__.py":
        return f"{python} -m wfctl"
    return f"{python} {path}" if path.endswith((".py", ".pyz")) else os.path.basename(path) or "wfctl"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary, _) in COMMANDS.items()]
    program = _program()
    return "\n".join([
        f"usage: {program} COMMAND …        {program} COMMAND --help",
        "",
        "Run workflows: DAGs of shell commands, kept by a daemon of your own that survives its viewers.",
        "",
        *lines,
        "",
        "RUN is a run id, a part of one from either end, or @latest. $WFD_HOME is where everything is kept;",
        "NO_COLOR switches colours off. Exit codes: 0 fine or succeeded, 1 failed, 2 usage or invalid workflow,",
        "3 no such run, 4 no daemon, 5 cancelled, 6 log damaged or replay differs, 74 stdout cannot be written,",
        "124 timed out, 130 interrupted.",
    ])  # fmt: skip


def _report(error: WorkflowError, as_json: bool) -> int:
    """Say on stderr what went wrong, and return its exit code."""
    code = next((code for kind, code in _ERROR_CODES.items() if isinstance(error, kind)), USAGE)
    if as_json:
        body: dict[str, object] = {"code": code, "message": str(error)}
        if isinstance(error, InvalidWorkflow) and error.problems:
            body["problems"] = [{"path": path, "message": message} for path, message in error.problems]
        _talk(json.dumps({"error": body}))
    else:
        # Only the problems of a workflow are several lines, and no name in them breaks one.
        has_lines = isinstance(error, InvalidWorkflow) and error.problems
        _talk(render.escape(str(error), keep="\n" if has_lines else ""))
    return code


def _sayer(args: argparse.Namespace) -> Callable[[str], None]:
    """How to talk: on stderr, as JSON when that was asked for. The text must have been escaped."""

    def say(text: str) -> None:
        sys.stdout.flush()
        _talk(json.dumps({"note": text}) if args.json else text)

    return say


def _print_json(record: object) -> None:
    print(json.dumps(record))


def _use_colour(args: argparse.Namespace) -> bool:
    if args.color != "auto":
        return bool(args.color == "always")
    return _is_terminal() and not os.environ.get("NO_COLOR")


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


# -- run, watch, wait --------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    from wfctl import documents

    document, base_dir = _read_workflow(args.workflow)
    home = client.current_home()
    run_id = args.run_id if args.run_id is not None else client.new_run_id(home)
    try:
        is_new = documents.submit_document(document, base_dir, run_id, args.max_parallel)["created"]
    except InvalidWorkflow as error:
        raise _located(args.workflow, error) from None
    except KeyboardInterrupt:
        _sayer(args)(f"interrupted before the daemon's answer; `{_program()} status {run_id}` tells if it took the run")
        return INTERRUPTED
    if not is_new and args.run_id is not None:
        submitted_at = client.status(home, run_id)["submitted_at"]
        _sayer(args)(f"run {run_id} exists already (submitted {submitted_at}): nothing new was started")
    if args.detach and args.json:
        _print_json({"run_id": run_id})
    elif args.detach or args.quiet:
        print(run_id, flush=True)
    elif not args.json:
        print(f"run_id: {run_id}", flush=True)
    return FINE if args.detach else _follow(args, run_id, 1, is_ours=True)


def _read_workflow(name: str) -> tuple[dict[str, object], str]:
    """The document in a file, or in stdin, and where its relative directories start. Raises InvalidWorkflow."""
    from wfctl import documents
    from wfd.definition import MAX_DEFINITION_BYTES

    if name == "-":
        base_dir = client.current_directory()
        text = sys.stdin.buffer.read(MAX_DEFINITION_BYTES + 1)
    else:
        text, base_dir = documents.read_file(name), documents.directory_of(name)
    try:
        return documents.document_in(text, base_dir), base_dir
    except InvalidWorkflow as error:
        raise _located(name, error) from None


def _located(name: str, error: InvalidWorkflow) -> InvalidWorkflow:
    """The same, each problem with the file that it is in."""
    name = "stdin" if name == "-" else render.escape(name)
    return InvalidWorkflow("\n".join(f"{name}: {line}" for line in str(error).split("\n")), error.problems)


def _watch(args: argparse.Namespace) -> int:
    return _follow(args, client.resolve(client.current_home(), args.run), args.from_seq, is_ours=False)


def _follow(args: argparse.Namespace, run_id: str, from_seq: int, is_ours: bool) -> int:
    """Show a run until it is over. Ctrl-C takes the viewer away and leaves the run alone. A run of our own is not left
    without a daemon, and what its failed steps printed is shown."""
    from wfctl import viewer

    home = client.current_home()
    try:
        return OUTCOMES[viewer.follow(home, run_id, _view(args, run_id, from_seq, is_ours), from_seq, is_ours)]
    except KeyboardInterrupt:
        program = _program()
        _sayer(args)(f"\ndetached; the run goes on\n  {program} watch {run_id}\n  {program} cancel {run_id}")
        return INTERRUPTED


def _view(args: argparse.Namespace, run_id: str, from_seq: int, shows_output: bool) -> View:
    from wfctl import viewer

    say, home = _sayer(args), client.current_home()
    if args.quiet:
        return viewer.View(say)
    if args.json:
        return viewer.JsonView(say, run_id)
    if _is_terminal() and from_seq == 1:
        return viewer.LiveView(say, _use_colour(args), home)
    return viewer.StoryView(say, _use_colour(args), home if shows_output else None)


def _wait(args: argparse.Namespace) -> int:
    deadline_sec = None if args.timeout is None else time.monotonic() + args.timeout
    run_id = client.resolve(client.current_home(), args.run)
    state = _wait_for_end(args, run_id, deadline_sec)
    if state is None:
        _sayer(args)(f"run {run_id} is not over after {args.timeout:g} seconds")
        return TIMED_OUT
    _print_state(args, run_id, state)
    return OUTCOMES[state]


def _wait_for_end(args: argparse.Namespace, run_id: str, deadline_sec: float | None, revives: bool = False) -> str | None:
    """The end state of a run, or None when the deadline (of the monotonic clock) came first."""
    from wfctl import viewer
    from wfctl.watch import Watch

    home = client.current_home()
    tick_sec = viewer.TICK_SEC
    if deadline_sec is not None:
        tick_sec = min(tick_sec, max(0.01, (deadline_sec - time.monotonic()) / 10))
    on_wait = viewer.View(_sayer(args)).wait
    watch = Watch(home, run_id, 1, tick_sec, on_wait, revives, deadline_sec, only_end=True)
    for _ in watch:
        viewer.check_reader()
        if deadline_sec is not None and time.monotonic() >= deadline_sec:
            return None
    return watch.state


def _print_state(args: argparse.Namespace, run_id: str, state: str) -> None:
    if args.json:
        _print_json({"run_id": run_id, "state": state})
    else:
        print(f"{run_id} {state}")


# -- cancel, retry -----------------------------------------------------------------------------------------------------


def _cancel(args: argparse.Namespace) -> int:
    home = client.current_home()
    run_id = client.resolve(home, args.run)
    state = str(client.cancel(home, run_id)["state"])
    if args.wait:
        state = _wait_for_end(args, run_id, None, revives=True) or state
    _print_state(args, run_id, state)
    return FINE


def _retry(args: argparse.Namespace) -> int:
    home = client.current_home()
    run_id = client.resolve(home, args.run)
    _print_state(args, run_id, str(client.retry(home, run_id)["state"]))
    return FINE


# -- status, list, replay, logs, validate ------------------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    home = client.current_home()
    found = client.status(home, client.resolve(home, args.run), _sayer(args))
    if args.json:
        _print_json(found)
    else:
        if found["source"] == "log":
            _sayer(args)("this comes from the log, not from a daemon")
        print(render.status_text(found, time.time(), _use_colour(args)))
    return OUTCOMES.get(str(found["state"]), FINE) if args.exit_status else FINE


# What `status` of the run tells in the system's own words.
_NOT_TAKEN_OVER = "the daemon could not take it over yet"


def _list(args: argparse.Namespace) -> int:
    home = client.current_home()
    # Before the daemon is asked: what has a marker by then the daemon has, or could not take over.
    marked = history.marked_live(home)
    answer = client.ask(home, "list", {}, _sayer(args))
    found = answer["runs"] if answer is not None else []
    live = {run["run_id"]: run for run in found} if isinstance(found, list) else {}
    shown, ids = history.newest(home, None if args.all else LIST_LIMIT)
    # However old a run is that still goes on, it belongs to the picture.
    shown += history.last_first(home, (marked | live.keys()).difference(shown))
    runs = [row for run_id in shown if (row := live.get(run_id) or history.summary(home, run_id)) is not None]
    waiting = marked - live.keys() if answer is not None else ()
    for run in runs:
        if run["run_id"] in waiting and run["state"] in ("RUNNING", "CANCELLING"):
            run["stalled"] = _NOT_TAKEN_OVER
    if args.json:
        _print_json({"source": "log" if answer is None else "daemon", "runs": runs})
        return FINE
    if answer is None and runs:
        _sayer(args)("this comes from the logs, not from a daemon")
    if runs:
        print(render.list_text(runs, time.time(), _use_colour(args)))
    if older := len(ids) - len(set(shown).intersection(ids)):
        _sayer(args)(f"{older} older runs are not shown; --all shows them")
    return FINE


def _replay(args: argparse.Namespace) -> int:
    story = render.Story(_use_colour(args))
    times: list[str] = []

    def tell(line: Line) -> None:
        times[:] = [line.at]
        told = None if args.json else story.tell(line)
        if told is not None:
            print(told)

    if "/" in args.run or os.path.isfile(args.run):
        result = history.replay_file(args.run, args.until, tell)
    else:
        home = client.current_home()
        result = history.replay_run(home, client.resolve(home, args.run), args.until, tell)
    if args.json:
        _print_json(_replay_record(result))
    else:
        if result.torn_bytes:
            _sayer(args)(f"after line {result.lines} comes a torn tail of {result.torn_bytes} bytes")
        print()
        now_sec = render.epoch_sec(times[0])
        if now_sec is None:
            now_sec = time.time()
        print(render.status_text(result.run.describe(), now_sec, _use_colour(args)))
        print()
        print(_verdict(result))
    return FINE if result.verified else DAMAGED


def _verdict(result: history.Replay) -> str:
    if result.difference is None:
        return f"replay verified: {result.lines} lines, every decision regenerated"
    return f"replay differs at {render.escape(str(result.difference))}"


def _replay_record(result: history.Replay) -> dict[str, object]:
    difference, state = result.difference, result.run.describe()
    return {
        "run_id": result.run.run_id,
        "verified": result.verified,
        "lines": result.lines,
        "difference": difference and {"seq": difference.seq, "expected": difference.expected, "found": difference.found},
        "state": state["state"],
        "torn_bytes": result.torn_bytes,
        "steps": state["steps"],
    }


def _logs(args: argparse.Namespace) -> int:
    from wfctl import logs, viewer

    home = client.current_home()
    run = history.fold(home, client.resolve(home, args.run))

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    form = "json" if args.json else "terminal" if sys.stdout.isatty() else "raw"
    copier = logs.Copier(home, run, args.step, form, write)
    if not copier.copy_all() and not args.follow:
        step = args.step
        _sayer(args)("no step has begun" if step is None else f"step {render.escape(step)} has not begun")
    if args.follow and not run.is_over:
        copier.follow(viewer.View(_sayer(args)).wait, viewer.check_reader)
    return FINE


def _validate(args: argparse.Namespace) -> int:
    from wfctl import documents

    document, base_dir = _read_workflow(args.workflow)
    workflow = documents.checked(document, base_dir)
    if args.json:
        _print_json({"valid": True, "workflow_id": workflow.workflow_id, "steps": len(workflow.steps)})
    else:
        name, workflow_id = render.escape(args.workflow), render.escape(workflow.workflow_id)
        print(f"{name} is valid: {workflow_id}, {len(workflow.steps)} steps")
    return FINE


# -- daemon ------------------------------------------------------------------------------------------------------------


def _daemon(args: argparse.Namespace) -> int:
    if args.cancel_runs and args.action != "stop":
        raise UsageError("--cancel-runs goes with `daemon stop`")
    home = client.current_home()
    if args.action == "stop":
        was_there = client.stop_daemon(home, args.cancel_runs)
        if args.json:
            _print_json({"running": False})
        else:
            print("the daemon has ended" if was_there else f"no daemon was running for {render.escape(home.directory)}")
        return FINE
    found = client.greet(home) if args.action == "start" else client.hello(home)
    if args.json:
        _print_json({"running": False, "home": home.directory} if found is None else {"running": True, **found})
    elif found is None:
        print(f"no daemon is running for {render.escape(home.directory)}")
    else:
        print(
            f"the daemon runs: pid {found['pid']}, version {found['version']}, {found['active_runs']} active runs, "
            f"{found['live_steps']} live steps, up {render.duration(float(str(found['uptime_sec'])))}"
        )
    return NO_DAEMON if found is None else FINE


# -- the table ---------------------------------------------------------------------------------------------------------


def _option(*flags: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return flags, settings


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{render.cut(repr(text), _MAX_SHOWN)} is not a whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


_WORKFLOW = _option("workflow", metavar="FILE", help="a workflow in JSON; - reads stdin")
_RUN = _option("run", metavar="RUN", help="a run id, a unique part of one from either end, or @latest")
_COLOUR = _option("--color", choices=("auto", "always", "never"), default="auto", help="when to use colours")

_Options = tuple[tuple[tuple[str, ...], "dict[str, Any]"], ...]

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str, _Options]] = {
    "run": (_run, "Run a workflow and follow it; Ctrl-C leaves the run alone.", (
        _WORKFLOW,
        _option("-d", "--detach", action="store_true", help="print the run id and return"),
        _option("-q", "--quiet", action="store_true", help="print nothing but the run id, but wait"),
        _option("--run-id", metavar="ID", help="the id of the run; submitting it again changes nothing"),
        _option("--max-parallel", type=_count, metavar="N", help="at most so many steps at once"),
        _COLOUR,
    )),
    "status": (_status, "Show a run and its steps.", (
        _option("run", metavar="RUN", nargs="?", default=history.LATEST, help="default: @latest"),
        _option("--exit-status", action="store_true", help="exit as the run did, if it is over"),
        _COLOUR,
    )),
    "cancel": (_cancel, "Cancel a run: no step starts any more, those that run are ended.", (
        _RUN,
        _option("--wait", action="store_true", help="return when the run is over"),
    )),
    "retry": (_retry, "Try again what did not succeed in a run that is over.", (_RUN,)),
    "replay": (_replay, "Tell a run's story from its log, and check every decision in it.", (
        _option("run", metavar="RUN|FILE", help="a run, or the path of an events.ndjson"),
        _option("--until", type=_count, metavar="SEQ", help="stop after this line"),
        _COLOUR,
    )),
    "watch": (_watch, "Follow a run.", (
        _RUN,
        _option("--from", dest="from_seq", type=_count, default=1, metavar="SEQ", help="the first event to show"),
        _option("-q", "--quiet", action="store_true", help="print nothing, but wait"),
        _COLOUR,
    )),
    "list": (_list, "List the newest runs.", (
        _option("--all", action="store_true", help=f"all of them, not the {LIST_LIMIT} newest"),
        _COLOUR,
    )),
    "logs": (_logs, "Print what steps have printed.", (
        _RUN,
        _option("step", metavar="STEP", nargs="?", help="default: all of them, in order"),
        _option("-f", "--follow", action="store_true", help="go on until the run is over"),
    )),
    "wait": (_wait, "Wait for the end of a run.", (
        _RUN,
        _option("--timeout", type=_seconds, metavar="SEC", help="give up after so long, with exit code 124"),
    )),
    "validate": (_validate, "Check a workflow file.", (_WORKFLOW,)),
    "daemon": (_daemon, "Start the daemon, stop it (steps go on), or ask how it is.", (
        _option("action", choices=("start", "stop", "status")),
        _option("--cancel-runs", action="store_true", help="with stop: cancel all runs first"),
    )),
}  # fmt: skip
