"""Shrink original.png to small.png: RGB, the longer side 64 pixels, the proportions kept.

Each new pixel is the mean of the area that it covers, with pixels on the edge counted by the part that lies inside
("box" or "area averaging"). So every original pixel counts once, and the mean colour stays what it was.
"""

from __future__ import annotations

import math

import artifacts
import png

LONGER_SIDE = 64  # pixels: enough for colours and large shapes, and the steps after this one take no time


def to_rgb(image: png.Image) -> png.Image:
    """Return `image` with three channels: grey spread over all three, transparent pixels laid on white."""
    if image.channels == 3:
        return image
    pixels = bytearray()
    if image.channels == 1:
        for grey in image.pixels:
            pixels += bytes((grey, grey, grey))
    else:
        for start in range(0, len(image.pixels), 4):
            *colour, alpha = image.pixels[start : start + 4]
            pixels += bytes(round((value * alpha + 255 * (255 - alpha)) / 255) for value in colour)
    return png.Image(image.width, image.height, 3, bytes(pixels))


def cover(source: int, target: int) -> list[list[tuple[int, float]]]:
    """For each of `target` places: the places of `source` under it, each with its share. The shares add up to 1."""
    step = source / target
    places = []
    for i in range(target):
        start, end = i * step, (i + 1) * step
        under = range(math.floor(start), min(source, math.ceil(end)))
        places.append([(j, (min(end, j + 1) - max(start, j)) / step) for j in under])
    return places


def resize(image: png.Image, width: int, height: int) -> png.Image:
    """Return `image` in another size: first each row made narrower, then each column shorter."""
    channels, stride = image.channels, image.width * image.channels
    columns = cover(image.width, width)
    narrow = []
    for start in range(0, len(image.pixels), stride):
        row = [image.pixels[start + channel : start + stride : channels] for channel in range(channels)]
        narrow.append([sum(plane[j] * share for j, share in under) for under in columns for plane in row])
    pixels = bytearray()
    for under in cover(image.height, height):
        pixels += bytes(round(sum(narrow[j][i] * share for j, share in under)) for i in range(width * channels))
    return png.Image(width, height, channels, bytes(pixels))


def main() -> None:
    original = artifacts.read_image("original.png", made_by="download")
    scale = LONGER_SIDE / max(original.width, original.height)
    width, height = (max(1, round(side * scale)) for side in (original.width, original.height))
    small = resize(to_rgb(original), width, height)
    artifacts.write("small.png", png.encode(small))
    print(f"shrank {original.width} x {original.height} pixels to {width} x {height}, kept as small.png")


if __name__ == "__main__":
    main()
