"""The campaign's figures are shown, whether or not its tests pass."""

from __future__ import annotations

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        lines = [line for line in report.capstdout.splitlines() if line.startswith("campaign: ")]
        item.config.stash.setdefault(LINES, []).extend(lines)
    return report


LINES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
