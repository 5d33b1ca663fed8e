"""PNG pictures, read and written with zlib and struct alone.

A PNG is a signature and then chunks: length, kind, body, CRC. IHDR says how large the picture is, IDAT holds its rows,
compressed, IEND closes it. Each row starts with a byte that names its filter: the bytes are stored as differences from
a prediction made of their neighbours, because small differences compress better.

Read: 8-bit grey, RGB and RGBA, not interlaced, all five filters. Everything else is refused with a `PngError`.
Chunks that only describe (text, gamma, time, a transparent colour) are passed over.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {0: 1, 2: 3, 6: 4}  # PNG's colour type -> bytes a pixel: grey, RGB, RGBA
MAX_PIXELS = 16_000_000  # a few hundred bytes can claim a picture that fills the memory: 64 MB is enough here


class PngError(ValueError):
    """The bytes are not a PNG that this module reads; the text says why."""


class Image(NamedTuple):
    """A picture: its rows from top to bottom in `pixels`, `channels` bytes a pixel (1 grey, 3 RGB, 4 RGBA)."""

    width: int
    height: int
    channels: int
    pixels: bytes


def decode(data: bytes) -> Image:
    """Return the picture in the PNG file `data`. Raises PngError."""
    (kind, header), *rest = _chunks(data)
    if kind != b"IHDR" or len(header) != 13:
        raise PngError("it does not begin with an IHDR chunk of 13 bytes")
    width, height, channels = _size(header)
    for kind, _ in rest:
        if kind[:1].isupper() and kind not in (b"IDAT", b"PLTE", b"IEND"):  # upper case: no reading on without it
            raise PngError(f"it has an unknown critical chunk {kind!r}")
    packed = b"".join(body for kind, body in rest if kind == b"IDAT")
    rows = _inflate(packed, height * (width * channels + 1))
    return Image(width, height, channels, _unfilter(rows, width * channels, channels))


def encode(image: Image) -> bytes:
    """Return `image` as a PNG file, its rows unfiltered: simple, and small enough for small pictures."""
    colour_type = next(number for number, channels in COLOUR_TYPES.items() if channels == image.channels)
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, colour_type, 0, 0, 0)
    stride = image.width * image.channels
    rows = b"".join(b"\0" + image.pixels[start : start + stride] for start in range(0, len(image.pixels), stride))
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and body of each chunk up to IEND, every CRC checked."""
    if not data.startswith(SIGNATURE):
        raise PngError("it does not begin with the PNG signature")
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        if len(data) < start + 12:
            raise PngError("it is cut short: there is no IEND chunk")
        length, kind = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + 8 + length]
        if data[start : start + 12 + length] != _chunk(kind, body):
            raise PngError(f"its chunk {kind!r} at byte {start} is damaged or cut short")
        yield kind, body
        start += 12 + length


def _size(header: bytes) -> tuple[int, int, int]:
    """Width, height and bytes a pixel from the body of IHDR."""
    width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(">IIBBBBB", header)
    if depth != 8 or colour_type not in COLOUR_TYPES:
        raise PngError(f"it has {depth} bits a channel and colour type {colour_type}, not 8-bit grey, RGB or RGBA")
    if compression or filtering or interlace:
        raise PngError("it is interlaced, or packed in a way that PNG does not define")
    if not 0 < width * height <= MAX_PIXELS:
        raise PngError(f"it has {width} x {height} pixels, and 1 to {MAX_PIXELS} in all can be read")
    return width, height, COLOUR_TYPES[colour_type]


def _inflate(packed: bytes, size: int) -> bytes:
    """Unpack the rows, which must be `size` bytes; never more than one byte beyond that, whatever is packed."""
    unpacker = zlib.decompressobj()
    try:
        rows = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        raise PngError(f"its pixels cannot be unpacked: {error}") from None
    if len(rows) != size or not unpacker.eof:
        raise PngError(f"its pixels do not unpack to the {size} bytes that its size asks for")
    return rows


def _paeth(left: int, above: int, corner: int) -> int:
    """Of the three neighbours the one nearest to left + above - corner; the first of them if two are as near."""
    guess = left + above - corner
    return min((left, above, corner), key=lambda neighbour: abs(guess - neighbour))


PREDICTIONS: tuple[Callable[[int, int, int], int], ...] = (  # by number of the filter: None, Sub, Up, Average, Paeth
    lambda left, above, corner: 0,
    lambda left, above, corner: left,
    lambda left, above, corner: above,
    lambda left, above, corner: (left + above) // 2,
    _paeth,
)


def _unfilter(rows: bytes, stride: int, channels: int) -> bytes:
    """Undo each row's filter: a stored byte is the difference from its prediction, modulo 256."""
    pixels = bytearray()
    above = bytes(channels + stride)  # a pixel of zeros before each row, and a row of zeros before the first
    for start in range(0, len(rows), stride + 1):
        if rows[start] >= len(PREDICTIONS):
            raise PngError(f"a row has filter {rows[start]}, and PNG defines 0 to 4")
        predict = PREDICTIONS[rows[start]]
        row = bytearray(channels)
        for i, difference in enumerate(rows[start + 1 : start + 1 + stride]):
            row.append((difference + predict(row[i], above[channels + i], above[i])) & 255)
        pixels += row[channels:]
        above = bytes(row)
    return bytes(pixels)
