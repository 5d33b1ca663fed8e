"""The files that the tasks hand to each other: in $IMAGE_PIPELINE_WORK, or in `work/` beside workflow.json.

A task may be killed at any moment and tried again, so a file appears whole or not at all: it is written under another
name, synced, then renamed. Even a power cut leaves the old file or the new one, never a torn one.
Whatever goes wrong ends the task with one sentence on stderr and exit status 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import png

EXAMPLE = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("IMAGE_PIPELINE_WORK") or EXAMPLE / "work")


def stop(sentence: str) -> NoReturn:
    """End this task as failed, saying why."""
    sys.exit(f"{Path(sys.argv[0]).stem}: {sentence}")


def read(name: str, made_by: str) -> bytes:
    """Return the bytes of the file `name`, which the task `made_by` leaves."""
    try:
        return (WORK / name).read_bytes()
    except FileNotFoundError:
        stop(f"{WORK / name} is missing; run tasks/{made_by}.py first.")
    except OSError as error:
        stop(f"{WORK / name} cannot be read: {error.strerror}.")


def read_image(name: str, made_by: str) -> png.Image:
    """Return the picture in the PNG file `name`."""
    try:
        return png.decode(read(name, made_by))
    except png.PngError as error:
        stop(f"{WORK / name} cannot be used: {error}.")


def read_json(name: str, made_by: str) -> Any:
    """Return the value in the JSON file `name`."""
    try:
        return json.loads(read(name, made_by))
    except ValueError:
        stop(f"{WORK / name} is not JSON; run tasks/{made_by}.py again.")


def write(name: str, data: bytes) -> None:
    """Make the file `name` hold `data`, all at once."""
    path = WORK / name
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        stop(f"{path} cannot be written: {error.strerror}.")


def write_json(name: str, value: object) -> None:
    """Make the file `name` hold `value` as JSON."""
    write(name, (json.dumps(value, indent=2) + "\n").encode())
