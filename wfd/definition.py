"""The definition: what a user writes. JSON in, a frozen `Workflow` of `Step`s out, or every problem at once.

Rules of this file
  * A definition is refused whole. Each problem names its place as a JSON path (`$.steps[2].command`) and what to do.
  * Nothing is guessed: no unknown field, no null, no `true` for 1, no NaN, no key given twice.
  * Inside, time is whole milliseconds and ratios are thousandths. Floats end here, so the log holds integers only.
  * No recursion and nothing quadratic: 100,000 steps in any order are ordinary.

Theory. A definition exists in two forms: the one a user writes (`parse`, `validate`) and the record in line 1 of a
run's log (`to_record`, `from_record`). Both are tables of the same kind, from the name in the JSON to the name of
the field and a check that returns the converted value or raises. An object is read through its table in one loop; only
when that fails is it read again, slowly, to collect all that is wrong with it. So good definitions pay for one call a
field.

The limits below may grow but never shrink, and no check may become stricter: old logs are read through the same checks.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

from wfd.values import Value

TYPE_CHECKING = False  # As in typing, whose import costs a tenth of a whole `status`.
if TYPE_CHECKING:
    from typing import Any

# --- Limits -----------------------------------------------------------------------------------------------------------

# One request is one line of at most 64 MiB; 4 MiB of it are room for the envelope around the definition.
MAX_DEFINITION_BYTES = 60 * 1024 * 1024
# Twice what is promised. Each step costs a kilobyte or two of memory in the daemon for as long as its run lives.
MAX_STEPS = 200_000
# Long enough for a path or a sentence, short enough for a table; file names use a slug, not the id.
MAX_ID_CHARS = 200
# A command beyond the kernel's 128 KiB for one argument goes through a file; beyond this it is a program.
MAX_COMMAND_BYTES = 1024 * 1024
# Every attempt leaves two files and several lines of log. At the default delay of a minute these last a week.
MAX_RETRIES = 10_000
# A year. Whoever means "for ever" leaves the timeout out.
MAX_DURATION_SEC = 366 * 86_400
# A day. A cancelled run is not over before the grace of its steps is.
MAX_GRACE_SEC = 86_400
# A thousandfold from one attempt to the next reaches any maximum in four.
MAX_FACTOR = 1_000
# Linux takes a megabyte or two of environment in all; more names than this never fit with their values.
MAX_ENV_NAMES = 1_000
# Linux refuses a single NAME=value of 128 KiB, its closing NUL included.
MAX_ENV_ENTRY_BYTES = 128 * 1024 - 1
# PATH_MAX of Linux without the closing NUL.
MAX_PATH_BYTES = 4_095
# Steps whose records are made at once to write them down: those of all would take more memory than the steps themselves.
_STEPS_AT_A_TIME = 100
# Different back-offs that are remembered, so that not each step has to be asked for its own again.
_BACKOFFS_KEPT = 64
# No integer here has more digits than this; JSON itself sets no bound, and converting long ones costs quadratic time.
MAX_DIGITS = 20

# Problems that one error shows as text. The rest is counted; a screen is all that anybody reads.
MAX_PROBLEMS_SHOWN = 20
# Problems that one error holds. A file that is wrong throughout must not fill the memory.
MAX_PROBLEMS = 1_000
# Unknown fields named one by one in one object.
MAX_UNKNOWN_FIELDS = 10
# Cycles looked for one after the other; each costs a walk over the whole graph.
MAX_CYCLES = 5
# Steps of a cycle that are printed.
MAX_CYCLE_SHOWN = 12
# Unknown dependencies for which a "did you mean" is looked for, and how many ids on either side are compared in each of
# two orders (difflib costs up to a millisecond for a pair of long ids).
MAX_GUESSES = 10
GUESS_WINDOW = 25
# Characters of a user's text that a message quotes.
MAX_QUOTED_CHARS = 60


# --- What comes out ---------------------------------------------------------------------------------------------------


class Problem(Value):
    """One thing wrong: `path` is its place in the JSON (`$.steps[2].command`), `message` says what and what to do."""

    __slots__ = ()
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class DefinitionError(ValueError):
    """A definition was refused. `problems` holds what is wrong, in order of discovery; str() is one problem a line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:MAX_PROBLEMS_SHOWN]]
        hidden = len(self.problems) - len(lines)
        return "\n".join([*lines, f"... and {hidden} more"] if hidden else lines)


class Backoff(Value):
    """How long a step waits before it is tried again. Times in milliseconds, factor and jitter in thousandths."""

    __slots__ = ()
    initial_ms: int
    factor_permille: int
    max_ms: int
    jitter_permille: int

    def delay_ms(self, failures: int, draw_ppm: int) -> int:
        """The delay after the `failures`-th failure (1, 2, …), in milliseconds.

        `min(max, initial * factor ** (failures - 1))` rounded down, less a random share of at most `jitter` of it.
        `draw_ppm` is that random draw, 0 to 999,999 millionths; the caller draws and records it. Raises ValueError
        when either argument is out of range.
        """
        if failures < 1 or not 0 <= draw_ppm < 1_000_000:
            raise ValueError(f"failures {failures} must be at least 1, draw_ppm {draw_ppm} from 0 to 999999")
        base = self._full_delay_ms(failures)
        return base - base * self.jitter_permille * draw_ppm // (1000 * 1_000_000)

    def _full_delay_ms(self, failures: int) -> int:
        # An exact fraction, in lowest terms: rounding each product to whole milliseconds would keep 1 ms * 1.5 at 1 ms.
        shared = math.gcd(self.factor_permille, 1000)
        factor, divisor = self.factor_permille // shared, 1000 // shared
        if factor == divisor or self.initial_ms == 0:  # It never grows, so the loop would not end early.
            return min(self.initial_ms, self.max_ms)
        above, below = self.initial_ms, 1
        for _ in range(failures - 1):
            if above >= self.max_ms * below:
                break
            above *= factor
            below *= divisor
        return min(self.max_ms, above // below)


class Step(Value):
    """One command and when, where and how often it runs. `cwd` is absolute, or None for the workflow's."""

    __slots__ = ()
    id: str
    command: str
    depends_on: tuple[str, ...]
    retries: int
    timeout_ms: int | None
    backoff: Backoff
    env: dict[str, str]
    cwd: str | None
    grace_ms: int
    on_lost: str  # "retry" | "fail"


class Workflow(Value):
    """A checked definition. `steps` keep the user's order; `cwd` is absolute, or None for the submitter's directory."""

    __slots__ = ()
    workflow_id: str
    steps: tuple[Step, ...]
    max_parallel: int | None
    env: dict[str, str]
    cwd: str | None
    timeout_ms: int | None


_encode: Callable[[object], str] = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

# --- The four ways in and the one way out -----------------------------------------------------------------------------


def parse(text: bytes, base_dir: str) -> Workflow:
    """The workflow that JSON bytes define; a relative `cwd` starts at `base_dir`. Raises DefinitionError."""
    document, doubled, _ = _decode(text)
    # Unusable numbers need no extra report: they stay in the document as a type that no check accepts.
    return _build(document, _USER, base_dir, doubled)


def validate(document: object, base_dir: str) -> Workflow:
    """The workflow that an already decoded JSON value defines, as `parse` does. Raises DefinitionError."""
    return _build(document, _USER, base_dir, [])


def decode(text: bytes) -> object:
    """Strict JSON: UTF-8 without a mark, every key once, finite numbers of sane length. Raises DefinitionError."""
    document, doubled, numbers = _decode(text)
    if doubled or numbers:
        raise DefinitionError([*doubled, *numbers])
    return document


def from_record(record: object) -> Workflow:
    """The inverse of `to_record`. Raises DefinitionError on anything that `to_record` cannot have written."""
    return _build(record, _RECORD, "/", [])


def to_record(workflow: Workflow) -> dict[str, object]:
    """The normalised form for the log: strings, integers, lists and dicts, named as in the values; no None."""
    record: dict[str, object] = dict(zip(workflow._fields, workflow, strict=True))
    record["steps"] = [_step_record(step) for step in workflow.steps]
    record["env"] = dict(sorted(workflow.env.items()))
    return {name: value for name, value in record.items() if value is not None}


def to_json(workflow: Workflow) -> str:
    """The normalised form as one line of JSON, ASCII."""
    parts = (workflow.steps[first : first + _STEPS_AT_A_TIME] for first in range(0, len(workflow.steps), _STEPS_AT_A_TIME))
    steps = ",".join([_encode([_step_record(step) for step in part])[1:-1] for part in parts])
    record = to_record(workflow._replace(steps=()))
    texts = [f'"{name}":' + (f"[{steps}]" if name == "steps" else _encode(value)) for name, value in record.items()]
    return f"{{{','.join(texts)}}}"


def _step_record(step: Step) -> dict[str, object]:
    record: dict[str, object] = {name: value for name, value in zip(step._fields, step, strict=True) if value is not None}
    record["depends_on"] = list(step.depends_on)
    record["backoff"] = dict(zip(step.backoff._fields, step.backoff, strict=True))
    if step.env:
        record["env"] = dict(sorted(step.env.items()))
    return record


# --- Reading JSON strictly --------------------------------------------------------------------------------------------


class _UnusableNumber(Value):
    """Stands in a decoded document where a number was that no field can take."""

    __slots__ = ()
    text: str


def _decode(text: bytes) -> tuple[object, list[Problem], list[Problem]]:
    """The document, the keys given twice in it, and the unusable numbers in it. Raises DefinitionError."""
    doubled: dict[int, tuple[dict[str, object], list[str]]] = {}  # By id(); holding the dict keeps that unique.
    unusable: list[_UnusableNumber] = []

    def read_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            doubled[id(found)] = found, [name for name, count in counts.items() if count > 1]
        return found

    def refuse(number: str) -> _UnusableNumber:
        unusable.append(_UnusableNumber(number))
        return unusable[-1]

    def read_int(digits: str) -> int | _UnusableNumber:
        return int(digits) if len(digits) <= MAX_DIGITS else refuse(digits)

    def read_float(digits: str) -> float | _UnusableNumber:
        return number if math.isfinite(number := float(digits)) else refuse(digits)

    try:
        document = json.loads(
            _unicode(text),
            object_pairs_hook=read_object,
            parse_int=read_int,
            parse_float=read_float,
            parse_constant=refuse,
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # Some of the parser's messages end in it, some do not.
        raise _refusal(f"is not JSON: {what} at line {error.lineno}, column {error.colno}", "$") from None
    except RecursionError:
        raise _refusal("is nested too deeply; a definition needs four levels", "$") from None
    if not doubled and not unusable:
        return document, [], []
    return document, *_locate(document, {key: names for key, (_, names) in doubled.items()})


def _unicode(text: bytes) -> str:
    if len(text) > MAX_DEFINITION_BYTES:
        raise _refusal(f"is {len(text)} bytes long; at most {MAX_DEFINITION_BYTES} are allowed", "$")
    if text.startswith(b"\xef\xbb\xbf"):
        raise _refusal("starts with a byte order mark; save it as UTF-8 without one", "$")
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in text[:4]:
        raise _refusal("looks like UTF-16 or UTF-32; save it as UTF-8", "$")
    if not text.strip():
        raise _refusal("is empty; a definition is a JSON object", "$")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(f"is not UTF-8 text: byte {error.start} is 0x{text[error.start]:02x}", "$") from None


def _locate(document: object, doubled: dict[int, list[str]]) -> tuple[list[Problem], list[Problem]]:
    """Where in the document the keys given twice are, and the unusable numbers. Walks with a stack of its own."""
    keys: list[Problem] = []
    numbers: list[Problem] = []
    stack: list[tuple[str, object]] = [("$", document)]
    while stack and len(keys) + len(numbers) < MAX_PROBLEMS:
        path, value = stack.pop()
        if type(value) is _UnusableNumber:
            numbers.append(Problem(path, f"{_describe(value)} is not a usable number"))
        elif type(value) is dict:
            for name in doubled.get(id(value), ()):
                keys.append(Problem(path + _key(name), "is given more than once in this object; keep one"))
            stack.extend((path + _key(name), value[name]) for name in reversed(value))
        elif type(value) is list:
            stack.extend((f"{path}[{index}]", value[index]) for index in reversed(range(len(value))))
    return keys, numbers


# --- From a decoded document to a Workflow ----------------------------------------------------------------------------

# Takes a JSON value; returns what `Step` and the like hold, or raises DefinitionError with paths relative to the value.
_Check = Callable[[object], "Any"]


class _Shape(Value):
    """What one kind of object may hold: name in the JSON -> (name of the field, check)."""

    __slots__ = ()
    noun: str
    fields: dict[str, tuple[str, _Check]]
    required: frozenset[str]  # Names of fields.


class _Form(Value):
    """One of the two forms of a definition: the user's and the record's."""

    __slots__ = ()
    workflow: _Shape
    step: _Shape


def _build(document: object, form: _Form, base_dir: str, problems: list[Problem]) -> Workflow:
    try:
        home = _base_directory(base_dir)
    except DefinitionError as error:
        problems.extend(_under("base_dir", error.problems))
        home = "/"
    fields, flaws = _read(document, form.workflow)
    problems.extend(_under("$", flaws))
    if "cwd" in fields:
        try:
            home = fields["cwd"] = _resolve(fields["cwd"], home)
        except DefinitionError as error:
            problems.extend(_under("$", error.problems))
    documents = fields.get("steps", [])
    steps = _build_steps(documents, form.step, home, problems)
    if len(steps) == len(documents):
        problems.extend(_graph_problems([step.id for step in steps], [step.depends_on for step in steps]))
    elif len(problems) < MAX_PROBLEMS:
        problems.extend(_graph_problems(*_loose_graph(documents)))
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [Problem("$", f"has more problems than these {MAX_PROBLEMS}; the rest is not listed")]
    if problems:
        raise DefinitionError(problems)
    fields["steps"] = tuple(steps)
    return Workflow._from({"max_parallel": None, "env": {}, "cwd": None, "timeout_ms": None, **fields})


def _build_steps(documents: list[object], shape: _Shape, home: str, problems: list[Problem]) -> list[Step]:
    """The steps that are well-formed in themselves. What is wrong with the others is added to `problems`."""
    defaults = _STEP_DEFAULTS
    steps: list[Step] = []
    for index, document in enumerate(documents):
        fields, flaws = _read(document, shape)
        if not flaws:
            try:
                if "cwd" in fields:
                    fields["cwd"] = _resolve(fields["cwd"], home)
                fields.setdefault("env", {})  # Not among the defaults: all steps would share one dict.
                steps.append(Step._from({**defaults, **fields}))
                continue
            except DefinitionError as error:
                flaws = error.problems
        problems.extend(_under(f"$.steps[{index}]", flaws))
        if len(problems) > MAX_PROBLEMS:
            break
    return steps


def _read(document: object, shape: _Shape) -> tuple[dict[str, Any], Sequence[Problem]]:
    """The object's fields under their names in Step and the like, converted, and what is wrong with the others."""
    known = shape.fields
    if type(document) is dict:
        fields = {}
        try:
            for name, value in document.items():
                field, check = known[name]
                fields[field] = check(value)
            if fields.keys() >= shape.required:
                return fields, ()
        except (DefinitionError, KeyError):
            pass
    return _read_slowly(document, shape)


def _read_slowly(document: object, shape: _Shape) -> tuple[dict[str, Any], Sequence[Problem]]:
    """As `_read`, for an object of which something is known to be wrong: goes on after each problem."""
    if type(document) is not dict:
        return {}, [Problem("", f"must be an object, not {_describe(document)}")]
    problems = _unknown_fields([name for name in document if name not in shape.fields], shape)
    fields: dict[str, Any] = {}
    for name, (field, check) in shape.fields.items():
        if name not in document:
            if field in shape.required:
                problems.append(Problem(_key(name), f"is missing; {shape.noun} needs it"))
        elif document[name] is None and field not in shape.required:
            problems.append(Problem(_key(name), "must not be null; leave it out"))
        else:
            try:
                fields[field] = check(document[name])
            except DefinitionError as error:
                problems.extend(_under(_key(name), error.problems))
    return fields, problems


def _unknown_fields(names: list[object], shape: _Shape) -> list[Problem]:
    problems = []
    for name in names[:MAX_UNKNOWN_FIELDS]:
        guess = _closest(name, shape.fields) if type(name) is str else None
        hint = f"did you mean {_quote(guess)}?" if guess else f"{shape.noun} has {', '.join(shape.fields)}"
        problems.append(Problem(_key(name), f"unknown field; {hint}"))
    if len(names) > MAX_UNKNOWN_FIELDS:
        problems.append(Problem("", f"has {len(names) - MAX_UNKNOWN_FIELDS} more unknown fields"))
    return problems


# --- Values -----------------------------------------------------------------------------------------------------------

# What no terminal or file system should be asked to show: controls, line and paragraph separators, characters that turn
# the direction of the text around them, and lone surrogates, which no encoding can write. None of these is printable,
# and str.isprintable is far faster than a search. `re` compiles these when they are first needed: start-up time counts.
_NOT_IN_NAME = "[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
_NOT_IN_COMMAND = "[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
_NOT_IN_ENV_VALUE = "[\0\ud800-\udfff]"
# Spaces, joiners, marks and the like: an id made of these alone would look empty.
_INVISIBLE = "[\\s\u00ad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b-\u200f\u2060-\u2064\u3164\ufe00-\ufe0f\ufeff]*"
_WORD = re.compile("[A-Za-z_][A-Za-z0-9_]*")
_RESERVED_ENV_PREFIX = "WFD_"  # The daemon tells every attempt who it is in variables of this name.


def _text(value: object, forbidden: str, hint: str = "") -> str:
    if type(value) is not str:
        raise _refusal(f"must be a string, not {_describe(value)}{hint}")
    if not value.isprintable() and (found := re.search(forbidden, value)):
        kind = "a lone surrogate" if "\ud800" <= found[0] <= "\udfff" else "the control character"
        raise _refusal(f"contains {kind} U+{ord(found[0]):04X} at character {found.start() + 1}; take it out")
    return value


def _id(value: object) -> str:
    # Of all white space only U+0020 is printable, so this sees leading and trailing space too.
    if (
        type(value) is str
        and 0 < len(value) <= MAX_ID_CHARS
        and value.isprintable()
        and value[0] not in " -"
        and value[-1] != " "
    ):
        return value
    text = _text(value, _NOT_IN_NAME)
    if re.fullmatch(_INVISIBLE, text):
        raise _refusal("must not be empty or blank")
    if text != text.strip():
        raise _refusal(f"must not begin or end with a space, as {_quote(text)} does")
    if text.startswith("-"):
        raise _refusal(f"must not begin with -, as {_quote(text)} does; a command line would take it for an option")
    if len(text) > MAX_ID_CHARS:
        raise _refusal(f"is {len(text)} characters long; at most {MAX_ID_CHARS} are allowed")
    return text


def _command(value: object) -> str:
    text = _text(value, _NOT_IN_COMMAND)
    if not text or text.isspace():
        raise _refusal("must not be empty or blank; write `true` for a step that does nothing")
    if len(text) * 4 > MAX_COMMAND_BYTES and (size := len(text.encode())) > MAX_COMMAND_BYTES:
        raise _refusal(f"is {size} bytes long; at most {MAX_COMMAND_BYTES} are allowed; put it into a script")
    return text


def _depends_on(value: object) -> tuple[str, ...]:
    if type(value) is not list:
        raise _refusal(f"must be a list of step ids, not {_describe(value)}")
    if not value:
        return ()
    if set(map(type, value)) <= {str} and len(set(value)) == len(value):
        return tuple(value)
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for index, name in enumerate(value):
        if type(name) is not str:
            problems.append(Problem(f"[{index}]", f"must be a string, the id of a step, not {_describe(name)}"))
        elif first.setdefault(name, index) != index:
            problems.append(Problem(f"[{index}]", f"repeats {_quote(name)} of [{first[name]}]; take it out"))
        if len(problems) > MAX_PROBLEMS:
            break
    raise DefinitionError(problems)


def _env(value: object) -> dict[str, str]:
    if type(value) is not dict:
        raise _refusal(f"must be an object of names and strings, not {_describe(value)}")
    if not value:
        return {}
    if len(value) > MAX_ENV_NAMES:
        raise _refusal(f"has {len(value)} names; at most {MAX_ENV_NAMES} are allowed")
    problems: list[Problem] = []
    for name, content in value.items():
        try:
            _env_entry(name, content)
        except DefinitionError as error:
            problems.extend(_under(_key(name), error.problems))
    if problems:
        raise DefinitionError(problems)
    return dict(value)


def _env_entry(name: object, value: object) -> None:
    if type(name) is not str or not _WORD.fullmatch(name):
        raise _refusal("is no name for a variable; use letters, digits and _, and no digit first")
    if name.startswith(_RESERVED_ENV_PREFIX):
        raise _refusal(f"is reserved; names that begin with {_RESERVED_ENV_PREFIX} are set by wfd")
    text = _text(value, _NOT_IN_ENV_VALUE, "; put it in quotes")
    size = len(name) + 1 + len(text.encode())
    if size > MAX_ENV_ENTRY_BYTES:
        raise _refusal(f"is {size} bytes long with its name; at most {MAX_ENV_ENTRY_BYTES} are allowed")


def _directory(value: object) -> str:
    text = _text(value, _NOT_IN_NAME)
    if not text or text.isspace():
        raise _refusal('must not be empty or blank; leave it out, or write "."')
    if text.startswith("~"):
        raise _refusal(f"must not begin with ~, as {_quote(text)} does; ~ is not expanded, write the path out")
    if (size := len(text.encode())) > MAX_PATH_BYTES:
        raise _refusal(f"is {size} bytes long; at most {MAX_PATH_BYTES} are allowed")
    return text


def _absolute(value: object) -> str:
    text = _directory(value)
    if not text.startswith("/"):
        raise _refusal(f"must be an absolute path, not {_quote(text)}")
    return text


def _base_directory(value: object) -> str:
    """Where relative directories start. Its name is the system's, not the user's text: bytes that are no UTF-8 come as the
    surrogates of PEP 383, which does no harm as long as no `cwd` starts there."""
    if type(value) is not str or not value.startswith("/") or "\0" in value:
        raise _refusal(f"must be an absolute path, not {_describe(value)}")
    if (size := len(value.encode("utf-8", "surrogatepass"))) > MAX_PATH_BYTES:
        raise _refusal(f"is {size} bytes long; at most {MAX_PATH_BYTES} are allowed")
    return value


def _resolve(cwd: str, home: str) -> str:
    """The directory `cwd` seen from `home`, by joining the texts alone: no file is looked at."""
    if not cwd.startswith("/") and re.search("[\ud800-\udfff]", home):
        raise _refusal("starts at a directory whose name is not UTF-8; write an absolute path", ".cwd")
    if cwd == ".":
        return home
    path = cwd if cwd.startswith("/") else f"{home.removesuffix('/')}/{cwd}"
    if (size := len(path.encode())) > MAX_PATH_BYTES:
        limits = f"is {size} bytes long with the directory it starts from"
        raise _refusal(f"{limits}; at most {MAX_PATH_BYTES} are allowed", ".cwd")
    return path


def _on_lost(value: object) -> str:
    if type(value) is str and value in ("retry", "fail"):
        return value
    raise _refusal(f'must be "retry" or "fail", not {_describe(value)}')


def _step_list(value: object) -> list[object]:
    if type(value) is not list:
        raise _refusal(f"must be a list of steps, not {_describe(value)}")
    if not value:
        raise _refusal("must not be empty; a workflow has at least one step")
    if len(value) > MAX_STEPS:
        raise _refusal(f"has {len(value)} steps; at most {MAX_STEPS} are allowed")
    return value


def _whole(least: int, most: int) -> _Check:
    """A check for a whole number in a range."""

    def check(value: object) -> int:
        if type(value) is int and least <= value <= most:
            return value
        raise _refusal(f"must be a whole number from {least} to {most}, not {_describe(value)}")

    return check


def _thousandths(noun: str, least: int, most: int) -> _Check:
    """A check for a number in a range, with or without a fraction, that becomes whole thousandths."""

    def check(value: object) -> int:
        if (type(value) is int or type(value) is float) and least <= value <= most:  # NaN is in no range.
            return _to_thousandths(value)
        raise _refusal(f"must be {noun} from {least} to {most}, not {_describe(value)}")

    return check


def _timeout(value: object) -> int:
    if (type(value) is int or type(value) is float) and 0 < value <= MAX_DURATION_SEC:
        return _to_thousandths(value)
    limits = f"above 0 and at most {MAX_DURATION_SEC}"
    raise _refusal(f"must be a number of seconds {limits}, not {_describe(value)}; leave it out for no limit")


def _to_thousandths(value: float) -> int:
    # The inner round takes away what the product of binary fractions adds: 0.5005 * 1000 is 500.4999…. Halves go up,
    # and what was above zero stays above it.
    return max(math.floor(round(value * 1000, 6) + 0.5), 1 if value > 0 else 0)


def _backoff(shape: _Shape) -> _Check:
    """A check for a back-off in the given form."""

    def check(value: object) -> Backoff:
        if type(value) is dict:
            try:
                return known(tuple(value), *value.values())
            except TypeError:
                pass  # Something in it has no hash, so it is no number.
        return read(value)

    # Most steps of a workflow have the same, and in a log all have one: it is half of what reading a step's record costs.
    # `typed`, since True is no 1 here.
    @lru_cache(_BACKOFFS_KEPT, typed=True)
    def known(names: tuple[str, ...], *values: object) -> Backoff:
        return read(dict(zip(names, values, strict=True)))

    def read(value: object) -> Backoff:
        fields, flaws = _read(value, shape)
        if flaws:
            raise DefinitionError(flaws)
        backoff = Backoff._from({**_BACKOFF_DEFAULTS, **fields})
        if backoff.max_ms < backoff.initial_ms:
            limits = f"the longest delay ({backoff.max_ms} ms) is below the first ({backoff.initial_ms} ms)"
            raise _refusal(f"{limits}; {'lower the first' if 'max_ms' in fields else 'give max_sec too'}")
        return backoff

    return check


# --- The two forms ----------------------------------------------------------------------------------------------------

_BACKOFF_DEFAULTS = {"initial_ms": 1_000, "factor_permille": 2_000, "max_ms": 60_000, "jitter_permille": 0}
_STEP_DEFAULTS = {
    "depends_on": (),
    "retries": 0,
    "timeout_ms": None,
    "backoff": Backoff(**_BACKOFF_DEFAULTS),
    "cwd": None,
    "grace_ms": 10_000,
    "on_lost": "retry",
}

_SECONDS = "a number of seconds"
_USER_BACKOFF = _Shape(
    "a backoff",
    {
        "initial_sec": ("initial_ms", _thousandths(_SECONDS, 0, MAX_DURATION_SEC)),
        "factor": ("factor_permille", _thousandths("a number", 1, MAX_FACTOR)),
        "max_sec": ("max_ms", _thousandths(_SECONDS, 0, MAX_DURATION_SEC)),
        "jitter": ("jitter_permille", _thousandths("a number", 0, 1)),
    },
    frozenset(),
)
_USER = _Form(
    _Shape(
        "a workflow",
        {
            "workflow_id": ("workflow_id", _id),
            "steps": ("steps", _step_list),
            "max_parallel": ("max_parallel", _whole(1, MAX_STEPS)),
            "env": ("env", _env),
            "cwd": ("cwd", _directory),
            "timeout_sec": ("timeout_ms", _timeout),
        },
        frozenset({"workflow_id", "steps"}),
    ),
    _Shape(
        "a step",
        {
            "id": ("id", _id),
            "command": ("command", _command),
            "depends_on": ("depends_on", _depends_on),
            "retries": ("retries", _whole(0, MAX_RETRIES)),
            "timeout_sec": ("timeout_ms", _timeout),
            "backoff": ("backoff", _backoff(_USER_BACKOFF)),
            "env": ("env", _env),
            "cwd": ("cwd", _directory),
            "grace_sec": ("grace_ms", _thousandths(_SECONDS, 0, MAX_GRACE_SEC)),
            "on_lost": ("on_lost", _on_lost),
        },
        frozenset({"id", "command"}),
    ),
)

_RECORD_BACKOFF = _Shape(
    "a backoff",
    {
        "initial_ms": ("initial_ms", _whole(0, MAX_DURATION_SEC * 1000)),
        "factor_permille": ("factor_permille", _whole(1000, MAX_FACTOR * 1000)),
        "max_ms": ("max_ms", _whole(0, MAX_DURATION_SEC * 1000)),
        "jitter_permille": ("jitter_permille", _whole(0, 1000)),
    },
    frozenset(_BACKOFF_DEFAULTS),
)
_RECORD = _Form(
    _Shape(
        "a workflow's record",
        {
            "workflow_id": ("workflow_id", _id),
            "steps": ("steps", _step_list),
            "max_parallel": ("max_parallel", _whole(1, MAX_STEPS)),
            "env": ("env", _env),
            "cwd": ("cwd", _absolute),
            "timeout_ms": ("timeout_ms", _whole(1, MAX_DURATION_SEC * 1000)),
        },
        frozenset({"workflow_id", "steps", "env"}),
    ),
    _Shape(
        "a step's record",
        {
            "id": ("id", _id),
            "command": ("command", _command),
            "depends_on": ("depends_on", _depends_on),
            "retries": ("retries", _whole(0, MAX_RETRIES)),
            "timeout_ms": ("timeout_ms", _whole(1, MAX_DURATION_SEC * 1000)),
            "backoff": ("backoff", _backoff(_RECORD_BACKOFF)),
            "env": ("env", _env),
            "cwd": ("cwd", _absolute),
            "grace_ms": ("grace_ms", _whole(0, MAX_GRACE_SEC * 1000)),
            "on_lost": ("on_lost", _on_lost),
        },
        frozenset({"id", "command", "depends_on", "retries", "backoff", "env", "grace_ms", "on_lost"}),
    ),
)


# --- The graph --------------------------------------------------------------------------------------------------------

# Both sequences go by the step's place in the definition. Where a step is malformed its id may be None and its
# dependencies may hold anything; what can be said about the rest is said.
_Ids = Sequence[str | None]
_Dependencies = Sequence[Sequence[object]]


def _loose_graph(documents: list[object]) -> tuple[list[str | None], list[list[object]]]:
    """As much of the graph as malformed steps show, so that its problems are reported together with theirs."""
    objects = [document if type(document) is dict else {} for document in documents]
    ids = [step.get("id") for step in objects]
    names = [step.get("depends_on") for step in objects]
    return [id if type(id) is str else None for id in ids], [list if type(list) is type([]) else [] for list in names]


def _graph_problems(ids: _Ids, depends_on: _Dependencies) -> list[Problem]:
    """Doubled ids, and unknown, self-referring and circular dependencies."""
    problems = list(islice(_doubled_ids(ids), MAX_PROBLEMS))
    if _in_order(ids, depends_on):
        return problems
    problems.extend(islice(_unmet_dependencies(ids, depends_on), MAX_PROBLEMS))
    problems.extend(_cycles(ids, depends_on))
    return problems


def _doubled_ids(ids: _Ids) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, id in enumerate(ids):
        if id is None:
            continue
        earlier = first.setdefault(id.lower() if id.isascii() else _fold(id), index)
        if earlier != index:
            other = ids[earlier]
            as_other = "" if other == id else f", but for case or Unicode form ({_quote(other or '')}),"
            message = f"{_quote(id)} is taken{as_other} by $.steps[{earlier}]; rename one"
            yield Problem(f"$.steps[{index}].id", message)


def _fold(id: str) -> str:
    """What two ids have in common that differ only in case or in the way their characters are composed."""
    from unicodedata import normalize  # Slow to load, and most definitions are ASCII.

    return normalize("NFC", normalize("NFD", id).casefold())


def _in_order(ids: _Ids, depends_on: _Dependencies) -> bool:
    """Whether each step depends on earlier ones only, as in most files.

    Then all dependencies are known and there is no cycle, at a fraction of the cost of a topological sort.
    """
    earlier: set[str | None] = set()
    for id, names in zip(ids, depends_on, strict=True):
        try:
            if names and not earlier.issuperset(names):
                return False
        except TypeError:  # An unhashable value in a malformed list.
            return False
        earlier.add(id)
    return True


def _unmet_dependencies(ids: _Ids, depends_on: _Dependencies) -> Iterator[Problem]:
    known = {id for id in ids if id is not None}
    closest = _closest_of_many(known)
    for index, names in enumerate(depends_on):
        for position, name in enumerate(names):
            itself = name == ids[index]
            if type(name) is not str or (name in known and not itself):
                continue
            path = f"$.steps[{index}].depends_on[{position}]"
            if itself:
                yield Problem(path, f"{_quote(name)} depends on itself; take it out")
            else:
                guess = closest(name)
                hint = f"did you mean {_quote(guess)}?" if guess else "add that step or take this out"
                yield Problem(path, f"no step has the id {_quote(name)}; {hint}")


def _cycles(ids: _Ids, depends_on: _Dependencies) -> list[Problem]:
    """The cycles of the graph, none of which share a step. Steps that depend on themselves are left to the caller."""
    import graphlib  # As below: most definitions are in order, and whoever reads a log reads one that is.

    place = {id: index for index, id in enumerate(ids) if id is not None}
    graph = {
        id: [name for name in depends_on[index] if type(name) is str and name in place and name != id]
        for id, index in place.items()
    }
    problems: list[Problem] = []
    while len(problems) < MAX_CYCLES:
        try:
            graphlib.TopologicalSorter(graph).prepare()
            break
        except graphlib.CycleError as error:
            cycle: list[str] = error.args[1][:-1]  # Its last is its first again.
        start = min(range(len(cycle)), key=lambda index: place[cycle[index]])
        cycle = cycle[start:] + cycle[:start]
        index = place[cycle[0]]
        position = depends_on[index].index(cycle[-1])
        problems.append(Problem(f"$.steps[{index}].depends_on[{position}]", _cycle_text(cycle)))
        gone = set(cycle)
        graph = {id: names for id, names in graph.items() if id not in gone}  # Names without an entry are mere leaves.
    return problems


def _cycle_text(cycle: list[str]) -> str:
    """The cycle in words. An arrow reads "runs before": each step is a dependency of the next."""
    shown = [_plain(id) for id in [*cycle, cycle[0]]]
    if len(shown) > MAX_CYCLE_SHOWN:
        half = MAX_CYCLE_SHOWN // 2
        shown[half:-half] = [f"({len(shown) - 2 * half} more)"]
    return f"closes a cycle, each step before the next: {' → '.join(shown)}; take one of these dependencies out"


# --- Did you mean, and quoting ----------------------------------------------------------------------------------------


def _closest(name: str, names: Iterable[str]) -> str | None:
    from difflib import get_close_matches  # Only a bad definition needs it, and start-up time counts.

    if len(name) > MAX_ID_CHARS:  # difflib takes quadratic time.
        return None
    folded = {name.casefold(): name for name in names if len(name) <= MAX_ID_CHARS}
    found = get_close_matches(name.casefold(), folded, n=1)
    return folded[found[0]] if found else None


def _closest_of_many(ids: Collection[str]) -> Callable[[str], str | None]:
    """A function that finds the id nearest to a name, or None, in bounded time however many ids there are.

    One slip leaves the text before it and the text after it whole. So the id that was meant lies close by when all are
    sorted by their beginnings, or when all are sorted by their ends. After MAX_GUESSES names it answers None.
    """
    forward: list[str] = []
    backward: list[str] = []
    guesses = 0

    def closest(name: str) -> str | None:
        nonlocal guesses
        guesses += 1
        if guesses > MAX_GUESSES:
            return None
        if not forward:
            forward.extend(sorted(ids))
            backward.extend(sorted(id[::-1] for id in ids))
        near = _window(forward, name) + [text[::-1] for text in _window(backward, name[::-1])]
        return _closest(name, near)

    return closest


def _window(ordered: list[str], text: str) -> list[str]:
    from bisect import bisect_left  # Only a bad definition needs it, and start-up time counts.

    middle = bisect_left(ordered, text)
    return ordered[max(0, middle - GUESS_WINDOW) : middle + GUESS_WINDOW]


def _refusal(message: str, path: str = "") -> DefinitionError:
    return DefinitionError([Problem(path, message)])


def _under(path: str, problems: Sequence[Problem]) -> list[Problem]:
    """Problems of a part as problems of the whole."""
    return [Problem(path + problem.path, problem.message) for problem in problems]


def _key(name: object) -> str:
    """One field as a part of a JSON path."""
    if type(name) is str and _WORD.fullmatch(name) and len(name) <= MAX_QUOTED_CHARS:
        return f".{name}"
    return f"[{_describe(name)}]"


def _describe(value: object) -> str:
    """A JSON value in the words of a message, and never long."""
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if type(value) is str:
        return _quote(value)
    if type(value) is list or type(value) is dict:
        return "a list" if type(value) is list else "an object"
    if type(value) is int:
        return str(value) if value.bit_length() <= 64 else "a number of many digits"
    if type(value) is float:
        return repr(value) if math.isfinite(value) else str(json.dumps(value))
    if type(value) is _UnusableNumber:
        return value.text if len(value.text) <= MAX_DIGITS else "a number of many digits"
    return f"a Python {type(value).__name__}"


def _quote(text: str) -> str:
    """A user's text within a message, in double quotes."""
    plain = _plain(text)
    return f'"{plain}"'


def _plain(text: str) -> str:
    """A user's text so that any terminal can show it: cut to length, and escaped as in JSON if need be."""
    shown = text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "…"
    return shown if shown.isprintable() else json.dumps(shown)[1:-1]
