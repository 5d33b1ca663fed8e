"""The tasks of examples/image_pipeline, run in order in a copy of it and without the engine, and what they leave."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import zlib
from pathlib import Path
from types import ModuleType

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "image_pipeline"
TASKS = ("download", "preprocess", "embed", "classify", "publish")
PATIENCE_SEC = 120  # a task takes a fifth of a second; this only ends a hang


def copy_of_example(into: Path) -> Path:
    """Copy the example as a fresh clone has it; the name has a space and a letter that URLs must quote."""
    ignored = shutil.ignore_patterns("work", "__pycache__")
    return Path(shutil.copytree(EXAMPLE, into / "a cöpy", ignore=ignored))


def run_task(example: Path, task: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "IMAGE_PIPELINE_WORK"}
    return subprocess.run(
        # -S: as everywhere, nothing but Python itself is needed.
        [sys.executable, "-S", str(example / "tasks" / f"{task}.py")],
        cwd=cwd or example,
        env=inherited | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SEC,
    )


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def load_png(example: Path) -> ModuleType:
    """Import tasks/png.py from a copy, so that its byte code goes with the copy."""
    spec = importlib.util.spec_from_file_location("example_png", example / "tasks" / "png.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean_colour(pixels: bytes) -> list[float]:
    return [sum(pixels[channel::3]) / (len(pixels) // 3) for channel in range(3)]


class InTemporaryCopy(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)
        self.example = copy_of_example(self.directory)
        self.work = self.example / "work"

    def assert_ends_with_a_sentence(self, result: subprocess.CompletedProcess[str], task: str, *words: str) -> None:
        self.assertEqual(result.returncode, 1, result)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, rf"\A{task}: [^\n]+\.\n\Z")
        for word in words:
            self.assertIn(word, result.stderr)


class WholePipelineTest(InTemporaryCopy):
    """One run of all five, then a look at everything that it left."""

    def test_five_tasks_in_order(self) -> None:
        for task in TASKS:
            result = run_task(self.example, task)
            self.assertEqual((result.returncode, result.stderr), (0, ""), task)
            self.assertIn(len(result.stdout.splitlines()), (1, 2), task)
        left = files_in(self.work)
        self.assertEqual(
            set(left), {"original.png", "small.png", "embedding.json", "class.json", os.path.join("site", "index.html")}
        )
        self.check_pictures()
        self.check_embedding()
        self.check_class()
        self.check_page()
        for task in TASKS:  # again, from another directory: the same bytes, and nothing else lies about
            self.assertEqual(run_task(self.example, task, cwd=self.directory).returncode, 0, task)
        self.assertEqual(files_in(self.work), left)

    def check_pictures(self) -> None:
        png = load_png(self.example)
        asset = (self.example / "assets" / "landscape.png").read_bytes()
        self.assertEqual((self.work / "original.png").read_bytes(), asset)
        original, small = png.decode(asset), png.decode((self.work / "small.png").read_bytes())
        self.assertEqual((original.width, original.height, original.channels), (320, 240, 3))
        self.assertEqual((small.width, small.height, small.channels), (64, 48, 3))
        for was, now in zip(mean_colour(original.pixels), mean_colour(small.pixels), strict=True):
            self.assertAlmostEqual(was, now, delta=0.5)
        for x, y in ((0, 0), (63, 0), (31, 23), (0, 47), (63, 47)):  # 5 x 5 originals make one: the right ones?
            area = b"".join(original.pixels[((5 * y + j) * 320 + 5 * x) * 3 :][:15] for j in range(5))
            for was, now in zip(mean_colour(area), small.pixels[(y * 64 + x) * 3 :][:3], strict=True):
                self.assertAlmostEqual(was, now, delta=0.51)

    def check_embedding(self) -> None:
        embedding = json.loads((self.work / "embedding.json").read_bytes())
        self.assertEqual(list(embedding["groups"]), ["red", "green", "blue", "edges"])
        for group, values in embedding["groups"].items():
            self.assertEqual(len(values), 8, group)
            self.assertAlmostEqual(sum(values), 1, places=4, msg=group)
        self.assertEqual(len(embedding["vector"]), 32)
        self.assertAlmostEqual(sum(value**2 for value in embedding["vector"]), 1, places=4)
        edges = embedding["groups"]["edges"]
        self.assertGreater(edges[3] + edges[4], 0.5)  # shore and skyline: brightness changes from top to bottom

    def check_class(self) -> None:
        decided = json.loads((self.work / "class.json").read_bytes())
        self.assertEqual(decided["class"], "day landscape")
        self.assertEqual(max(decided["scores"], key=decided["scores"].__getitem__), "day landscape")
        self.assertAlmostEqual(sum(decided["scores"].values()), 1, places=3)

    def check_page(self) -> None:
        page = (self.work / "site" / "index.html").read_text(encoding="utf-8")
        self.assertIn("<h1>This looks like: day landscape</h1>", page)
        pictures = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)]
        self.assertEqual(pictures, [(self.work / name).read_bytes() for name in ("original.png", "small.png")])
        self.assertEqual(page.count('<span class="bar '), 5 + 5 + 32)

    def test_elsewhere_by_environment(self) -> None:
        elsewhere = self.directory / "else" / "where"
        self.assertEqual(run_task(self.example, "download", IMAGE_PIPELINE_WORK=str(elsewhere)).returncode, 0)
        self.assertEqual(list(files_in(elsewhere)), ["original.png"])
        self.assertFalse(self.work.exists())


class RefusalTest(InTemporaryCopy):
    """What is missing or damaged ends a task with exit status 1 and one sentence, and leaves nothing behind."""

    def test_missing_input(self) -> None:
        for task, needs in (
            ("preprocess", "run tasks/download.py first"),
            ("embed", "run tasks/preprocess.py first"),
            ("classify", "run tasks/preprocess.py first"),
            ("publish", "run tasks/download.py first"),
        ):
            with self.subTest(task):
                self.assert_ends_with_a_sentence(run_task(self.example, task), task, "missing", needs)
                self.assertFalse(self.work.exists())

    def test_download(self) -> None:
        asset = self.example / "assets" / "landscape.png"
        whole = asset.read_bytes()
        for case, data in (
            ("one bit flipped", whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]),
            ("cut short", whole[:-100]),
            ("empty", b""),
        ):
            with self.subTest(case):
                asset.write_bytes(data)
                result = run_task(self.example, "download")
                self.assert_ends_with_a_sentence(result, "download", "is not the picture that was promised")
                self.assertFalse(self.work.exists())
        asset.unlink()
        self.assert_ends_with_a_sentence(run_task(self.example, "download"), "download", "cannot be fetched")
        asset.write_bytes(whole)
        asset.with_name("landscape.png.sha256").unlink()
        self.assert_ends_with_a_sentence(run_task(self.example, "download"), "download", "landscape.png.sha256")

    def test_damaged_input(self) -> None:
        self.work.mkdir()
        (self.work / "original.png").write_bytes(b"GIF89a")
        self.assert_ends_with_a_sentence(run_task(self.example, "preprocess"), "preprocess", "PNG signature")
        self.assertEqual(list(files_in(self.work)), ["original.png"])
        for name in ("small.png", "class.json", "embedding.json"):
            (self.work / name).write_bytes(b"{")
        self.assert_ends_with_a_sentence(run_task(self.example, "publish"), "publish", "class.json is not JSON")
        for name in ("class.json", "embedding.json"):
            (self.work / name).write_bytes(b"[]")
        self.assert_ends_with_a_sentence(run_task(self.example, "publish"), "publish", "not as its task leaves it")

    def test_work_is_a_file(self) -> None:
        self.work.write_text("in the way")
        self.assert_ends_with_a_sentence(run_task(self.example, "download"), "download", "cannot be written")

    def test_output_appears_whole_or_not_at_all(self) -> None:
        self.work.mkdir()
        before, output = self.directory / "before", self.work / "original.png"
        output.write_bytes(b"an older picture")
        os.link(output, before)
        self.assertEqual(run_task(self.example, "download").returncode, 0)
        self.assertEqual(before.read_bytes(), b"an older picture")  # replaced, not written over
        output.unlink()
        output.mkdir()
        self.assert_ends_with_a_sentence(run_task(self.example, "download"), "download", "cannot be written")
        self.assertEqual([path.name for path in self.work.iterdir()], ["original.png"])

    def test_page_escapes_what_it_shows(self) -> None:
        self.work.mkdir()
        for name in ("original.png", "small.png"):
            (self.work / name).write_bytes(b"any")
        evil = "<script>&\"'"
        decided = {"class": evil, "scores": {evil: 1.0}, "features": {evil: -2.0}}
        (self.work / "class.json").write_text(json.dumps(decided))
        (self.work / "embedding.json").write_text(json.dumps({"groups": {evil: [1.0]}, "vector": [1.0]}))
        self.assertEqual(run_task(self.example, "publish").returncode, 0)
        page = (self.work / "site" / "index.html").read_text(encoding="utf-8")
        self.assertNotIn("<script", page)
        self.assertEqual(page.count("&lt;script&gt;&amp;&quot;&#x27;"), 2 + 2 + 2)


class ClassifyTest(InTemporaryCopy):
    """The class follows from the picture: others than the example's give others."""

    def test_painted_pictures(self) -> None:
        png = load_png(self.example)
        self.work.mkdir()
        for expected, upper, lower in (
            ("night", (8, 10, 28), (10, 14, 14)),
            ("sunset", (235, 130, 70), (70, 40, 45)),
            ("forest", (60, 100, 45), (45, 85, 40)),
            ("fog or snow", (205, 208, 212), (215, 215, 218)),
            ("day landscape", (120, 170, 225), (90, 120, 60)),
        ):
            with self.subTest(expected):
                picture = png.Image(30, 20, 3, bytes(upper) * 300 + bytes(lower) * 300)
                (self.work / "small.png").write_bytes(png.encode(picture))
                self.assertEqual(run_task(self.example, "classify").returncode, 0)
                self.assertEqual(json.loads((self.work / "class.json").read_bytes())["class"], expected)
                self.assertEqual(run_task(self.example, "embed").returncode, 0)

    def test_one_flat_colour_has_no_edges(self) -> None:
        png = load_png(self.example)
        self.work.mkdir()
        (self.work / "small.png").write_bytes(png.encode(png.Image(1, 1, 3, b"\x10\x20\x30")))
        for task in ("embed", "classify"):
            result = run_task(self.example, task)
            self.assertEqual((result.returncode, result.stderr), (0, ""), task)
        self.assertEqual(json.loads((self.work / "embedding.json").read_bytes())["groups"]["edges"], [0.0] * 8)


def predicted(method: int, left: int, above: int, corner: int) -> int:
    """The five predictions as the PNG specification has them, written apart from the example's."""
    if method == 4:
        guess = left + above - corner
        to_left, to_above, to_corner = abs(guess - left), abs(guess - above), abs(guess - corner)
        if to_left <= to_above and to_left <= to_corner:
            return left
        return above if to_above <= to_corner else corner
    return (0, left, above, (left + above) // 2)[method]


def filtered(pixels: bytes, stride: int, channels: int, methods: list[int]) -> bytes:
    """The rows as a PNG stores them, row n with filter methods[n]."""
    stored = bytearray()
    for y, method in enumerate(methods):
        stored.append(method)
        for x in range(stride):
            at = y * stride + x
            left = pixels[at - channels] if x >= channels else 0
            above = pixels[at - stride] if y else 0
            corner = pixels[at - stride - channels] if y and x >= channels else 0
            stored.append((pixels[at] - predicted(method, left, above, corner)) % 256)
    return bytes(stored)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def header(width: int, height: int, depth: int = 8, colour_type: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlace))


END = chunk(b"IEND", b"")


class PngTest(InTemporaryCopy):
    def test_every_filter_in_every_colour_type(self) -> None:
        png = load_png(self.example)
        width, height = 16, 12
        for colour_type, channels in ((0, 1), (2, 3), (6, 4)):
            stride = width * channels
            few = (0, 1, 2, 3, 5, 254, 255)  # near neighbours, so that sums overflow and predictions are as near
            pixels = bytes(random.Random(colour_type).choices(few, k=height * stride))
            for methods in ([0] * 12, [1] * 12, [2] * 12, [3] * 12, [4] * 12, [4, 3, 2, 1, 0, 4] * 2):
                with self.subTest(channels=channels, methods=methods):
                    packed = zlib.compress(filtered(pixels, stride, channels, methods))
                    halves = (chunk(b"IDAT", packed[:9]), chunk(b"IDAT", packed[9:]))
                    text = chunk(b"tEXt", b"Comment\0passed over")
                    data = png_file(header(width, height, colour_type=colour_type), text, *halves, END)
                    self.assertEqual(png.decode(data), (width, height, channels, pixels))
            image = png.Image(width, height, channels, pixels)
            self.assertEqual(png.decode(png.encode(image)), image)

    def test_grey_and_transparent_become_rgb(self) -> None:
        png = load_png(self.example)
        self.work.mkdir()
        for channels, pixel, expected in ((1, b"\x50", b"\x50\x50\x50"), (4, b"\xff\x00\x64\x33", b"\xff\xcc\xe0")):
            with self.subTest(channels=channels):
                (self.work / "original.png").write_bytes(png.encode(png.Image(130, 1, channels, pixel * 130)))
                self.assertEqual(run_task(self.example, "preprocess").returncode, 0)
                small = png.decode((self.work / "small.png").read_bytes())
                self.assertEqual(small, (64, 1, 3, expected * 64))

    def test_refused(self) -> None:
        png = load_png(self.example)
        rows = chunk(b"IDAT", zlib.compress(b"\0" + bytes(6)))
        good = png_file(header(2, 1), rows, END)
        self.assertEqual(png.decode(good).pixels, bytes(6))
        for words, data in (
            ("signature", b""),
            ("signature", b"\x89PNG\n\x1a\n" + good[8:]),
            ("no IEND", good[:8]),
            ("no IEND", good[: -len(END)]),
            ("cut short", good[:-1]),
            ("damaged", good[:20] + b"\x01" + good[21:]),
            ("IHDR", png_file(rows, header(2, 1), END)),
            ("IHDR", png_file(chunk(b"IHDR", b"short"), END)),
            ("critical", png_file(header(2, 1), chunk(b"NEWS", b""), rows, END)),
            ("16 bits", png_file(header(2, 1, depth=16), rows, END)),
            ("colour type 3", png_file(header(2, 1, colour_type=3), rows, END)),
            ("interlaced", png_file(header(2, 1, interlace=1), rows, END)),
            ("pixels", png_file(header(0, 1), rows, END)),
            ("can be read", png_file(header(2**31 - 1, 2**31 - 1), rows, END)),
            ("unpack to", png_file(header(2, 2), rows, END)),
            ("unpack to", png_file(header(1, 1), rows, END)),
            ("unpack to", png_file(header(2, 1), END)),
            ("unpack to", png_file(header(2, 1), chunk(b"IDAT", zlib.compress(b"\0" + bytes(6))[:-2]), END)),
            ("unpacked", png_file(header(2, 1), chunk(b"IDAT", b"not zlib"), END)),
            ("filter 5", png_file(header(2, 1), chunk(b"IDAT", zlib.compress(b"\5" + bytes(6))), END)),
        ):
            with self.subTest(words), self.assertRaisesRegex(png.PngError, words):
                png.decode(data)


PRETENDED = f'exec {shlex.quote(sys.executable)} "$@"'  # what a shim of pyenv comes to
LEADS_BACK = """echo called >>"$HOME/calls"; [ "$AGAIN" ] && exit 1; AGAIN=1; export AGAIN; exec python "$@\""""


class PythonScriptTest(InTemporaryCopy):
    """bin/python, found as the steps find it: by a relative entry of PATH."""

    def run_step(self, command: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.example,
            env={"PATH": path, "HOME": str(self.directory)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SEC,
        )

    def pretend_python3(self, text: str, directory: str = "pretended") -> str:
        file = self.directory / directory / "python3"
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        return f"bin:{file.parent}:/nonexistent"

    def test_arguments_and_exit_status_pass_through(self) -> None:
        path = self.pretend_python3(PRETENDED)
        result = self.run_step("""python -c 'import sys; print(sys.argv[1:]); sys.exit(7)' 'a b' '' '*'""", path)
        self.assertEqual((result.returncode, result.stdout), (7, "['a b', '', '*']\n"), result.stderr)

    def test_usual_place_in_home(self) -> None:
        self.pretend_python3(PRETENDED, ".pyenv/shims")
        result = self.run_step("python -c 'print(1 + 1)'", "bin:/nonexistent")
        self.assertEqual((result.returncode, result.stdout), (0, "2\n"), result.stderr)

    def test_none_new_enough(self) -> None:
        if any(Path(place).exists() for place in ("/opt/conda/bin/python3", "/opt/local/bin/python3")):
            self.skipTest("this machine has a Python in one of the usual places outside the home directory")
        for case, text in (("too old", "exit 1"), ("leads back", LEADS_BACK)):
            with self.subTest(case):
                result = self.run_step("python tasks/download.py", self.pretend_python3(text, case.replace(" ", "-")))
                self.assertEqual((result.returncode, result.stdout), (127, ""))
                self.assertRegex(result.stderr, r"\Abin/python: no python3 of version 3\.9 or newer [^\n]+\.\n\Z")
        self.assertEqual((self.directory / "calls").read_text(), "called\n")


class WorkflowFileTest(InTemporaryCopy):
    def test_is_the_five_steps(self) -> None:
        workflow = json.loads((self.example / "workflow.json").read_bytes())
        self.assertEqual((workflow["workflow_id"], workflow["cwd"]), ("image_pipeline", "."))
        steps = [
            (step["id"], step["command"], step["depends_on"], step["retries"], step["timeout_sec"])
            for step in workflow["steps"]
        ]
        self.assertEqual(
            steps,
            [
                ("download", "python tasks/download.py", [], 2, 30),
                ("preprocess", "python tasks/preprocess.py", ["download"], 1, 20),
                ("embed", "python tasks/embed.py", ["preprocess"], 1, 60),
                ("classify", "python tasks/classify.py", ["preprocess"], 1, 60),
                ("publish", "python tasks/publish.py", ["embed", "classify"], 0, 15),
            ],
        )

    def test_first_command_runs_as_it_is_written(self) -> None:
        workflow = json.loads((self.example / "workflow.json").read_bytes())
        result = subprocess.run(
            ["/bin/sh", "-c", workflow["steps"][0]["command"]],
            cwd=self.example,
            env={"HOME": os.environ.get("HOME", "/")} | workflow["env"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SEC,
        )
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(list(files_in(self.work)), ["original.png"])


if __name__ == "__main__":
    unittest.main()
