"""deploy/README.md as an operator follows it: each command as it stands, each output as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import DEPLOY, ROOT, as_root, run, tool

README = (DEPLOY / "README.md").read_text(encoding="utf-8")
# What needs an init system, a container engine or a cluster at work.
ENGINES = ("systemctl ", "docker ", "kubectl ")
MARK = "---- the next command ----"
# A network of its own, so that the ports of the page are free; a private /etc and /srv.
ALONE = ("--net", "--pid", "--fork", "--kill-child", "--mount-proc")
PRIVATE = """
mount -t tmpfs tmpfs /srv
mkdir /srv/upper /srv/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/srv/upper,workdir=/srv/work /etc
mount -t tmpfs tmpfs /srv
"""


def section(title: str) -> list[tuple[str, str]]:
    """(command, output shown) of the console blocks under a heading."""
    text = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, shown = part.partition("\n")
            found.append((command, shown))
    assert found, title
    return found


def follow(commands: list[tuple[str, str]], before: str, *launcher: str, cwd: Path = ROOT) -> None:
    """Run commands in one shell, and compare what each printed with what is shown."""
    commands = [line for line in commands if not line[0].startswith(ENGINES)]
    lines = ["set -e", before]
    for command, _ in commands:
        lines += [command, f"echo; echo '{MARK}'"]
    done = run(*launcher, tool("bash"), "-c", "\n".join(lines), timeout=900, cwd=cwd)
    printed = done.stdout.split(MARK)
    assert len(printed) == len(commands) + 1
    for (command, shown), answer in zip(commands, printed, strict=False):
        assert matches(shown, answer), f"$ {command}\n{answer}"


def matches(shown: str, printed: str) -> bool:
    """Whether the output is what is shown; `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.S) is not None


@pytest.mark.by("apt, pip, bash")
def test_install():
    """deploy/README.md: its installation runs as it stands."""
    as_root()
    follow(section("1. Install"), "")


@pytest.mark.by("bash, curl, Debian's prometheus, promtool")
def test_serve_and_watch(record_property):
    """deploy/README.md: from the daemon to Prometheus queries, each command prints what the page
    shows."""
    as_root()
    commands = [*section("2. Serve"), *section("3. Watch")]
    prepared = "ip link set lo up\nrm -rf /tmp/anomalyd-prometheus"
    follow(commands, prepared, tool("unshare"), *ALONE)
    record_property("measured", f"{len(commands)} commands")


@pytest.mark.by("bash, systemd-analyze")
def test_service():
    """deploy/README.md: the service's files, put where it says, are accepted there."""
    as_root()
    follow(section("As a service"), PRIVATE, tool("unshare"), "--mount")


def test_every_command_is_run_or_needs_an_engine():
    """deploy/README.md: no command stands there that no proof runs, but those of engines."""
    proven = ("1. Install", "2. Serve", "3. Watch", "As a service")
    for title in re.findall(r"^## (.*)$", README, re.M):
        if title not in proven and "```console" in README.partition(f"## {title}")[2]:
            assert all(command.startswith(ENGINES) for command, _ in section(title)), title
