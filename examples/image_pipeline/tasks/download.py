"""Fetch the picture over its URL and keep it as original.png, if it is the one that was promised.

The URL is a file: URL so that the example needs no network; urllib would fetch an https: one by the same code.
The SHA-256 beside the picture is in the form of `sha256sum`, so `sha256sum -c` checks it too.
"""

from __future__ import annotations

import hashlib
import urllib.request

import artifacts

PICTURE = artifacts.EXAMPLE / "assets" / "landscape.png"
CHECKSUM = PICTURE.with_name("landscape.png.sha256")
IDLE_SEC = 10.0  # give up on a server that sends nothing for so long: a try should end before the step's timeout
MAX_BYTES = 10_000_000  # more than any picture here; a wrong URL must not fill the disk


def fetch(url: str) -> bytes:
    """Return what is at `url`, or end the task with the reason why not."""
    try:
        with urllib.request.urlopen(url, timeout=IDLE_SEC) as response:
            data: bytes = response.read(MAX_BYTES + 1)
    except OSError as error:  # urllib's own URLError is one too, and keeps what happened in `reason`
        artifacts.stop(f"{url} cannot be fetched: {getattr(error, 'reason', error)}.")
    if len(data) > MAX_BYTES:
        artifacts.stop(f"{url} is larger than {MAX_BYTES} bytes.")
    return data


def main() -> None:
    try:
        promised = CHECKSUM.read_text(encoding="ascii").split()[0]
    except (OSError, ValueError, IndexError):
        artifacts.stop(f"{CHECKSUM} cannot be read, so nothing that is fetched could be trusted.")
    url = PICTURE.as_uri()
    data = fetch(url)
    found = hashlib.sha256(data).hexdigest()
    if found != promised:
        artifacts.stop(f"{url} is not the picture that was promised: SHA-256 is {found}, not {promised}.")
    artifacts.write("original.png", data)
    print(f"fetched {len(data)} bytes from {url}")
    print(f"SHA-256 {found[:12]}... is right; kept as original.png")


if __name__ == "__main__":
    main()
