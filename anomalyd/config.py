"""Settings: one frozen dataclass a phase is the only place where a setting is defined.

Flags, environment variables and TOML keys are derived from its fields, and the first that is
given wins: flag > environment > TOML > default.

    @dataclass(frozen=True)
    class ServeSettings:
        port: int = setting(8080, help="TCP port; 0 takes a free one", low=0, high=65535)

    @click.command()
    @options(ServeSettings)
    def serve(**flags): main(load(ServeSettings, flags=flags, env="ANOMALYD_SERVE_"))
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from anomalyd.errors import UsageError

__all__ = ["check_key", "from_table", "load", "options", "setting"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

TRUTHS = {"1": True, "true": True, "yes": True, "on": True}
TRUTHS |= {"0": False, "false": False, "no": False, "off": False}
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
KINDS |= {Path: "a path", tuple: "a list of texts"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a field's default and type do not say."""

    help: str
    flag: str | None
    choices: tuple[str, ...] | None
    metavar: str | None
    low: float | None
    high: float | None


def setting(
    default: Any,
    *,
    help: str,
    flag: str | None = None,
    choices: Collection[str] | None = None,
    metavar: str | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: its value where nothing is given.
        help: one sentence with the unit, for `--help` and the documentation.
        flag: the option's spelling; None derives it from the name, "" makes no option.
        choices: the only values allowed.
        metavar: the placeholder in `--help`.
        low: the smallest number allowed.
        high: the largest number allowed.
    """
    allowed = None if choices is None else tuple(choices)
    described = Setting(help, flag, allowed, metavar, low, high)
    return dataclasses.field(default=default, metadata={"setting": described})


def options(cls: type[Any]) -> Callable[[F], F]:
    """A decorator that adds one click option for each setting of `cls`, in field order.

    An option that is not given passes None (a repeatable one an empty tuple), which `load` skips.
    """
    import click

    def decorate(command: F) -> F:
        for field in reversed(dataclasses.fields(cls)):
            described = field.metadata.get("setting")
            if described is None or described.flag == "":
                continue
            kind = _kind(cls, field.name)
            default = field.default
            shown = "" if default in (None, ()) else f"  [default: {_shown(default)}]"
            command = click.option(
                described.flag or _flag(field.name, kind),
                field.name,
                type=_click_type(kind, described),
                multiple=kind is tuple,
                default=None,
                metavar=described.metavar,
                help=described.help + shown,
            )(command)
        return command

    return decorate


def load(
    cls: type[T],
    *,
    flags: Mapping[str, Any],
    env: str | None = None,
    file: Path | None = None,
    table: str | None = None,
) -> T:
    """The settings of one phase: flag > environment > TOML > default.

    Args:
        cls: a frozen dataclass whose fields are settings.
        flags: field name to value; None and () mean "not given".
        env: prefix of the environment variables (`ANOMALYD_SERVE_` reads `ANOMALYD_SERVE_PORT`).
        file: a TOML file.
        table: the table of `file` that holds the settings; None takes the whole file.

    Raises:
        UsageError: a file that cannot be read, an unknown key, a value of a wrong type or range.
    """
    given: dict[str, Any] = {}
    if file is not None:
        where = f"{file} [{table}]" if table else str(file)
        given |= _checked(cls, _read(file, table), where)
    if env is not None:
        given |= _environment(cls, env)
    chosen = {name: value for name, value in flags.items() if value is not None and value != ()}
    given |= _checked(cls, chosen, "command line")
    return _built(cls, given, "settings")


def from_table(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """The settings in a mapping of plain values (a TOML table); `where` names it in errors.

    Raises:
        UsageError: an unknown key, a value of a wrong type or range, a missing setting.
    """
    return _built(cls, _checked(cls, mapping, where), where)


def _built(cls: type[T], given: dict[str, Any], where: str) -> T:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # T is a dataclass
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in given:
            raise UsageError(f"{where}: {field.name} is required")
    return cls(**given)


def _read(file: Path, table: str | None) -> Mapping[str, Any]:
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from error
    if table is None:
        return content
    chosen = content.get(table)
    if not isinstance(chosen, dict):
        found = ", ".join(f"[{name}]" for name in content) or "nothing"
        raise UsageError(f"{file}: has no table [{table}]; it holds {found}")
    return chosen


def _environment(cls: type[Any], prefix: str) -> dict[str, Any]:
    given = {}
    for variable, text in os.environ.items():
        if variable.startswith(prefix):
            name = variable.removeprefix(prefix).lower()
            check_key(name, _names(cls), "environment", spelling=lambda n: prefix + n.upper())
            where = f"environment {variable}"
            given[name] = _check(cls, name, _parsed(_kind(cls, name), text), where)
    return given


def _checked(cls: type[Any], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    checked = {}
    for name, value in mapping.items():
        check_key(name, _names(cls), where)
        checked[name] = _check(cls, name, value, f"{where}: {name}")
    return checked


def check_key(
    name: str,
    known: Collection[str],
    where: str,
    spelling: Callable[[str], str] = lambda name: name,
    kind: str = "key",
) -> None:
    """Refuse a key that is not among the `known`, naming the nearest.

    Raises:
        UsageError: the key is unknown.
    """
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UsageError(
            f"{where}: unknown {kind} {spelling(name)}; the nearest known one is "
            f"{spelling(nearest)}"
        )


def _names(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _check(cls: type[Any], name: str, value: Any, where: str) -> Any:
    """`value` as the field's type; refuses what is not of that type, range or choice."""
    kind = _kind(cls, name)
    value = _converted(kind, value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if right and kind is tuple:
        inner = _inner(cls, name)
        value = tuple(_converted(inner, item) for item in value)
        right = all(isinstance(item, inner) for item in value)
    if not right:
        raise UsageError(f"{where} must be {KINDS[kind]}, not {value!r}")
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    described = field.metadata.get("setting")
    if described is not None:
        _check_range(described, value, where)
    return value


def _check_range(described: Setting, value: Any, where: str) -> None:
    if described.choices is not None and value not in described.choices:
        choices = ", ".join(described.choices)
        raise UsageError(f"{where} must be one of {choices}, not {value!r}")
    # Written so that NaN is refused as well.
    if described.low is not None and not value >= described.low:
        raise UsageError(f"{where} must be at least {described.low:g}, not {value}")
    if described.high is not None and not value <= described.high:
        raise UsageError(f"{where} must be at most {described.high:g}, not {value}")


def _converted(kind: type[Any], value: Any) -> Any:
    """TOML knows neither paths nor tuples, and writes whole floats as integers."""
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return tuple(value) if kind is tuple and isinstance(value, list) else value


def _parsed(kind: type[Any], text: str) -> Any:
    """An environment variable as the plain value that TOML would hold; itself if it is none."""
    if kind is bool:
        return TRUTHS.get(text.strip().lower(), text)
    if kind is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _annotation(cls: type[Any], name: str) -> Any:
    """The field's type without `| None`."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _kind(cls: type[Any], name: str) -> type[Any]:
    hint = _annotation(cls, name)
    kind: type[Any] = typing.get_origin(hint) or hint
    return kind


def _inner(cls: type[Any], name: str) -> type[Any]:
    """X of a field of type tuple[X, ...]."""
    inner: type[Any] = typing.get_args(_annotation(cls, name))[0]
    return inner


def _click_type(kind: type[Any], described: Setting) -> Any:
    import click

    if described.choices is not None:
        return click.Choice(described.choices)
    if kind in (int, float):
        between = click.IntRange if kind is int else click.FloatRange
        return between(described.low, described.high)  # type: ignore[arg-type]
    if kind is Path:
        return click.Path(path_type=Path)
    return bool if kind is bool else str


def _flag(name: str, kind: type[Any]) -> str:
    spelled = name.replace("_", "-")
    return f"--{spelled}/--no-{spelled}" if kind is bool else f"--{spelled}"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
