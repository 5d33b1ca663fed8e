"""Put the picture, its class and its features on one page: site/index.html.

The page holds the pictures themselves, as data: URIs, so it is one file: it appears whole or not at all, and can be
moved or mailed. Whatever the page shows from a file is escaped, so that a name can never become markup.
"""

from __future__ import annotations

import base64
import html
import string
from typing import Any

import artifacts

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 2rem auto; padding: 0 1rem; color: #223 }
  figure { margin: 0 } img { max-width: 100%; margin-right: 1rem } figcaption { color: #667 }
  .bar { display: inline-block; height: .7rem; min-width: 1px; background: #48a }
  .red { background: #c44 } .green { background: #4a5 } .blue { background: #46c } .edges { background: #888 }
  td, th { padding: 0 .8rem 0 0; text-align: left; font-weight: normal } td:last-child { width: 16rem }
</style>
<h1>$title</h1>
<figure>
<img src="$original" alt="the picture"><img src="$small" alt="the same, small">
<figcaption>The picture, and what the decision was made from.</figcaption>
</figure>
<h2>Which class</h2>
<table>$scores</table>
<h2>Features it was decided by</h2>
<table>$features</table>
<h2>Embedding</h2>
<table>$embedding</table>
</html>
""")


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def rows(values: dict[str, float], css_class: str = "") -> str:
    """One table row for each value: its name, its number, and a bar as long as its size (1 is the whole width)."""
    lines = []
    for name, value in values.items():
        width = min(abs(value), 1.0) * 100
        bar = f'<span class="bar {html.escape(css_class)}" style="width: {width:.1f}%"></span>'
        lines.append(f"<tr><th>{html.escape(name)}</th><td>{value:.3f}</td><td>{bar}</td></tr>")
    return "\n".join(lines)


def page(original: bytes, small: bytes, decided: Any, embedding: Any) -> str:
    """Return the page's HTML from what the other tasks left."""
    groups = [
        rows({f"{group} {number}": value for number, value in enumerate(values, start=1)}, css_class=group)
        for group, values in embedding["groups"].items()
    ]
    return PAGE.substitute(
        title=html.escape(f"This looks like: {decided['class']}"),
        original=data_uri(original),
        small=data_uri(small),
        scores=rows(decided["scores"]),
        features=rows(decided["features"]),
        embedding="\n".join(groups),
    )


def main() -> None:
    original = artifacts.read("original.png", made_by="download")
    small = artifacts.read("small.png", made_by="preprocess")
    decided = artifacts.read_json("class.json", made_by="classify")
    embedding = artifacts.read_json("embedding.json", made_by="embed")
    try:
        text = page(original, small, decided, embedding)
    except (AttributeError, LookupError, TypeError, ValueError):
        artifacts.stop(f"class.json or embedding.json in {artifacts.WORK} is not as its task leaves it; run both.")
    artifacts.write("site/index.html", text.encode())
    print(f"published {artifacts.WORK / 'site' / 'index.html'} ({len(text)} characters)")


if __name__ == "__main__":
    main()
