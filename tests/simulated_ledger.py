"""What is checked of every simulated history: one run's durable bytes against the rules, and against the world's record.

A ledger reads nothing of the engine's state and uses none of its code. It takes each line in the instant in which the
disk has it for good, and asks at once:
  * is the line whole, is it the next, and are all earlier ones still what they were?
  * could it lawfully follow (dependencies, budgets, back-offs, limits, a cancel, the end)?
  * is it true of the world (what ended, how, and is nothing of it alive)?
So no later repair can hide an answer that was wrong for a moment.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

from tests.simulated_kernel import Attempt, Broken, Kernel

MAX_LOSSES = 3
_parse = json.JSONDecoder().raw_decode
_OVER = frozenset({"SUCCEEDED", "FAILED", "CANCELLED"})
_BLOCKED = frozenset({"FAILED", "SKIPPED"})
_END_OF_STEP = frozenset({"SUCCEEDED", "FAILED", "SKIPPED", "CANCELLED"})


@dataclass(slots=True)
class StepNotes:
    """What the lines have said of one step."""

    definition: dict[str, Any]
    state: str = "PENDING"
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    started_ms: int = 0
    started_boot: str = ""
    ready_ms: int = 0
    delay_ms: int = 0
    is_timed_out: bool = False
    timed_out_ms: int = 0
    outcome: dict[str, Any] | None = None


class Ledger:
    """One run, as its durable lines tell it."""

    def __init__(self, run_id: str, kernel: Kernel) -> None:
        self.run_id = run_id
        self.kernel = kernel
        self.data = b""
        self.lines: list[bytes] = []
        self.state = ""
        self.is_timed_out = False
        self.stop_ms = 0
        self.is_damaged = self.is_quarantined = False
        self.boot = ""
        self.requests: list[str] = []
        self.steps: dict[str, StepNotes] = {}
        self.definition: dict[str, Any] = {}
        # After each line: the state of the run, and of the step that the line is about.
        self.trail: list[tuple[str, str]] = []
        self._seed = zlib.crc32(run_id.encode())
        self._promised = 0
        self._mono_ms = 0
        self._is_recovering = False

    @property
    def is_over(self) -> bool:
        """Is the run?"""
        return self.state in _OVER

    def extend(self, data: bytes) -> None:
        """The whole log as it is on the medium now."""
        if not data.startswith(self.data):
            self._fail(len(self.lines), "lines that had been durable are gone or changed")
        new = data[len(self.data) :]
        if not new:
            return
        if not new.endswith(b"\n"):
            self._fail(len(self.lines) + 1, "half a line was made durable and taken for whole")
        self._promised = len(self.lines)
        for raw in new[:-1].split(b"\n"):
            self._take(raw)
        self.data = data

    def _fail(self, seq: int, why: str) -> None:
        raise Broken(f"run {self.run_id}, line {seq}: {why}")

    def _take(self, raw: bytes) -> None:
        seq = len(self.lines) + 1
        if raw[-10:] != b'%08x"}' % zlib.crc32(raw[:-10], self._seed):
            self._fail(seq, f"the checksum of {raw!r} is wrong")
        record = _parse(raw.decode("ascii"))[0]
        if record["seq"] != seq:
            self._fail(seq, f"it says seq {record['seq']}")
        if record["durable"] > self._promised:
            self._fail(seq, f"it says that {record['durable']} lines were durable, of {self._promised}")
        self.lines.append(raw)
        if self.kernel.trace is not None:
            self.kernel.note(f"durable {self.run_id} {_shown(record)}")
        if self.is_over and record["event"] not in ("run_retried", "log_recovered"):
            self._fail(seq, f"{record['event']} after the end")
        problem = getattr(self, "_on_" + record["event"])(record)
        if problem:
            self._fail(seq, f"{_shown(record)}: {problem}")
        self._check_clock(record)
        self.trail.append((self.state, self.steps[record["step"]].state if "step" in record else ""))

    def _check_clock(self, record: dict[str, Any]) -> None:
        event, mono_ms = record["event"], record["mono_ms"]
        if event == "supervisor_started":
            self._is_recovering = False
        elif event in ("log_recovered", "run_retried"):
            # Written by a new daemon, perhaps after a reboot; its supervisor_started, which says so, comes behind.
            self._is_recovering = True
        if self._is_recovering:
            return
        if self.boot == self.kernel.boot_id and mono_ms > self.kernel.monotonic_ms():
            self._fail(len(self.lines), "its mono_ms lies in the future")
        if mono_ms < self._mono_ms and event != "supervisor_started":
            self._fail(len(self.lines), "its mono_ms goes back within a boot")
        self._mono_ms = mono_ms

    # -- the run --------------------------------------------------------------------------------------------------

    def _on_run_submitted(self, record: dict[str, Any]) -> str | None:
        self.definition, self.state, self.boot = record["workflow"], "RUNNING", record["boot_id"]
        self.steps = {step["id"]: StepNotes(step) for step in self.definition["steps"]}
        return None if len(self.lines) == 1 and record["run_id"] == self.run_id else "not line 1 of this run"

    def _on_run_cancel_requested(self, record: dict[str, Any]) -> str | None:
        if self.state != "RUNNING":
            return f"the run is {self.state}"
        self.stop_ms = self.stop_ms if self.is_timed_out else record["mono_ms"]
        self.state = "CANCELLING"
        return self._note_request(record)

    def _note_request(self, record: dict[str, Any]) -> str | None:
        if record["request"] in self.requests:
            return "the same request was carried out twice"
        self.requests.append(record["request"])
        return None

    def _on_run_retried(self, record: dict[str, Any]) -> str | None:
        if self.state not in ("FAILED", "CANCELLED"):
            return f"the run is {self.state}"
        self.state, self.is_timed_out = "RUNNING", False
        for step in self.steps.values():
            if step.state != "SUCCEEDED":
                step.state, step.failures, step.losses, step.outcome = "PENDING", 0, 0, None
        return self._note_request(record)

    def _on_run_timed_out(self, record: dict[str, Any]) -> str | None:
        if self.state != "RUNNING" or self.is_timed_out or "timeout_ms" not in self.definition:
            return "the run cannot time out now"
        self.is_timed_out, self.stop_ms = True, record["mono_ms"]
        return None

    def _on_supervisor_started(self, record: dict[str, Any]) -> str | None:
        if record["boot_id"] != self.boot:
            self.boot = record["boot_id"]
            for step in self.steps.values():
                step.ready_ms = record["mono_ms"] + step.delay_ms
        return None

    def _on_log_recovered(self, record: dict[str, Any]) -> str | None:
        return None

    def _on_run_finished(self, record: dict[str, Any]) -> str | None:
        open_steps = [id for id, step in self.steps.items() if step.state not in _END_OF_STEP]
        if open_steps:
            return f"steps {open_steps} are not over"
        states = {step.state for step in self.steps.values()}
        expected = "FAILED" if self.is_timed_out or "FAILED" in states else "SUCCEEDED"
        if self.state == "CANCELLING":
            expected = "CANCELLED"
        self.state = record["state"]
        if self.state != expected:
            return f"it should be {expected}"
        return self._check_skips() if expected in ("FAILED", "SUCCEEDED") and not self.is_timed_out else None

    def _check_skips(self) -> str | None:
        for id, step in self.steps.items():
            is_blocked = any(self.steps[name].state in _BLOCKED for name in step.definition["depends_on"])
            if is_blocked != (step.state == "SKIPPED"):
                return f"step {id} is {step.state}, with blocked dependencies: {is_blocked}"
        return None

    @property
    def is_stopping(self) -> bool:
        return self.is_timed_out or self.state != "RUNNING"

    # -- steps ----------------------------------------------------------------------------------------------------

    def _on_step_ready(self, record: dict[str, Any]) -> str | None:
        step = self.steps[record["step"]]
        if step.state != "PENDING" or self.is_stopping or not self._has_all_dependencies(step):
            return f"the step is {step.state}, or its dependencies are not met, or the run is being ended"
        step.state, step.ready_ms, step.delay_ms = "READY", record["mono_ms"], 0
        return None

    def _has_all_dependencies(self, step: StepNotes) -> bool:
        return all(self.steps[name].state == "SUCCEEDED" for name in step.definition["depends_on"])

    def _on_step_started(self, record: dict[str, Any]) -> str | None:
        step = self.steps[record["step"]]
        if step.state != "READY":
            return f"the step is {step.state}"
        if self.is_stopping:
            return "the run is being ended"
        if not self._has_all_dependencies(step):
            return "its dependencies are not met"
        if record["attempt"] != step.attempt + 1:
            return f"the attempt before was {step.attempt}"
        if record["mono_ms"] < step.ready_ms:
            return f"the back-off ends at {step.ready_ms}"
        running = sum(other.state == "RUNNING" for other in self.steps.values())
        if running >= self.definition.get("max_parallel", 1000):
            return f"{running} steps are running already"
        step.state, step.attempt, step.outcome, step.is_timed_out = "RUNNING", record["attempt"], None, False
        step.started_ms, step.started_boot, step.delay_ms = record["mono_ms"], self.boot, 0
        if (self.run_id, record["step"], record["attempt"]) in self.kernel.attempts:
            return "the attempt was spawned before this line was durable"
        return None

    def _on_attempt_timed_out(self, record: dict[str, Any]) -> str | None:
        step, problem = self._attempt_problem(record)
        if problem:
            return problem
        timeout_ms = step.definition.get("timeout_ms")
        if timeout_ms is None or step.is_timed_out or step.outcome is not None or self.is_stopping:
            return "it cannot time out now"
        if step.started_boot == self.boot and record["mono_ms"] < step.started_ms + timeout_ms:
            return f"it started at {step.started_ms} and has {timeout_ms} ms"
        step.is_timed_out, step.timed_out_ms = True, record["mono_ms"]
        return None

    def _attempt_problem(self, record: dict[str, Any]) -> tuple[StepNotes, str | None]:
        step = self.steps[record["step"]]
        if step.state != "RUNNING" or step.attempt != record["attempt"]:
            return step, f"the step is {step.state}, attempt {step.attempt}"
        return step, None if step.outcome is None else "the attempt had ended"

    def _end_problem(self, record: dict[str, Any]) -> tuple[Attempt | None, str | None]:
        step, problem = self._attempt_problem(record)
        step.outcome = record
        attempt = self.kernel.attempts.get((self.run_id, record["step"], record["attempt"]))
        if attempt is not None and attempt.is_alive:
            living = [f"{process.role} {process.pid}" for process in attempt.processes if not process.is_zombie]
            return attempt, problem or f"alive: {living}"
        return attempt, problem

    def _on_attempt_exited(self, record: dict[str, Any]) -> str | None:
        attempt, problem = self._end_problem(record)
        if problem:
            return problem
        if attempt is None or not attempt.has_begun:
            return None if self._may_be_unknown(record) else "its command never ran"
        code = record.get("exit_code")
        if code is None:
            if attempt.is_recorded and f"boot-{attempt.boot}" == self.boot:
                return f"the world knows that it exited {attempt.code}"
            return None if self._may_be_unknown(record) else "nobody had ended it"
        return None if attempt.is_recorded and attempt.code == code else f"in truth {attempt}"

    def _may_be_unknown(self, record: dict[str, Any]) -> bool:
        return "exit_code" not in record and (self.is_stopping or self.steps[record["step"]].is_timed_out)

    def _on_attempt_lost(self, record: dict[str, Any]) -> str | None:
        attempt, problem = self._end_problem(record)
        if problem:
            return problem
        if record["why"] == "rebooted":
            is_so = attempt is None or attempt.boot != self.kernel.boot
            if attempt is None and self.steps[record["step"]].started_boot == self.kernel.boot_id:
                is_so = False
            return None if is_so else "there was no reboot"
        # The line may be of the boot before, and durable only now.
        if attempt is None or f"boot-{attempt.boot}" != self.boot or attempt.is_recorded or not attempt.has_begun:
            return f"in truth {attempt}"
        return None if attempt.was_killed_alone else "nobody had killed it"

    def _on_attempt_not_started(self, record: dict[str, Any]) -> str | None:
        attempt, problem = self._end_problem(record)
        if problem:
            return problem
        if attempt is not None and attempt.has_begun:
            return "in truth its command began"
        key = (self.run_id, record["step"], record["attempt"])
        if record["why"] == "exec" and key not in self.kernel.unspawnable:
            return "the system would have started it"
        if record["why"] == "cwd" and (attempt is None or attempt.plan.error != "cwd"):
            return "its directory is there"
        if record["why"] == "stopped" and not (self.is_stopping or self.steps[record["step"]].is_timed_out):
            return "nobody had stopped it"
        return None

    def _on_step_succeeded(self, record: dict[str, Any]) -> str | None:
        step, problem = self._settled(record, "SUCCEEDED")
        outcome = step.outcome or {}
        if outcome.get("event") != "attempt_exited" or outcome.get("exit_code") != 0:
            return f"its attempt ended thus: {outcome}"
        return problem or ("it had timed out" if step.is_timed_out else None)

    def _settled(self, record: dict[str, Any], state: str) -> tuple[StepNotes, str | None]:
        step = self.steps[record["step"]]
        before, step.state = step.state, state
        if before != "RUNNING" or step.outcome is None:
            return step, f"the step was {before} and its attempt's end is not known"
        return step, "the run is being ended" if self.is_stopping else None

    def _count(self, record: dict[str, Any], step: StepNotes) -> str | None:
        """Add a failure or a loss; is the reason the true one?"""
        outcome = step.outcome or {}
        event, why = outcome.get("event"), outcome.get("why")
        expected = "exit"
        if step.is_timed_out:
            expected = "timeout"
        elif event == "attempt_lost":
            expected = "lost"
        elif event == "attempt_not_started":
            expected = "never_began" if why == "never_began" else "not_started"
        elif outcome.get("exit_code") == 0:
            return "its attempt exited 0"
        if expected in ("lost", "never_began"):
            step.losses += 1
        else:
            step.failures += 1
        return None if record["reason"] == expected else f"the reason was {expected}"

    def _on_step_failed(self, record: dict[str, Any]) -> str | None:
        step, problem = self._settled(record, "FAILED")
        problem = problem or self._count(record, step)
        if problem:
            return problem
        if record["reason"] in ("lost", "never_began"):
            is_out = step.losses > MAX_LOSSES or (record["reason"] == "lost" and step.definition["on_lost"] == "fail")
        else:
            is_out = step.failures > step.definition["retries"]
        return None if is_out else f"after {step.failures} failures and {step.losses} losses tries are left"

    def _on_step_retried(self, record: dict[str, Any]) -> str | None:
        step, problem = self._settled(record, "READY")
        problem = problem or self._count(record, step)
        if problem:
            return problem
        step.delay_ms, step.ready_ms = record["delay_ms"], record["mono_ms"] + record["delay_ms"]
        if record["reason"] in ("lost", "never_began"):
            if step.losses > MAX_LOSSES or (record["reason"] == "lost" and step.definition["on_lost"] == "fail"):
                return "no try was left"
            return None if record["delay_ms"] == 0 else "a lost attempt waits for nothing"
        if step.failures > step.definition["retries"]:
            return f"{step.failures} failures, {step.definition['retries']} retries"
        return self._delay_problem(step)

    def _delay_problem(self, step: StepNotes) -> str | None:
        backoff = step.definition["backoff"]
        full_ms = backoff["initial_ms"]
        for _ in range(step.failures - 1):
            full_ms = full_ms * backoff["factor_permille"] // 1000
        full_ms = min(full_ms, backoff["max_ms"])
        least_ms = full_ms - full_ms * backoff["jitter_permille"] // 1000 - 1
        return None if least_ms <= step.delay_ms <= full_ms + step.failures else f"the back-off is {full_ms} ms"

    def _on_step_skipped(self, record: dict[str, Any]) -> str | None:
        step = self.steps[record["step"]]
        before, step.state = step.state, "SKIPPED"
        if before != "PENDING" or self.is_stopping:
            return f"the step was {before}, or the run is being ended"
        if record["because"] not in step.definition["depends_on"]:
            return "it does not depend on that"
        because = self.steps[record["because"]].state
        return None if because in _BLOCKED else f"that is {because}"

    def _on_step_cancelled(self, record: dict[str, Any]) -> str | None:
        step = self.steps[record["step"]]
        before, step.state = step.state, "CANCELLED"
        if before in _END_OF_STEP or not self.is_stopping:
            return f"the step was {before}, or nobody ends the run"
        if before == "RUNNING" and step.outcome is None:
            return "its attempt has not ended"
        expected = "cancel" if self.state == "CANCELLING" else "run_timeout"
        return None if record["reason"] == expected else f"the reason was {expected}"

    def may_ignore_cancel(self, request: str) -> bool:
        """Was this cancel carried out, or is there another, or was the run over (perhaps until somebody's retry)?"""
        return request in self.requests or self.state != "RUNNING" or any("retry" in other for other in self.requests)

    # -- the world asks -------------------------------------------------------------------------------------------

    def spawn_problem(self, step_id: str, number: int) -> str | None:
        """May this attempt be spawned now, by what is durable?"""
        step = self.steps.get(step_id)
        if step is None or step.state != "RUNNING" or step.attempt != number or step.outcome is not None:
            return f"no durable line says that it runs ({step})"
        if self.is_stopping:
            return "the run is being ended"
        before = self.kernel.attempts.get((self.run_id, step_id, number))
        if before is not None and (before.is_alive or before.plan.error != "fork"):
            return "it was spawned already"
        if self.boot == self.kernel.boot_id and self.kernel.monotonic_ms() < step.ready_ms:
            return f"its back-off ends at {step.ready_ms}"
        for earlier in range(1, number):
            attempt = self.kernel.attempts.get((self.run_id, step_id, earlier))
            if attempt is not None and attempt.is_alive:
                return f"attempt {earlier} is alive"
        return None

    def signal_problem(self, step_id: str, number: int, is_kill: bool) -> str | None:
        """May this attempt, whose shim lives, be ended now, by what is durable?"""
        step = self.steps[step_id]
        if step.attempt != number or step.state != "RUNNING":
            return f"the step is {step.state}, attempt {step.attempt}"
        since_ms = [self.stop_ms] if self.is_stopping else []
        if step.is_timed_out:
            since_ms.append(step.timed_out_ms)
        if not since_ms:
            return "no durable line says that it is to end"
        kill_at_ms = min(since_ms) + int(step.definition["grace_ms"])
        if is_kill and self.boot == self.kernel.boot_id and self.kernel.monotonic_ms() < kill_at_ms:
            return f"its grace lasts until {kill_at_ms}"
        return None


def _shown(record: dict[str, Any]) -> str:
    hidden = ("at", "crc", "workflow", "format", "rules", "version", "host", "user_ms", "system_ms", "peak_rss_kib")
    fields = ((name, value) for name, value in record.items() if name not in hidden)
    return " ".join(str(value) if name == "event" else f"{name}={value}" for name, value in fields)
