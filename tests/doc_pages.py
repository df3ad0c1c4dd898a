"""The pages, and what stands in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\S+).*\n(?P<code>(?:.*\n)*?)```$", re.M)
CONTINUES = re.compile(r"<!-- continues (\S+) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The page that it stands in.
        line: Its first line of code, from 1.
        language: What follows the fence.
        code: What is fenced.
        reason: Why it is not run, where a mark says so.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = page.read_text("utf-8")
    return [
        Block(page, 1 + text[: found.start("code")].count("\n"), found["language"], found["code"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


def script(page: Path) -> list[Block]:
    """Return the blocks of Python that run one after the other, those of the page that it continues first."""
    continued = CONTINUES.match(page.read_text("utf-8"))
    before = script(ROOT / "docs" / continued[1]) if continued else []
    return [*before, *(block for block in blocks(page) if block.language == "python" and block.reason is None)]


def name(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()
