"""The project's pages in Markdown, and what the tests read in them: blocks of code, commands, names of files."""

import re
from pathlib import Path

import torch

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def text(page: str) -> str:
    """Text of a page, by its path from the repository's root."""
    return (ROOT / page).read_text()


def blocks(text: str, language: str = "") -> list[str]:
    """Blocks of code in one language; commands stand in blocks without a language."""
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S)


def block(text: str, word: str) -> str:
    """The only Python example that has `word` in it."""
    (found,) = [code for code in blocks(text, "python") if word in code]
    return found


def commands(text: str) -> list[str]:
    """Lines of the command blocks, joined where a backslash ends a line, without comments."""
    joined = "\n".join(blocks(text)).replace("\\\n", " ")
    return [line for line in (line.split("#")[0].strip() for line in joined.splitlines()) if line]


class Flat(torch.nn.Module):
    """A model that a page's loop can use: images of any size (n, 3, H, W) -> (n, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))
