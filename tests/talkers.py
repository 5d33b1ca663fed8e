"""Clients that talk to a real daemon at random, and note what they were told (told.py): they submit runs, watch them, ask
for their status, cancel and retry them.

Each owns the runs that it has submitted, so that nobody else cancels or retries them. A request whose answer the death of
the daemon has taken is repeated to the next daemon, or not.
"""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from typing import Any

from tests.daemon import Client, Daemon, Refused, step
from tests.told import RAN, Told
from wfd import protocol

# A command, and what its step says besides. Each ends within a moment, so that a cut meets some that run and some that ran.
_STEPS: tuple[tuple[str, dict[str, object]], ...] = (
    ("true", {}),
    ("sleep 0.03", {}),
    ("sleep 0.1", {}),
    ('[ "$WFD_ATTEMPT" -gt 1 ]', {"retries": 2}),
    ('[ "$WFD_ATTEMPT" -gt 1 ]', {}),
    ("exec sleep 5", {"timeout_sec": 0.05}),
)
# Lost attempts are tried again after a back-off, too.
_BACKOFF = {"initial_sec": 0.01, "jitter": 0.5}


def _random_steps(chance: random.Random) -> list[dict[str, object]]:
    steps: list[dict[str, object]] = []
    for number in range(chance.randint(1, 4)):
        command, fields = chance.choice(_STEPS)
        known = [str(earlier["id"]) for earlier in steps]
        depends_on = chance.sample(known, chance.randint(0, len(known)))
        steps.append(step(f"s{number}", RAN + command, *depends_on, backoff=_BACKOFF, **fields))
    return steps


class Talker:
    """A client. Its runs have names that begin with its own."""

    RUNS_MAX, MOVES_A_BOOT = 5, 40

    def __init__(self, name: str, chance: random.Random, ledger: Told, ran: str, refusals: frozenset[int]) -> None:
        """refusals: the codes of those that are no fault."""
        self._name, self._chance, self._told, self._ran, self._refusals = name, chance, ledger, ran, refusals
        self._submissions: list[dict[str, Any]] = []
        # By run: how many retries of it were answered. Each has an id of its own, and the cancels after it.
        self._retried: dict[str, int] = {}
        self.watches: list[threading.Thread] = []
        self._unanswered: tuple[str, str] | None = None

    def talk(self, daemon: Daemon) -> None:
        """Until the daemon is gone, or enough was said. The watches go on until it is gone."""
        asked, self._unanswered = self._unanswered, None
        with suppress(EOFError, OSError), daemon.connect() as client:
            if asked is not None and self._chance.random() < 0.7:
                self._ask(client, *asked)
            for _ in range(self.MOVES_A_BOOT):
                self._ask(client, *self._next(daemon))

    def _next(self, daemon: Daemon) -> tuple[str, str]:
        known = [run_id for run_id in self._retried if run_id in self._told.runs]
        if not known or (len(self._submissions) < self.RUNS_MAX and self._chance.random() < 0.4):
            run_id = f"{self._name}-{len(self._submissions)}"
            self._retried[run_id] = 0
            environment = {"WFD_TEST_RAN": self._ran}
            self._submissions.append(
                daemon.submission(*_random_steps(self._chance), run_id=run_id, environment=environment, directory="/")
            )
            return "submit", run_id
        run_id = self._chance.choice(known)
        if self._chance.random() < 0.3:
            watch = threading.Thread(target=self._watch, args=(daemon, run_id, self._chance.randint(1, 4)))
            watch.start()
            self.watches.append(watch)
        return self._chance.choices(("status", "cancel", "retry"), (4, 1, 2))[0], run_id

    def _ask(self, client: Client, method: str, run_id: str) -> None:
        self._unanswered = method, run_id
        times = self._retried[run_id]
        request = f"{method}-{times}"
        known_seq = self._told.runs[run_id].known_seq if run_id in self._told.runs else 1
        try:
            if method == "submit":
                submission = next(each for each in self._submissions if each["run_id"] == run_id)
                self._told.submitted(submission, client.request(method, **submission))
            elif method == "status":
                self._told.status(client.request(method, run_id=run_id))
            elif method == "cancel":
                self._told.cancelled(request, client.request(method, run_id=run_id, request=request), known_seq)
            else:
                answer = client.request(method, run_id=run_id, request=request)
                self._retried[run_id] = times + 1
                self._told.retried(request, answer, known_seq)
        except Refused as refused:
            if refused.code not in self._refusals:
                self._told.contradictions.append(f"{method} of run {run_id} was refused: {refused}")
        self._unanswered = None

    def _watch(self, daemon: Daemon, run_id: str, from_seq: int) -> None:
        with suppress(EOFError, OSError, Refused), daemon.connect() as client:
            last_seq = client.request("watch", run_id=run_id, from_seq=from_seq)["last_seq"]
            for seq, frame in enumerate(iter(client.line, b""), from_seq):
                self._told.watched(run_id, seq, protocol.line_of(frame[:-1]), is_new=seq > last_seq)
