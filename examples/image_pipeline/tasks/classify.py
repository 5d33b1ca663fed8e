"""Decide what small.png shows, kept as class.json: the class whose prototype is nearest to the picture's features.

    {"class": "day landscape", "scores": {class: 0..1, adding up to 1}, "features": {feature: number}}

Five features, each a mean over the picture or a part of it:

    brightness  0 black .. 1 white
    sky         blue minus red in the upper third: above 0 a blue sky, below 0 an evening one
    green       share of the pixels in which green is the strongest channel
    contrast    brightness of the upper third minus that of the lower: a sky over land is above 0
    colour      strongest minus weakest channel: 0 grey

The prototypes were set by hand, from what such pictures look like, and not learned: this shows a pipeline, not the art.
"""

from __future__ import annotations

import math

import artifacts
import png

PROTOTYPES = {
    "day landscape": {"brightness": 0.55, "sky": 0.35, "green": 0.40, "contrast": 0.25, "colour": 0.30},
    "sunset": {"brightness": 0.40, "sky": -0.35, "green": 0.05, "contrast": 0.30, "colour": 0.40},
    "night": {"brightness": 0.08, "sky": 0.08, "green": 0.10, "contrast": 0.03, "colour": 0.08},
    "forest": {"brightness": 0.30, "sky": -0.05, "green": 0.90, "contrast": 0.05, "colour": 0.25},
    "fog or snow": {"brightness": 0.80, "sky": 0.03, "green": 0.10, "contrast": 0.00, "colour": 0.05},
}
SHARPNESS = 7.0  # how fast a score falls with distance: 0.1 further off halves it


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def features_of(image: png.Image) -> dict[str, float]:
    """Return the five features of `image`, rounded so that the same picture gives the same text anywhere."""
    data = image.pixels
    pixels = [(data[i], data[i + 1], data[i + 2]) for i in range(0, len(data), 3)]
    third = image.width * max(1, image.height // 3)
    upper, lower = pixels[:third], pixels[-third:]

    def brightness(part: list[tuple[int, int, int]]) -> float:
        return mean([(0.299 * red + 0.587 * green + 0.114 * blue) / 255 for red, green, blue in part])

    features = {
        "brightness": brightness(pixels),
        "sky": mean([(blue - red) / 255 for red, _, blue in upper]),
        "green": mean([float(green > max(red, blue)) for red, green, blue in pixels]),
        "contrast": brightness(upper) - brightness(lower),
        "colour": mean([(max(pixel) - min(pixel)) / 255 for pixel in pixels]),
    }
    return {name: round(value, 4) for name, value in features.items()}


def scores_of(features: dict[str, float]) -> dict[str, float]:
    """Return each class's share, best first: the nearer its prototype, the larger."""
    weights = {
        name: math.exp(-SHARPNESS * math.dist(list(prototype.values()), [features[key] for key in prototype]))
        for name, prototype in PROTOTYPES.items()
    }
    total = sum(weights.values())
    best_first = sorted(weights, key=lambda name: -weights[name])
    return {name: round(weights[name] / total, 4) for name in best_first}


def main() -> None:
    features = features_of(artifacts.read_image("small.png", made_by="preprocess"))
    scores = scores_of(features)
    best = next(iter(scores))
    artifacts.write_json("class.json", {"class": best, "scores": scores, "features": features})
    print(f"it shows: {best} (score {scores[best]:.2f}), kept as class.json")


if __name__ == "__main__":
    main()
