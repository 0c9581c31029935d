"""The commands of a shell script, with its own variables put in; nothing is executed.

What a script can only know when it runs, such as an argument, the environment or the output of a command, becomes
`UNKNOWN` in a word; `${NAME:-value}` counts as the value. A variable that a branch or a loop sets is unknown, unless it
has this value already.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_advice.audit.readers.options import Options

UNKNOWN = "\0"  # stands in a word for the part that only the running script knows
_LONGEST = 10_000  # characters of a variable, since one that holds itself several times grows exponentially

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HEREDOC = re.compile(
    r"(?<!<)<<-?[ \t]*[\"'\\]?(\w+)[\"']?([^\n]*)\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
# What `read` takes from the lines that follow is the text of a command.
_READ = re.compile(
    r"^[ \t]*(?:IFS=\S*[ \t]+)?read\b[^\n]*<<-?[ \t]*[\"'\\]?(\w+)[\"']?[ \t]*\n(.*?)^[ \t]*\1[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
_ROUND, _CURLY = r"\([^()]*+\)", r"\{[^{}]*+\}"
for _ in range(3):  # brackets within brackets
    _ROUND, _CURLY = rf"\((?:[^()]++|{_ROUND})*+\)", rf"\{{(?:[^{{}}]++|{_CURLY})*+\}}"
_PLACE = rf"\$(?:{_ROUND}|{_CURLY}|[A-Za-z_]\w*+|[\d@*#?$!-])|`[^`]*+`"
_DOUBLE = rf'"(?:\\.|{_PLACE}|[^"\\])*+"'
# A joined line is written with a vertical tab.
_TOKEN = re.compile(
    rf"(?P<comment>(?<![^\s;&|()])#[^\n\v]*[\n\v]?)"
    rf"|(?P<array>[A-Za-z_]\w*\+?=\((?:(?<=\s)#[^\n\v]*+|{_DOUBLE}|'[^']*+'|{_PLACE}|[^()\"'])*+\))"
    rf"|(?P<redirection>(?<!\S)\d*(?:&>|[<>])[<>]*[&|-]?[ \t]*(?:{_DOUBLE}|[^\s;|&()<>\"])*+)"
    rf"|(?P<word>(?:\\.|{_DOUBLE}|'[^']*+'|{_PLACE}|[^\s;&|()<>\"'\\`])++)|(?P<end>[;&|()\n])|\s|.",
    re.DOTALL,
)
_PART = re.compile(rf"\\.|{_DOUBLE}|'[^']*'|{_PLACE}", re.DOTALL)
_PARAMETER = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?:\[[@*]\])?(?::?[-=](.*))?\})", re.DOTALL)
_OVERRIDE = re.compile(r"[+]{0,2}([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)=(.*)", re.DOTALL)
_OPENING, _CLOSING = ("if", "for", "while", "until", "case", "select"), ("fi", "done", "esac")
_BETWEEN = ("else", "elif")
_PREFIXES = ("then", "do", "{", "!", "time", "exec", "nohup", "sudo")


class Word(NamedTuple):
    """A word of a command, and the line (from 1) where it begins."""

    text: str
    line: int


def _known(text: str) -> str | None:
    """Return a text that is known; of a path whose first folders are not known, the last part."""
    if UNKNOWN not in text:
        return text
    name = text.rsplit("/", 1)[-1]
    return name if text.startswith(UNKNOWN) and "/" in text and name and UNKNOWN not in name else None


def find_file(path: Path, said: str) -> Path | None:
    """Return a file that a script names, from its folder or one above it, as which an unknown first folder counts."""
    said = said.removeprefix(f"{UNKNOWN}/")
    if not said or UNKNOWN in said:
        return None
    candidates = (folder / said for folder in path.absolute().parents)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def read_flags(words: Sequence[Word]) -> Options:
    """Read `--name value ...` and `--name=value`; a name without a value is true."""
    options, name, values = Options(), "", list[str | None]()
    for word in words:
        if re.match(r"--[a-zA-Z]", word.text):
            name, equals, first = word.text[2:].partition("=")
            name, values = name.replace("-", "_"), []
            options.values[name], options.lines[name] = _known(first) if equals else True, word.line
            name = "" if equals else name
        elif name:
            values.append(_known(word.text))
            options.values[name] = values[0] if len(values) == 1 else values
    return options


def read_overrides(words: Sequence[Word]) -> Options:
    """Return the options that a command of Hydra sets as `name=value`, `+name=value` or `++name=value`."""
    options = Options()
    for word in words:
        if match := _OVERRIDE.fullmatch(word.text):
            said = _known(match[2])
            value: str | list[str] | None = None
            if said is not None and said.startswith("[") and said.endswith("]"):
                value = [item.strip().strip("'\"") for item in said[1:-1].split(",") if item.strip()]
            elif said is not None and said.lower() != "null":
                value = said.strip("'\"")
            options.values[match[1]], options.lines[match[1]] = value, word.line
    return options


def read_commands(text: str, known: Mapping[str, str] | None = None) -> list[list[Word]]:
    """Return the words of every command of a script, without redirections; `known` are variables from outside.

    An array is held as its words in quotes.
    """
    text = _READ.sub(lambda match: f"\n{match[2]}", text)
    text = _HEREDOC.sub(lambda match: match[2] + "\n" * (1 + match[3].count("\n")), text).replace("\\\n", " \v")
    commands, words, depth, line, variables = list[list[Word]](), list[Word](), 0, 1, dict(known or {})

    def assign(name: str, value: str, append: bool = False) -> None:
        value = f"{variables.get(name, '')} {value}".strip() if append else value
        stays = len(value) <= _LONGEST and (not depth or variables.get(name) == value)
        variables[name] = value if stays else UNKNOWN

    for token in _TOKEN.finditer(text + "\n"):
        kind, part = token.lastgroup, token[0]
        if kind == "word":
            words += [Word(word, line) for word in _words(part, variables)]
        elif kind == "array":
            name, _, items = part.partition("=(")
            inner = [word.text for command in read_commands(items[:-1], variables) for word in command]
            assign(name.rstrip("+"), shlex.join(inner), name.endswith("+"))
        elif kind in ("end", "comment") and part[-1] in ";&|()\n\v":
            while words and words[0].text in (*_OPENING, *_CLOSING, *_BETWEEN, *_PREFIXES):
                first = words[0].text
                depth += (first in _OPENING) - (first in _CLOSING and depth > 0)
                if first in ("for", "select") and len(words) > 1:
                    assign(words[1].text, words[3].text if len(words) == 4 else UNKNOWN)
                # What follows these is a condition.
                words = [] if first in (*_OPENING, "elif") else words[1:]
            if words and words[0].text in ("export", "local", "readonly", "declare", "typeset"):
                words = [word for word in words[1:] if _ASSIGNMENT.fullmatch(word.text)]
            assignments = [match for word in words if (match := _ASSIGNMENT.fullmatch(word.text))]
            if len(assignments) == len(words):
                for match in assignments:
                    assign(match[1], match[3])
            elif scripts := [
                script
                for shell, option, script in zip(words, words[1:], words[2:], strict=False)
                if shell.text in ("bash", "sh") and re.fullmatch(r"-[a-z]*c", option.text)
            ]:
                for command in read_commands(scripts[0].text, variables):
                    commands.append([Word(word.text, scripts[0].line) for word in command])
            else:
                commands.append(words)
            words = []
        line += part.count("\n") + part.count("\v")
    return commands


def _words(raw: str, variables: dict[str, str]) -> list[str]:
    """Return the words that a word of a script becomes; an unquoted variable is split at its spaces."""

    def value(match: re.Match[str]) -> str:
        part = match[0]
        if part[0] in "\\'":
            return part
        if part[0] == '"':
            if re.fullmatch(r'"\$\{\w+\[@\]\}"', part):
                return _PART.sub(value, part[1:-1])
            inner = re.sub(rf"\\.|{_PLACE}", value, part[1:-1])
            # An expansion that becomes nothing is no word.
            return f'"{inner}"' if inner or part == '""' else ""
        if part in ("$@", "$*", "${@}", "${*}") or part.startswith("`#"):
            return ""  # a comment between continued lines is written in backticks
        parameter = _PARAMETER.fullmatch(part)
        if parameter is None:
            return UNKNOWN
        said = variables.get(parameter[1] or parameter[2])
        if parameter[3] is not None and not said:
            said = _PART.sub(value, parameter[3].replace('"', "").replace("'", ""))
        return UNKNOWN if said is None else said

    try:
        words = shlex.split(_PART.sub(value, raw).replace("\v", " "))
        return [" ".join(words)] if _ASSIGNMENT.fullmatch(raw) else words
    except ValueError:  # a value has a quote of its own
        return [UNKNOWN]
