"""A pytest plugin that runs listed tests alone: `pytest -p pytest_only --only-tests FILE`, one id a line of FILE.

Unlike ids on the command line, one that is no longer there is no error: it is named, and the others run.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-tests", type=Path, help="file of test ids, one a line")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--only-tests")
    if file is None:
        return
    wanted = set(file.read_text().splitlines())
    chosen = [item for item in items if item.nodeid in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    for name in sorted(wanted - {item.nodeid for item in chosen}):
        print(f"no longer there: {name}")
    items[:] = chosen
