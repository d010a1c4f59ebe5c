"""Options as dataclass fields: what a flag and a YAML key may be, said once, checked the same way for both."""

import argparse
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from distmeta.errors import UserError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    pattern: tuple[str, str] | None = None,
    bare: float | None = None,
) -> Any:
    """A dataclass field with its default, the sentence that `--help` shows, and what it may be.

    Args:
        choices: the words it may be.
        least, most: the smallest and the largest number it may be; `above`: a number it must exceed.
        pattern: a regular expression that the text (or a number's digits) must match, and that in words.
        bare: what the flag without a number, and true in YAML, stands for; --no-FLAG and false are 0.
    """
    limits = {"choices": choices, "least": least, "above": above, "most": most, "pattern": pattern, "bare": bare}
    metadata = {"help": help, **limits}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the name most like `name`, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _plain_type(hint: Any) -> Any:
    """The type a flag's text is converted to: T for T, for T | None and for tuple[T, ...]."""
    if isinstance(hint, types.UnionType):
        return _plain_type(next(a for a in typing.get_args(hint) if a is not type(None)))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def add_flags(parser: argparse.ArgumentParser, section: type, title: str) -> None:
    """Add one flag a field of the dataclass `section`, grouped under `title`; absent flags stay absent.

    Choices and ranges are checked by `build`, the same way for flags and for YAML.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        kwargs: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": (f.metadata["help"] + (f" [{default}]" if default not in ("", None) else "")).replace("%", "%%"),
        }
        kind = _plain_type(hints[f.name])
        if f.metadata["bare"] is not None:
            add_share(group, f.name, f.metadata["bare"], kwargs["help"])
            continue
        if kind is bool:
            kwargs |= {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(hints[f.name]) is tuple:
            kwargs |= {"type": kind, "nargs": "+", "metavar": "NAME" if kind is str else "N"}
        else:
            kwargs |= {"type": kind, "metavar": "|".join(f.metadata["choices"] or (kind.__name__.upper(),))}
        group.add_argument("--" + f.name.replace("_", "-"), **kwargs)


def add_share(group: Any, name: str, bare: float, help: str) -> None:
    """Add --NAME [SHARE], a number that is `bare` where none is given, and --no-NAME for 0; absent flags stay absent.

    Args:
        group: an argparse parser, or a group of one.
    """

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number; a word after --{name} is its share") from None

    shared: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    group.add_argument(f"--{name}", nargs="?", const=bare, type=number, metavar="SHARE", help=help, **shared)
    group.add_argument(f"--no-{name}", action="store_const", const=0.0, help=f"--{name} 0", **shared)


def build(section: type[T], values: Mapping[str, Any], where: str, flags: bool = False) -> T:
    """An instance of the dataclass `section` from `values`, each checked against its type, choices and range.

    Args:
        where: starts the sentence of an error (a file and section, or the command line).
        flags: name keys as the command line does (--batch-size, not batch_size).

    Raises:
        UserError: a key that is no field (names the nearest), or a value of the wrong type or out of range.
    """
    hints = typing.get_type_hints(section)
    known = {f.name: f for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)}; known: {' '.join(known) or 'none'}"
            )
        name = f"{where}: " + ("--" + key.replace("_", "-") if flags else key)
        bare = known[key].metadata.get("bare")
        if bare is not None and isinstance(value, bool):
            value = bare if value else 0.0
        digits = known[key].metadata.get("pattern") and isinstance(value, int) and not isinstance(value, bool)
        checked[key] = _checked(str(value) if digits else value, hints[key], name)
        _in_range(checked[key], known[key].metadata, name)
    return section(**checked)


def _checked(value: Any, hint: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        return None if value is None else _checked(value, _plain_type(hint), name)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} must be a list, not {value!r}")
        return tuple(_checked(v, typing.get_args(hint)[0], name) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kind = {
            int: "a whole number",
            list: "a list",
            dict: "key: value lines",
            float: "a number",
            str: "text (put it in quotes)",
            bool: "true or false",
        }
        raise UserError(f"{name} must be {kind.get(hint, hint.__name__)}, not {value!r}")
    return value


def _in_range(value: Any, limits: Mapping[str, Any], name: str) -> None:
    choices = limits.get("choices")
    pattern = limits.get("pattern")
    if pattern and not re.fullmatch(pattern[0], value):
        raise UserError(f"{name} is {value!r}; it must be {pattern[1]}")
    largest = 2**63 - 1  # of what torch, numpy and Parquet count with
    for v in value if isinstance(value, tuple) else (value,):
        if choices and v not in choices:
            raise UserError(f"{name} is {v!r}{nearest(str(v), choices)}; choose one of {' '.join(choices)}")
        if isinstance(v, int) and not -largest <= v <= largest:
            raise UserError(f"{name} must be at most {largest} in size, not {v}")
        if isinstance(v, float) and not math.isfinite(v):
            raise UserError(f"{name} must be a finite number, not {v}")
        for limit, broken, words in (
            ("least", lambda v, x: v < x, "at least"),
            ("above", lambda v, x: v <= x, "greater than"),
            ("most", lambda v, x: v > x, "at most"),
        ):
            bound = limits.get(limit)
            if bound is not None and v is not None and broken(v, bound):
                raise UserError(f"{name} must be {words} {bound}, not {v}")
