"""The transcript in ARCHITECTURE.md is spoken: its requests go to a real daemon, and the answers must be the written ones.

What no two runs share (times, pids, paths, checksums) is compared by its name and type only. To write the transcript anew
after a change of the protocol: python -m tests.test_transcript
"""

from __future__ import annotations

import json
import os
import re
import sys
import unittest

from tests.daemon import ROOT, Daemon

PATH = os.path.join(ROOT, "ARCHITECTURE.md")
BLOCK = re.compile(r"(?<=```transcript\n).*?(?=```)", re.DOTALL)
VOLATILE = {
    "at", "boot_id", "crc", "durable", "finished_at", "home", "host", "max_parallel", "mono_ms", "peak_rss_kib", "pid",
    "socket", "started_at", "submitted_at", "system_ms", "uptime_sec", "user_ms", "version",
}  # fmt: skip


def speak(requests: list[str]) -> str:
    """The transcript of these requests: each is sent when the answer to the one before has come. After a watch, the
    notifications up to the end of the run are part of its answer."""
    spoken = []
    with Daemon() as daemon, daemon.connect() as client:
        for request in requests:
            client.send(request.encode() + b"\n")
            spoken.append(f"-> {request}")
            spoken.append(f"<- {client.line().decode().rstrip()}")
            is_over = json.loads(request)["method"] != "watch"
            while not is_over:
                spoken.append(f"<- {client.line().decode().rstrip()}")
                is_over = '"run_finished"' in spoken[-1]
    return "\n".join(spoken) + "\n"


def settled(transcript: str) -> list[object]:
    """The transcript without what no two runs share."""

    def settle(value: object) -> object:
        if isinstance(value, dict):
            if set(value) == {"run_id", "state", "last_seq"}:
                # The answer to a watch: how far the run is by then is a race that nobody promised to win.
                return sorted(value)
            return {name: type(part).__name__ if name in VOLATILE else settle(part) for name, part in value.items()}
        return [settle(part) for part in value] if isinstance(value, list) else value

    return [(line[:3], settle(json.loads(line[3:]))) for line in transcript.splitlines()]


def written() -> str:
    with open(PATH, encoding="utf-8") as file:
        found = BLOCK.search(file.read())
    assert found is not None
    return found[0]


def requests_of(transcript: str) -> list[str]:
    return [line.removeprefix("-> ") for line in transcript.splitlines() if line.startswith("-> ")]


class TranscriptTest(unittest.TestCase):
    maxDiff = None

    def test_the_written_transcript_is_what_the_daemon_says(self) -> None:
        transcript = written()
        self.assertEqual(settled(speak(requests_of(transcript))), settled(transcript))


def main() -> None:
    with open(PATH, encoding="utf-8") as file:
        text = file.read()
    transcript = speak(requests_of(written()))
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(BLOCK.sub(lambda _: transcript, text))
    sys.stdout.write(transcript)


if __name__ == "__main__":
    main()
