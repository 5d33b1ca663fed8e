"""Describe small.png by 32 numbers, kept as embedding.json.

    {"groups": {"red": [8 numbers], "green": [...], "blue": [...], "edges": [...]}, "vector": [32 numbers]}

Red, green and blue are histograms: the share of the pixels whose value lies in 0-31, 32-63, ... 224-255.
Edges is a histogram of directions, each edge counted by its strength: 8 bins of 22.5 degrees from "brightness changes
from left to right" on. Each group adds up to 1 (a picture without any edge has zeros there). The vector is the four in
a row, scaled to length 1, so that the dot product of two pictures' vectors says how alike they are.
"""

from __future__ import annotations

import math

import artifacts
import png

BINS = 8


def colour_histogram(values: bytes) -> list[float]:
    """Share of `values` in each of the bins."""
    counts = [0] * BINS
    for value in values:
        counts[value * BINS // 256] += 1
    return [count / len(values) for count in counts]


def edge_histogram(image: png.Image) -> list[float]:
    """Share of each direction in all the change of brightness between neighbours, of the pixels that have all four."""
    data = image.pixels
    luma = [0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2] for i in range(0, len(data), 3)]
    strengths = [0.0] * BINS
    for y in range(1, image.height - 1):
        for x in range(1, image.width - 1):
            at = y * image.width + x
            across, down = luma[at + 1] - luma[at - 1], luma[at + image.width] - luma[at - image.width]
            turn = math.atan2(down, across) % math.pi / math.pi  # light to dark or dark to light: the same edge
            strengths[min(int(turn * BINS), BINS - 1)] += math.hypot(across, down)
    total = sum(strengths)
    return [strength / total if total else 0.0 for strength in strengths]


def main() -> None:
    image = artifacts.read_image("small.png", made_by="preprocess")
    groups = {name: colour_histogram(image.pixels[c::3]) for c, name in enumerate(("red", "green", "blue"))}
    groups["edges"] = edge_histogram(image)
    vector = [value for values in groups.values() for value in values]
    length = math.hypot(*vector)
    artifacts.write_json(
        "embedding.json",
        {
            "groups": {name: [round(value, 6) for value in values] for name, values in groups.items()},
            "vector": [round(value / length, 6) for value in vector],
        },
    )
    print(f"described {image.width} x {image.height} pixels by {len(vector)} numbers, kept as embedding.json")


if __name__ == "__main__":
    main()
