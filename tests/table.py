"""The table that `make proofs` ends with: what was proven, by what, and what was measured.

A proof is a test in a file proof_*.py, which `make test` passes over. Its docstring is the claim;
the mark `by` names the tools that others made; `record_property("measured", ...)` adds figures.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if not item.path.name.startswith("proof_"):
        return report
    function = getattr(item, "function", None)
    claim = inspect.getdoc(function) or item.name
    mark = item.get_closest_marker("by")
    report.proof = (claim.split("\n\n")[0].replace("\n", " "), mark.args[0] if mark else "")
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if getattr(report, "proof", None) and (report.when == "call" or outcome != "passed"):
                rows.append(
                    (report.nodeid, outcome, *report.proof, _measured(report), report.duration)
                )
    if not rows:
        return
    terminalreporter.section("what was proven")
    terminalreporter.write_line("| claim | by | measured | | s |\n|---|---|---|---|---|")
    for _, outcome, claim, by, measured, seconds in sorted(rows):
        mark = {"passed": "yes"}.get(outcome, outcome.upper())
        terminalreporter.write_line(f"| {claim} | {by} | {measured} | {mark} | {seconds:.1f} |")


def _measured(report: pytest.TestReport) -> str:
    found = [str(value) for name, value in report.user_properties if name == "measured"]
    return textwrap.shorten("; ".join(found), 200)
