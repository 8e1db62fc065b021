"""Pytest plugin that runs only the tests listed in a file: `pytest -p pytest_only --only-tests FILE`.

FILE has one test id per line. An id that no longer exists is printed and the others run; on the command line it would
be an error.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--only-tests", type=Path, help="file of test ids to run, one per line")


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
