"""README's commands, run as they stand; what they print is compared with what README shows."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "8080"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """(command, output shown) of every console block."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.replace("\\\n", " ").partition("\n")
            found.append((command.strip(), output))
    return found


FAR = "--engine ray"  # tests/cluster/proof_scale_out.py runs these
LOCAL = [(c, o) for c, o in commands() if c.startswith("anomalyd ") and "serve" not in c]
LOCAL = [(c, o) for c, o in LOCAL if FAR not in c]
CURLS = [(c, o) for c, o in commands() if c.startswith("curl ")]
SKIPPED = (
    "python3 -m venv ",
    "make ",
    "pip install",
    "anomalyd serve",
    "anomalyd train",
    "anomalyd compose",
    "torchrun ",
)


def run(command: str, cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 3), done.stderr
    return done.stdout


NUMBER = re.compile(r"\d+\.\d+(?:e-?\d+)?")


def alike(shown: str, printed: str) -> bool:
    """The same words, with fractions within 2 %: the last digits are the machine's."""
    one, other = (" ".join(NUMBER.sub(" # ", text).split()) for text in (shown, printed))
    numbers = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=False)
    return one == other and all(
        math.isclose(float(a), float(b), rel_tol=0.02, abs_tol=1e-9) for a, b in numbers
    )


def matches(shown: str, printed: str) -> bool:
    """README may cut output with `...`; every line it does show must be there, in its order."""
    if "..." not in shown:
        return alike(shown, printed)
    lines = iter(printed.splitlines())
    wanted = [line for line in shown.splitlines() if line.strip() not in ("", "...")]
    return all(any(alike(line, found) for found in lines) for line in wanted)


@pytest.mark.parametrize(("command", "shown"), [c for c in LOCAL if not c[0].startswith(SKIPPED)])
def test_command_prints_what_readme_shows(command, shown, tmp_path):
    """Each command runs in the repository and prints the lines that stand below it."""
    printed = run(command.replace("--output ", f"--output {tmp_path}/"), ROOT)

    assert matches(shown, printed), printed


def test_output_is_compared_word_by_word_and_number_by_number():
    """A number may be off by 2 %, a word, a count or an order by nothing."""
    assert alike("a  0.00917\nOUTLIER 4.50", "a 0.00925\nOUTLIER 4.5")
    assert not alike("a 0.00917", "a 0.00957")
    assert not alike("caught 19 of 20", "caught 18 of 20")
    assert not alike("OUTLIER 1.0", "normal 1.0")
    assert not alike("1.0 2.0", "1.0")
    assert matches("a 1.0\n...\nc 3.0\n", "a 1.01\nb 2.0\nc 3.0\nd 4.0\n")
    assert not matches("c 3.0\n...\na 1.0\n", "a 1.0\nb 2.0\nc 3.0\n")


@contextlib.contextmanager
def daemon() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = [str(Path(sys.executable).with_name("anomalyd")), "serve", "--port", port]
    process = subprocess.Popen(
        [*program, "--default-model", "fashion-mnist-vae"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=5)
                with contextlib.closing(connection):
                    connection.request("GET", "/readyz")
                    if connection.getresponse().status == 200:
                        break
            assert process.poll() is None
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_curl_lines_are_answered_as_shown():
    """The daemon with every bundle of trained/ answers README's curl lines."""
    with daemon() as port:
        for command, shown in CURLS:
            printed = run(command.replace(f":{PORT}", f":{port}"), ROOT)
            assert matches(shown, printed), (command, printed)


def test_python_example_runs():
    """The library example works from the repository."""
    (example,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    shown = "".join(re.findall(r"# (.*)", example))
    assert alike(shown, done.stdout)


def test_every_console_line_is_run_or_known():
    """A command in README that no test runs is one of the few that set things up."""
    for command, _ in commands():
        first = shlex.split(command)[0]
        assert first in ("anomalyd", "curl") or command.startswith(SKIPPED), command


def test_first_code_block_comes_early_and_links_lead_somewhere():
    """A code block before line 20; relative links name files that exist."""
    lines = README.splitlines()

    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```")) < 20
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
