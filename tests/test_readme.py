"""README's commands, run as they stand; what they print is compared with what README shows."""

from __future__ import annotations

import contextlib
import http.client
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


def comparable(text: str) -> list[str]:
    """Words, with long numbers cut: the last digits are the machine's."""
    text = re.sub(r"[─━┃│┏┓┗┛┡┩└┘├┤┬┴┼╇╈]+", " ", text)
    return [re.sub(r"(\d+\.\d\d)\d+", r"\1", word) for word in text.split()]


def matches(shown: str, printed: str) -> bool:
    """README may cut output with `...`; every line it does show must be there."""
    if "..." in shown:
        return all(
            " ".join(comparable(line)) in " ".join(comparable(printed))
            for line in shown.replace("...", "").splitlines()
            if line.strip()
        )
    return comparable(shown) == comparable(printed)


@pytest.mark.parametrize(("command", "shown"), [c for c in LOCAL if not c[0].startswith(SKIPPED)])
def test_command_prints_what_readme_shows(command, shown, tmp_path):
    """Each command runs in the repository and prints the lines that stand below it."""
    if "../shared/data" in command and not (ROOT / "../shared/data").is_dir():
        pytest.skip("needs the full data sets at ../shared/data")
    printed = run(command.replace("--output ", f"--output {tmp_path}/"), ROOT)

    assert matches(shown, printed), printed


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
    assert comparable(shown) == comparable(done.stdout)


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
