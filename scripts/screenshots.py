"""Make the pictures of the documentation: a report, a card, and what commands print. Needs Chromium and chromedriver.

    python scripts/screenshots.py                     # about five minutes: trains examples/recipes/images.yaml first
    python scripts/screenshots.py --folder build/run  # the same; a second time what is there is not made again

Everything shown is what the commands wrote and printed. Three things are changed: the address of the folder is
replaced by ~, further lines of progress by "...", and colors are reduced to 256.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import itertools
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import load_dataset
from markdown_it import MarkdownIt
from PIL import Image
from transformers import AutoImageProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser, browser  # noqa: E402

from hf_semckd.files import write_atomic  # noqa: E402

PICTURES = ROOT / "docs" / "_static" / "pictures"
DIGITS = Path("data") / "recipes" / "digits"
RUN = "outputs/images"
COMMANDS = {
    "distill": "hf-semckd distill examples/recipes/images.yaml",
    "inspect": f"hf-semckd inspect {RUN} {RUN}/teacher",
    "evaluate": f"hf-semckd evaluate teacher={RUN}/teacher student={RUN} --dataset prepared",
}
# Width and height of the page, and whether it is dark.
REPORTS = {"report-light": (1060, 1500, False), "report-dark": (1060, 1500, True), "report-phone": (390, 1100, False)}
CARD = (900, 1500)
WIDTH = "100"
SHARPNESS = 1.5
RECTANGLE = "document.body.firstElementChild.getBoundingClientRect()"
# Lines of progress that are kept of each training.
FIRST, LAST = 3, 2
STEP = re.compile(r"^(\w+) +step \d+/")

TERMINAL = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
body {{ margin: 0; background: #fff }}
pre {{ margin: 0; width: max-content; padding: 18px 22px; border-radius: 8px; background: #1f2430; color: #d8dee9;
  font: 13px/1.45 "DejaVu Sans Mono", monospace }}
b {{ color: #8fbcbb; font-weight: 600 }}
</style><pre><b>$ {command}</b>
{text}</pre>"""

PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<base href="{base}"><style>
body {{ margin: 0; padding: 24px 32px; color: #1f2328; font: 15px/1.55 "DejaVu Sans", sans-serif }}
h1, h2 {{ border-bottom: 1px solid #d0d7de; padding-bottom: 4px }}
table {{ border-collapse: collapse; font-size: 13px }} td, th {{ border: 1px solid #d0d7de; padding: 4px 8px }}
code {{ font: 13px "DejaVu Sans Mono", monospace; background: #f0f2f4; padding: 1px 4px }}
pre {{ background: #f6f8fa; padding: 12px }} pre code {{ background: none; padding: 0 }} img {{ max-width: 100% }}
</style>{body}"""


def run_commands(folder: Path) -> None:
    """Run every command in a folder that has the recipes and their data; keep what each prints as NAME.txt."""
    if not (ROOT / DIGITS).is_dir():
        subprocess.run([sys.executable, "examples/recipes/prepare.py", "digits"], cwd=ROOT, check=True)
    for name in ("data", "examples"):
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(ROOT / name)
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": WIDTH}
    for name, command in COMMANDS.items():
        if name == "evaluate":
            prepare_digits(folder)
        if not (folder / f"{name}.txt").exists():
            print(f"$ {command}", flush=True)
            words = [sys.executable, "-m", "hf_semckd", *shlex.split(command)[1:]]
            write_atomic(folder / f"{name}.txt", printed(words, folder, settings).encode())


def printed(words: list[str], folder: Path, settings: Mapping[str, str]) -> str:
    """Return what a command prints where its output is a terminal, to whose width tables are fitted."""
    own, its = pty.openpty()
    with subprocess.Popen(words, cwd=folder, env=settings, stdout=its, stdin=subprocess.DEVNULL) as process:
        os.close(its)
        parts = []
        with contextlib.suppress(OSError):  # the end of a terminal, on Linux
            while part := os.read(own, 2**16):
                parts.append(part)
        os.close(own)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed with status {process.returncode}")
    return b"".join(parts).decode().replace("\r\n", "\n")


def prepare_digits(folder: Path) -> None:
    """Write the images to evaluate on as `hf-semckd evaluate` takes them."""
    processor = AutoImageProcessor.from_pretrained(folder / RUN)

    def encode(rows: dict) -> dict:
        pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="np")["pixel_values"]
        return {"pixel_values": pixels, "labels": rows["label"]}

    if not (folder / "prepared").exists():
        images = load_dataset(str(ROOT / DIGITS / "images"), split="test")
        images.map(encode, batched=True, remove_columns=images.column_names).save_to_disk(folder / "prepared")


def terminal_page(command: str, text: str, folder: Path) -> str:
    """Return a page that looks like a terminal, with what a command printed in a folder."""
    said = "\n".join(fewer_steps(text.strip().splitlines())).replace(folder.absolute().as_uri(), "file://~")
    return TERMINAL.format(command=html.escape(command), text=html.escape(said.replace(str(folder.absolute()), "~")))


def fewer_steps(lines: list[str]) -> Iterator[str]:
    """Yield lines, of many in a row that tell one training's progress the first and the last ones."""
    for topic, group in itertools.groupby(lines, lambda line: "".join(STEP.findall(line))):
        entries = list(group)
        if not topic or len(entries) <= FIRST + LAST:
            yield from entries
        else:
            yield from [*entries[:FIRST], f"{topic:10}...", *entries[-LAST:]]


def card_page(folder: Path) -> str:
    """Return a model card as a page; what is in front of its title is for the Hub's search."""
    text = re.sub(r"\A---\n.*?\n---\n", "", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    return PAGE.format(base=f"{folder.absolute().as_uri()}/", body=body)


def picture_of(window: Browser, page: Path, width: int, height: int | None = None, *, dark: bool = False) -> bytes:
    """Return a page as a PNG of 256 colors; without a height, what its first element covers."""
    window.show(page, width, dark=dark)
    if height is None:
        width, height = window.ask(f"['right', 'bottom'].map(side => Math.ceil({RECTANGLE}[side]))")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": SHARPNESS}
    shot = window.devtools("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    written = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return written.getvalue()


def take_pictures(folder: Path) -> dict[str, bytes]:
    """Return the pictures by name."""
    found = {}
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as window:
        for name, command in COMMANDS.items():
            page = folder / f"{name}.html"
            text = (folder / f"{name}.txt").read_text(encoding="utf-8")
            page.write_text(terminal_page(command, text, folder), encoding="utf-8")
            found[name] = picture_of(window, page, 1600)
        for name, (width, height, dark) in REPORTS.items():
            found[name] = picture_of(window, folder / RUN / "report.html", width, height, dark=dark)
        page = folder / "card.html"
        page.write_text(card_page(folder / RUN), encoding="utf-8")
        found["card"] = picture_of(window, page, *CARD)
    return found


def main() -> None:
    """Run the commands and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the training and what was printed here")
    parser.add_argument("--output_dir", type=Path, default=PICTURES, help="default: docs/_static/pictures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run_commands(folder)
        for name, picture in take_pictures(folder).items():
            path = write_atomic(options.output_dir / f"{name}.png", picture)
            print(f"{path}  {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
