"""Definitions as users give them: files and documents, checked, and submitted.

Apart from the library (api.py), whose types cost a command line 2 of 25 ms.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from wfctl import client
from wfctl.errors import InvalidRequest, InvalidWorkflow
from wfd import definition
from wfd.definition import Workflow
from wfd.paths import RUN_ID_RULE, is_run_id


def read_file(path: str) -> bytes:
    """The bytes of a workflow file. Raises InvalidWorkflow."""
    try:
        with open(path, "rb") as file:
            # One byte more than is allowed is enough to be refused; /dev/zero has no end.
            return file.read(definition.MAX_DEFINITION_BYTES + 1)
    except OSError as error:
        raise InvalidWorkflow(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InvalidWorkflow(f"{path!r} is no path: it contains NUL") from None


def directory_of(path: str) -> str:
    """Where the relative directories of a workflow file start."""
    return os.path.dirname(absolute(path))


def absolute(path: str) -> str:
    """The path, in the encoding of requests, from the root on."""
    path = client.as_sent(path)
    return os.path.normpath(path if path.startswith("/") else f"{client.current_directory()}/{path}")


def document_in(text: bytes, base_dir: str) -> dict[str, object]:
    """The user's own document, checked. Raises InvalidWorkflow."""
    parse(text, base_dir)
    document = definition.decode(text)
    assert isinstance(document, dict)
    return document


def checked(document: Mapping[str, object], base_dir: str) -> Workflow:
    """The workflow in a document; `base_dir` is absolute and in the encoding of requests. Raises InvalidWorkflow."""
    try:
        return definition.validate(dict(document), base_dir)
    except definition.DefinitionError as error:
        raise _refused(error) from None


def submit_document(
    document: Mapping[str, object], base_dir: str, run_id: str | None = None, max_parallel: int | None = None
) -> dict[str, object]:
    """Submit a document that need not have been checked. Nothing is started for one that is refused. Returns what
    client.submit does."""
    if max_parallel is not None:
        document = {**document, "max_parallel": max_parallel}
    checked(document, base_dir)
    if run_id is not None and not (isinstance(run_id, str) and is_run_id(run_id)):
        raise InvalidRequest(f"{run_id!r} cannot be a run id: it has {RUN_ID_RULE}")
    home = client.current_home()
    run_id = client.new_run_id(home) if run_id is None else run_id
    return client.submit(home, run_id, document, base_dir)


def parse(text: bytes, base_dir: str) -> Workflow:
    """The workflow in the text of a file. Raises InvalidWorkflow."""
    try:
        return definition.parse(text, base_dir)
    except definition.DefinitionError as error:
        raise _refused(error) from None


def _refused(error: definition.DefinitionError) -> InvalidWorkflow:
    return InvalidWorkflow(str(error), tuple((problem.path, problem.message) for problem in error.problems))
