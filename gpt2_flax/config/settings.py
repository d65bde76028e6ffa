"""How settings are written: as flags of a command, as YAML, as values of their own types.

Which settings there are, and which of them go together, is for `config` and
`evaluate_command` to say.
"""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable
from typing import Literal

import yaml

from gpt2_flax import command_names, recipes
from gpt2_flax.config import durations, other_names
from gpt2_flax.errors import UserError, redacted

MAX_YAML_BYTES = 64 * 1024
MOST_YAML_KEYS = 200  # thousands of unknown ones would each be compared with all that there are


def setting(default, help, **metadata):
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


# ---------------------------------------------------------------- flags


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaint is ours: short, with the nearest flag of this parser."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError("\nerror: ".join(self.describe_unknown(unknown)))
        return parsed

    def error(self, message):
        raise UserError(
            f"{message}\n  {command_names.typed_prog(self.prog)} --help lists the flags"
        )

    def describe_unknown(self, words: list[str]) -> list[str]:
        """A fault for each unknown flag among the words that were left over."""
        # Without a flag among them, the rest is what followed the first.
        words = [word for word in words if word.startswith("--")] or words[:1]
        return [
            f"unknown {'flag' if word.startswith('-') else 'argument'} {plain(word)}"
            f"{nearest(word.split('=')[0], self.flags(), self.prog)}"
            for word in words
        ]

    def flags(self) -> list[str]:
        """All flags, those of the subcommands included."""
        found = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found


def wide_help(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=28, width=96)


def add_settings(parser: argparse.ArgumentParser, settings, groups: dict[str, str]) -> None:
    """A flag for each field of a dataclass of settings.

    groups: field -> name of the group of flags that begins with it.
    """
    group, types = parser, typing.get_type_hints(settings)
    for name, field in fields_of(settings).items():
        if name in groups:
            group = parser.add_argument_group(groups[name])
        kind, text = types[name], field.metadata["help"]
        if field.default not in ("", ()):
            default = str(field.default).lower() if kind is bool else field.default
            text += f" (default: {default})"
        options = {
            "default": argparse.SUPPRESS,
            "help": text.replace("%", "%%"),
            "required": "required" in field.metadata,
        }
        if name == "debug":  # `run_main` looks for the bare word
            options |= {"action": "store_true"}
        elif kind is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif typing.get_origin(kind) is Literal:
            options |= {"metavar": "|".join(typing.get_args(kind))}
        elif typing.get_origin(kind) is tuple:
            options |= {"action": "extend", "nargs": "+", "metavar": "FILE"}
        else:
            metavars = {int: "N", float: "X", str: "TEXT", int | Literal["auto"]: "N|auto"}
            options |= {"metavar": metavars.get(kind, "LENGTH")}
        group.add_argument(f"--{name}", **options)


def fields_of(settings) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(settings)}


# ---------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where it would keep the last, and aliases.

    Flat settings need no alias, and a few nested ones turn a line into gigabytes.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}; write the value itself",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {plain(key.value)} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(
    path: str, flags_only: tuple[str, ...], limit: int = MAX_YAML_BYTES
) -> tuple[dict, list[str]]:
    """What a YAML file of settings holds, and the faults of the file itself.

    flags_only: names that have no effect in a file. limit: its longest length, in bytes.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            return {}, [f"{path}: over {limit} bytes is too long for a configuration"]
        loaded = _Loader(text.decode("utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        return {}, [f"cannot read --config {path}: {reason}\n  {examples(path)}"]
    except Exception as error:  # PyYAML lets through what int() and datetime() raise
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if isinstance(error, RecursionError):
            reason = "nested too deeply"
        return {}, [f"{path}{where}: not valid YAML: {reason}"]
    if loaded is None:
        return {}, []
    if not isinstance(loaded, dict):
        return {}, [f"{path}: expected lines of `name: value`, got {type(loaded).__name__}"]
    if len(loaded) > MOST_YAML_KEYS:
        return {}, [f"{path}: {len(loaded)} names are too many for a configuration"]
    faults = [
        f"{path}: {name} has no effect in a file\n  give it as a flag: --{name}"
        for name in flags_only
        if name in loaded
    ]
    return loaded, faults


def examples(path: str) -> str:
    """The remedy where a file of settings cannot be read."""
    if "/" in path or "." in path:
        return "configs/ holds examples"
    return f"recipes: {', '.join(recipes.names())}"


# ---------------------------------------------------------------- values


def convert(raw: dict, settings, spell: Callable[[str], str]) -> tuple[dict, list[str]]:
    """Values of the settings' own types, and the faults.

    settings: their dataclass. spell: says where a name stood.
    """
    fields, types = fields_of(settings), typing.get_type_hints(settings)
    values, faults = {}, []
    for name, value in raw.items():
        if name not in fields:
            remedy = nearest(str(name), fields, command_names.prog("train"))
            faults.append(f"{spell(plain(name))}: unknown setting{remedy}")
            continue
        kind, units = types[name], fields[name].metadata.get("units")
        if units:
            try:
                values[name] = durations.parse(value, units, int in typing.get_args(kind))
            except ValueError as error:
                faults.append(f"{spell(name)}: {error}, got {shown(value)}")
            continue
        try:
            values[name] = convert_value(value, kind)
        except ValueError:
            faults.append(f"{spell(name)}: expected {describe(kind)}, got {shown(value)}")
    return values, faults


def convert_value(value, kind):
    """`value` as `kind`. Raises ValueError where it is something else."""
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert_value(item, str) for item in items)
    if kind == int | Literal["auto"]:
        return value if value == "auto" else convert_value(value, int)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError
        return value
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in words:
            raise ValueError
        return words[str(value).lower()]
    if kind is str:
        if not isinstance(value, str):  # YAML makes 8 of 010; the text is gone by then
            raise ValueError
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    try:
        number = float(value)  # YAML 1.1 reads 3e-4 as a string
    except OverflowError as error:
        raise ValueError from error
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError
    return int(number)


def find_secrets(config) -> list[str]:
    """A fault for each setting that holds a password or a token: it would be kept in files."""
    return [
        f"{name} holds a secret: a URL's password, or the value of an environment variable\n"
        "  leave it out: a run's settings are written into its files"
        for name in fields_of(config)
        if redacted(text := str(getattr(config, name))) != text
    ]


def describe(kind) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes, should it look like a number or a date)",
        int | Literal["auto"]: "a whole number or auto",
    }
    return names.get(kind, "text or a list of texts")


def nearest(name: str, known, prog: str) -> str:
    """The remedy for an unknown name: the known one that means it, or that is most like it.

    prog: the name of the command that lists them.
    """
    if found := other_names.look_up(name, known):
        return f"\n  did you mean {found}?"
    if close := closest(name, known):
        return f"\n  did you mean {close[0]}?"
    if why := other_names.why_not_needed(name):
        return f"\n  {why}"
    return f"\n  {command_names.typed_prog(prog)} --help lists them"


def meant(name: str, known) -> list[str]:
    """The known name that an unknown one stands for, as far as it can be told."""
    found = other_names.look_up(name, known)
    return [found.split(":")[0]] if found else closest(name, known)


def closest(name: str, known) -> list[str]:
    """The known name that is spelled almost so, if there is one."""
    bare = {other.lstrip("-").replace("-", "_"): other for other in known}
    word = name.lstrip("-").replace("-", "_").lower()
    return [bare[match] for match in difflib.get_close_matches(word, bare, n=1, cutoff=0.75)]


def shown(value) -> str:
    """A value from outside as a message can quote it: one line, of bearable length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = "a number too long to write"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(name) -> str:
    """A name from outside as a message can quote it: bare where that is readable."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= 80 else shown(text)
