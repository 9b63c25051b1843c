"""The options of a command line: how they are spelled, how they are told from other words, and how values get types.

A door lists its options as `Option`, reads its words with `read`, and turns the texts into typed values with `settle`.
A setting is spelled as its key, with underscores (`--train.samples_per_task`), and an option that sets no key with
hyphens (`--run-dir`); `read` takes either for both. Types and the page of `--help` are jsonargparse's, which is given
one value at a time: a refusal is then about a known key and text, and its English message is not read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, get_args

from opd_fast.config.serialize import describe
from opd_fast.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Option:
    """An option of a command line.

    Attributes:
        name: its documented spelling, without the dashes.
        hint: the type of its value; None: a switch, which takes no value.
        default: what holds where it is not given; `MISSING`: it must be given.
        help: its line on the page of `--help`.
        fields: the fields of an element, where its value is a list of elements that have a `name` each;
            `--NAME.ELEMENT.FIELD VALUE` sets one.
    """

    name: str
    hint: Any
    default: Any
    help: str
    fields: tuple[Option, ...] = ()

    @property
    def example(self) -> str:
        """The remedy for a value of the wrong type."""
        if self.fields:
            needed = [field.name for field in self.fields if field.default is MISSING]
            return f"give [{{{', '.join(f'{name}: {name[0].upper()}' for name in needed)}}}]"
        if self.default is MISSING:
            return f"give {self.name}"
        return f"the default is {self.default if isinstance(self.default, str) else json.dumps(self.default)}"


@dataclass(frozen=True)
class Given:
    """An option as it was given.

    Attributes:
        option: which one; for an element of a list, the field's.
        text: its value; empty for a switch.
        appended: whether `+` stands behind its name, which adds to a list.
        owner: the list whose element is changed; empty: the option itself is.
        element: the element's name or number.
    """

    option: Option
    text: str = ""
    appended: bool = False
    owner: str = ""
    element: str = ""

    @property
    def key(self) -> str:
        """What the option is called in errors."""
        return f"{self.owner}.{self.element}.{self.option.name}" if self.owner else self.option.name

    def value(self, before: Any = None) -> Any:
        """Return the typed value, read as YAML unless its type is text; an appended one is added to `before`."""

        def parse(parser: Any) -> Any:
            parser.set_defaults(value=before if self.appended else None)
            return parser.parse_args([f"--value{'+' if self.appended else ''}={self.text}"])

        return _parsed(self.option, self.text, self.key, "", parse)


def read(argv: Sequence[str], options: Sequence[Option], door: str) -> tuple[list[str], list[Given]]:
    """Return the words of a command line that belong to no option, and the options given, in order.

    `argv` has the words behind the command, without `--help`; `door` is how the command is started, for the remedy.

    Raises:
        UserError: an option that is unknown, lacks its value, has one that it does not take, or no list to add to.
    """
    known = {_plain(option.name): option for option in options}
    words: list[str] = []
    given: list[Given] = []
    rest = list(reversed(argv))
    while rest:
        word = rest.pop()
        if word == "--":
            return words + rest[::-1], given
        if not word.startswith("--"):
            if word.startswith("-") and word != "-":
                raise UserError(word, "unknown option", f"{door} --help lists all")
            words.append(word)
            continue
        spelled, inline, text = word[2:].partition("=")
        appended = spelled.endswith("+")
        found = _find(spelled.removesuffix("+"), known, door)
        if found.option.hint is None:
            if inline or appended:
                raise UserError(found.key, "takes no value", f"write --{found.key}")
        elif not inline:
            if not rest or rest[-1].startswith("--"):
                raise UserError(found.key, "has no value", f"write --{found.key} VALUE")
            text = rest.pop()
        if appended and not _is_list(found.option.hint):
            raise UserError(found.key, "is not a list that + could add to", f"write --{found.key} VALUE")
        given.append(replace(found, text=text, appended=appended))
    return words, given


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _is_list(hint: Any) -> bool:
    return any(getattr(kind, "__origin__", None) is list for kind in (hint, *get_args(hint)))


def _find(name: str, known: Mapping[str, Option], door: str) -> Given:
    """The option of a name, still without its text; a name `LIST.ELEMENT.FIELD` gives the field of an element."""
    if (option := known.get(_plain(name))) is not None:
        return Given(option)
    owner, _, inside = name.replace("[", ".").replace("]", "").partition(".")  # errors write LIST[0].FIELD
    listed = known.get(_plain(owner))
    if listed is not None and listed.fields and inside:
        element, _, last = inside.rpartition(".")
        if not element:
            remedy = f"write --{listed.name}.NAME.{listed.fields[-1].name} VALUE, with the name or number of one"
            raise UserError(name, "names no element and field", remedy)
        fields = {field.name: field for field in listed.fields}
        if _plain(last) not in fields:
            raise UserError(f"{listed.name}.{element}.{last}", "unknown field", did_you_mean(_plain(last), fields))
        return Given(fields[_plain(last)], owner=listed.name, element=element)
    inner = [option.name for option in known.values() if option.name.startswith(f"{name}.")]
    if inner:
        raise UserError(f"--{name}", "is a section", f"set its keys one by one, as in --{inner[0]} VALUE")
    names = [f"--{option.name}" for option in known.values()]
    raise UserError(name, "unknown option", _nearest(f"--{name}", names) or f"{door} --help lists all")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The remedy that names the nearest known word; empty where no word is near."""
    remedy = did_you_mean(word, known)
    return remedy if remedy.startswith("did you mean") else ""


def typed(option: Option, value: Any, key: str, where: str) -> Any:
    """Return a value of plain data as the option's type has it.

    An error calls it `key`, and `where` follows the problem, such as " in FILE".

    Raises:
        UserError: the value is of another type, or null where the option has no null.
    """
    return _parsed(option, value, key, where, lambda parser: parser.parse_object({"value": value}))


def _parsed(option: Option, value: Any, key: str, where: str, parse: Callable[[Any], Any]) -> Any:
    from jsonargparse import ArgumentError

    try:
        found = parse(_parser(option.hint)).value
    except RecursionError:
        raise UserError(key, "has brackets in brackets without end", "fix it") from None
    except ArgumentError:
        kind = f"a list of {option.name}" if option.fields else describe(option.hint)
        is_choice = getattr(option.hint, "__origin__", None) is Literal
        remedy = _nearest(str(value), map(str, get_args(option.hint))) if is_choice else ""
        raise UserError(key, f"{str(value)!r} is not {kind}{where}", remedy or option.example) from None
    if found is None and type(None) not in get_args(option.hint):
        raise UserError(key, f"null is not {describe(option.hint)}{where}", option.example)
    return found


@functools.cache
def _parser(hint: Any) -> Any:
    """A parser of one value."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def settle(options: Sequence[Option], given: Sequence[Given]) -> SimpleNamespace:
    """The value of every option, given or default, by its name with underscores.

    Raises:
        UserError: a value of the wrong type; options that must be given and are not.
    """
    values = {option.name: False if option.hint is None else option.default for option in options}
    for one in given:
        if not one.owner:
            name = one.option.name
            values[name] = one.option.hint is None or one.value(values[name])
    if missing := [name for name, value in values.items() if value is MISSING]:
        raise UserError(", ".join(missing), "not given", "give " + " ".join(f"--{name} VALUE" for name in missing))
    return SimpleNamespace(**{_plain(name): value for name, value in values.items()})


def read_options(
    argv: Sequence[str],
    door: str,
    description: str,
    options: Sequence[Option],
    words: tuple[str, str, str] | None = None,
) -> SimpleNamespace:
    """The values of a door's options, and its further words under their own name; the arguments are `print_help`'s.

    Raises:
        UserError: as `read` and `settle`; a word where the door takes none.
        SystemExit: with status 0 after `--help`.
    """
    print_help(argv, door, description, words, options)
    found, given = read(argv, options, door)
    if found and words is None:
        raise UserError(found[0], "unknown argument", "write options as --NAME VALUE")
    values = settle(options, given)
    if words is not None:
        setattr(values, words[0], found)
    return values


def print_help(
    argv: Sequence[str],
    door: str,
    description: str,
    words: tuple[str, str, str] | None,
    options: Sequence[Option],
    groups: Mapping[str, str] | None = None,
) -> None:
    """Where `argv` asks for help, print the page and leave with status 0.

    Args:
        argv, door: as for `read`.
        description: what the command does.
        words: (name, how many as `nargs` of argparse, help) of what belongs to no option; None: there is nothing.
        options: all of them.
        groups: section name to title of the options `SECTION.KEY`.
    """
    if not {"-h", "--help"} & set(argv):
        return
    from jsonargparse import ArgumentParser

    spelling = "Every option may be spelled with hyphens or with underscores, such as --text-cache or --text_cache."
    parser = ArgumentParser(prog=door, description=f"{description} {spelling}")
    if words is not None:
        parser.add_argument(words[0], nargs=words[1], type=str, help=words[2])
    titled = {name: parser.add_argument_group(name, title) for name, title in (groups or {}).items()}
    for option in options:
        kind: dict[str, Any] = {"action": "store_true"} if option.hint is None else {"type": option.hint}
        if option.hint is not None:
            kind |= {"required": True} if option.default is MISSING else {"default": option.default}
        titled.get(option.name.split(".")[0], parser).add_argument(f"--{option.name}", help=option.help, **kind)
    parser.parse_args(["--help"])
