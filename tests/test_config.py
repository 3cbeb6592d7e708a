"""Settings from flags, environment, TOML and defaults."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from anomalyd.config import from_table, load, options, setting
from anomalyd.errors import UsageError


@dataclass(frozen=True)
class Kiln:
    """Settings of every supported type."""

    heat: int = setting(900, help="degrees Celsius", low=0, high=2000)
    hours: float = setting(1.5, help="firing time, hours", low=0)
    glaze: str = setting("clear", help="the glaze", choices=("clear", "blue"))
    fan: bool = setting(True, help="run the fan")
    log: Path | None = setting(None, help="where the log goes")
    shelves: tuple[str, ...] = setting((), help="shelves to fill", flag="--shelf")
    secret: str | None = setting(None, help="no flag", flag="")


def fire(*args: str) -> Kiln:
    """The settings that a command line makes."""
    made = []

    @click.command()
    @options(Kiln)
    def command(**flags):
        made.append(load(Kiln, flags=flags))

    result = CliRunner().invoke(command, args)
    assert result.exit_code == 0, result.output
    return made[0]


def test_defaults():
    """Nothing given means every default."""
    assert fire() == load(Kiln, flags={}) == Kiln()


def test_flags_of_every_type():
    """Every field type has a flag that sets it."""
    kiln = fire("--heat=1", "--hours=2", "--no-fan", "--log=a", "--shelf=x", "--shelf=y")
    assert kiln == Kiln(heat=1, hours=2.0, fan=False, log=Path("a"), shelves=("x", "y"))


def test_help_shows_defaults_and_hides_flagless():
    """The help of an option ends with its default; a setting without flag has none."""

    @click.command()
    @options(Kiln)
    def command(**flags):
        pass

    text = CliRunner().invoke(command, ["--help"]).output
    assert "degrees Celsius" in text
    assert "[default: 900]" in text
    assert "secret" not in text


def test_a_flag_out_of_range_is_a_usage_error_of_click():
    """Click refuses what lies outside the range, exit code 2."""

    @click.command()
    @options(Kiln)
    def command(**flags):
        pass

    assert CliRunner().invoke(command, ["--heat=3000"]).exit_code == 2


def test_precedence(tmp_path, monkeypatch):
    """Flag beats environment beats TOML beats default."""
    file = tmp_path / "kiln.toml"
    file.write_text('[kiln]\nheat = 1\nhours = 2\nglaze = "blue"\nshelves = ["a"]\n')
    monkeypatch.setenv("KILN_HEAT", "10")
    monkeypatch.setenv("KILN_HOURS", "20")
    monkeypatch.setenv("KILN_FAN", "off")
    flags = {"heat": 100, "shelves": ()}
    kiln = load(Kiln, flags=flags, env="KILN_", file=file, table="kiln")
    assert kiln == Kiln(heat=100, hours=20.0, glaze="blue", fan=False, shelves=("a",))


@given(
    st.integers(0, 2000),
    st.floats(0, 1e6),
    st.sampled_from(["clear", "blue"]),
    st.booleans(),
    st.lists(st.text()),
)
def test_a_table_round_trips(heat, hours, glaze, fan, shelves):
    """Every value of the right type and range is taken over as it is."""
    table = {"heat": heat, "hours": hours, "glaze": glaze, "fan": fan, "shelves": shelves}
    kiln = from_table(Kiln, table, "here")
    assert kiln == Kiln(heat=heat, hours=hours, glaze=glaze, fan=fan, shelves=tuple(shelves))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"haet": 1}, "here: unknown key haet; the nearest known one is heat"),
        ({"zzz": 1}, "here: unknown key zzz; the nearest known one is"),
        ({"heat": "hot"}, "here: heat must be a whole number, not 'hot'"),
        ({"heat": True}, "here: heat must be a whole number, not True"),
        ({"heat": 1.5}, "here: heat must be a whole number, not 1.5"),
        ({"heat": -1}, "here: heat must be at least 0, not -1"),
        ({"heat": 2001}, "here: heat must be at most 2000, not 2001"),
        ({"hours": float("nan")}, "here: hours must be at least 0, not nan"),
        ({"glaze": "red"}, "here: glaze must be one of clear, blue, not 'red'"),
        ({"fan": 1}, "here: fan must be true or false, not 1"),
        ({"log": 3}, "here: log must be a path, not 3"),
        ({"shelves": "a"}, "here: shelves must be a list of texts, not 'a'"),
        ({"shelves": [1]}, "here: shelves must be a list of texts, not (1,)"),
    ],
)
def test_a_bad_table_is_refused(table, message):
    """The error names the place, the key, the rule and the value."""
    with pytest.raises(UsageError) as caught:
        from_table(Kiln, table, "here")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        (
            "KILN_HAET",
            "1",
            "environment: unknown key KILN_HAET; the nearest known one is KILN_HEAT",
        ),
        ("KILN_HEAT", "tcp://1", "environment KILN_HEAT must be a whole number, not 'tcp://1'"),
        ("KILN_FAN", "maybe", "environment KILN_FAN must be true or false, not 'maybe'"),
    ],
)
def test_a_bad_variable_is_refused(monkeypatch, variable, text, message):
    """The error names the variable as the user wrote it."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError) as caught:
        load(Kiln, flags={}, env="KILN_")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("heat = ", "not valid TOML"),
        ("\xff", "not valid TOML"),
        ("[klin]\nheat = 1", "has no table [kiln]; it holds [klin]"),
        ("", "has no table [kiln]; it holds nothing"),
        ("[kiln]\nhaet = 1", "kiln.toml [kiln]: unknown key haet"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    """A file that is missing, malformed or without the table says so in one line."""
    file = tmp_path / "kiln.toml"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        load(Kiln, flags={}, file=file, table="kiln")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_required_setting():
    """A field without default must be given somewhere."""

    @dataclass(frozen=True)
    class Jar:
        lid: str

    globals()["Jar"] = Jar
    with pytest.raises(UsageError, match="here: lid is required"):
        from_table(Jar, {}, "here")
    assert from_table(Jar, {"lid": "cork"}, "here") == Jar("cork")


def test_config_imports_nothing_heavy():
    """`--help` pays for neither numpy nor onnxruntime."""
    code = (
        "import sys, anomalyd.config; print({'numpy', 'onnxruntime', 'click'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
