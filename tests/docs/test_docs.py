"""Pages at the root, tests/README.md and docs/: links, named files, commands, examples, bad input."""

import ast
import inspect
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, Flat, block, commands, prose, text
from problems import needs_cpu_kernels

from bam_kernels import BAMLoss, GradientCache, bam_loss, sinkhorn_attention

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", NAMES)


def anchors(file: Path) -> set[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(file.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text(page))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


def test_every_page_is_reached_from_the_readme():
    reached, left = set(), ["README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([^)\s#]+\.md)", text(page)):
            file = ((ROOT / page).parent / link).resolve()
            if file in PAGES and (name := str(file.relative_to(ROOT))) not in reached:
                left.append(name)
    assert reached == set(NAMES)


@each_page
def test_named_files_exist(page):
    outside_links = re.sub(r"\]\([^)]*\)", "]", text(page))
    named = re.findall(r"(?<![\w/.-])((?:bam_kernels|benchmarks|csrc|docs|driver|tests)/[\w./*-]*)", outside_links)
    assert [name for name in named if "NAME" not in name and not list(ROOT.glob(name.rstrip("./")))] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "tests/README.md"])
def test_files_named_without_their_folder_exist(page):
    named = re.findall(r"`([\w*]+\.(?:py|cpp|cu|h))`", text(page))
    assert len(named) > 10
    assert [name for name in named if not list(ROOT.glob(f"[a-z]*/**/{name}")) and not (ROOT / name).is_file()] == []


def sources(command: str) -> tuple[list[str], list[Path]] | None:
    """Options of a command that runs a program of this project, and the sources that may define them.

    None for other commands. The first source is the program itself.
    """
    words = shlex.split(command)
    for i, word in enumerate(words):
        if word.startswith("benchmarks/"):
            file = ROOT / word
        elif word == "-m" and words[i + 1].startswith("bam_kernels"):
            file = ROOT / (words[i + 1].replace(".", "/") + ".py")
            file = file if file.is_file() else file.with_suffix("") / "__main__.py"
        else:
            continue
        options = [w.removeprefix("--") for w in words[i + 1 :] if w.startswith("--")]
        return options, [file, *file.parent.glob("*.py"), *file.parent.parent.glob("*.py")]
    return None


PROGRAMS = [(page, line) for page in NAMES for line in commands(text(page)) if sources(line)]


def test_the_commands_are_there():
    assert len(PROGRAMS) >= 14


@pytest.mark.parametrize("page, line", PROGRAMS, ids=[line[:60] for _, line in PROGRAMS])
def test_programs_have_the_options_that_are_given(page, line):
    """An option is an argument `--name` of argparse, or a field `name` of a dataclass that tyro reads."""
    options, files = sources(line)
    assert files[0].is_file()
    code = "\n".join(file.read_text() for file in files)
    for option in options:
        assert f'"--{option}"' in code or re.search(rf"^    {option.replace('-', '_')}: ", code, re.M), option


@pytest.mark.parametrize("page, word", [("docs/loss.md", "stats.uniform_loss"), ("docs/ranks.md", "cache = ")])
def test_the_loops_train(page, word):
    model = Flat()
    before = model.linear.weight.clone()
    batch = torch.rand(2, 4, 3, 8, 8)
    names = {"optimiser": torch.optim.SGD(model.parameters(), 1.0)}
    if page == "docs/loss.md":
        names |= {"model": model, "loader": [batch]}
    else:
        names |= {"model": Views(model), "loader": [[batch, torch.rand(2, 4, 3, 8, 8)]]}
    exec(block(text(page), word), names)
    assert names["loss"].isfinite() and names["stats"].target_entropy <= names["loss"]
    assert not torch.equal(model.linear.weight, before)


class Views(torch.nn.Module):
    """(V, b, 3, H, W) -> (V, b, D)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return self.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])


def test_options_of_the_loss_and_their_defaults():
    """Every option of bam_loss has a row; a default that is a literal is the function's."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text("docs/loss.md"), re.M))
    parameters = dict(list(inspect.signature(bam_loss).parameters.items())[2:])
    assert set(rows) == set(parameters)
    literals = {name: rows[name] for name in rows if re.fullmatch(r'[\d.]+|True|False|"\w+"', rows[name])}
    assert len(literals) >= 12
    assert {name: ast.literal_eval(value) for name, value in literals.items()} == {
        name: parameters[name].default for name in literals
    }


# The table of bad input

ROWS = re.findall(
    r"^\| `((?:bam_loss|BAMLoss|GradientCache|sinkhorn_attention)\(.*)` \| `(\w+Error): (.*)` \|$",
    text("docs/errors.md"),
    re.M,
)
CALLED = {
    "bam_loss": bam_loss,
    "BAMLoss": BAMLoss,
    "GradientCache": GradientCache,
    "sinkhorn_attention": sinkhorn_attention,
    "model": torch.nn.Linear(8, 8),
    "nan": math.nan,
}


def test_the_table_is_there():
    assert len(ROWS) >= 12


@needs_cpu_kernels
@pytest.mark.parametrize("call,error,message", ROWS, ids=[row[0] for row in ROWS])
def test_bad_input(call, error, message):
    """Each call of the table raises the error beside it."""
    with pytest.raises((ValueError, TypeError)) as raised:
        eval(call, CALLED | {"z": torch.ones(30, 8)})
    assert (type(raised.value).__name__, str(raised.value)) == (error, message)
