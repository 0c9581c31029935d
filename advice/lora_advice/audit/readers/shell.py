"""The commands of a shell script, with its own variables put in; nothing is executed.

What a script can only know when it runs, such as an argument, the environment or the output of a command, becomes
`UNKNOWN` in a word; `${NAME:-value}` counts as the value. A variable that a branch or a loop sets is unknown
after it, unless the value is the same.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_advice.audit.readers.options import Options
from lora_advice.audit.yaml_lines import LONGEST

UNKNOWN = "\0"
"""Stands in a word for the part that only the running script knows."""

_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".job")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HEREDOC = re.compile(
    r"(?<!<)<<-?[ \t]*[\"'\\]?(\w+)[\"']?([^\n]*)\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
_ROUND, _CURLY = r"\([^()]*+\)", r"\{[^{}]*+\}"
for _ in range(5):  # brackets within brackets
    _ROUND, _CURLY = rf"\((?:[^()]++|{_ROUND})*+\)", rf"\{{(?:[^{{}}]++|{_CURLY})*+\}}"
_EXPANSION = rf"\$(?:{_ROUND}|{_CURLY}|[A-Za-z_]\w*+|[\d@*#?$!-])|`[^`]*+`?"
_QUOTED = rf"\"(?:\\.|{_EXPANSION}|[^\\$`\"]++|[\\$])*+\""
_WITHIN = re.compile(
    rf"(?P<joined>\\\n)|(?P<escape>\\[$`\"\\])|(?P<expansion>{_EXPANSION})|(?P<plain>[^\\$`]+|.)", re.S
)
_PIECES = re.compile(
    rf"(?P<joined>\\\n)|(?P<escape>\\.)|(?P<quoted>{_QUOTED})|(?P<literal>'[^']*')"
    rf"|(?P<comment>(?<![^\s;&|()])#[^\n]*)|(?P<expansion>{_EXPANSION})"
    rf"|(?P<redirection>(?<!\S)\d*(?:&>|[<>])[<>]*[&|-]?[ \t]*(?:{_QUOTED}|{_EXPANSION}|[^\s;|&()<>\"$])*)"
    r"|(?P<stray>[\"'])|(?P<space>[ \t\r]+)|(?P<end>[;&|()\n])|(?P<plain>[^\s\\\"'#$`\d&<>;|()]+|.)",
    re.DOTALL,
)
_PARAMETER = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=](.*))?\})", re.DOTALL)
_OVERRIDE = re.compile(r"[+]{0,2}([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)=(.*)", re.DOTALL)
_OPENING, _BETWEEN, _CLOSING = (
    ("if", "for", "while", "until", "case", "select"),
    ("else", "elif"),
    ("fi", "done", "esac"),
)
_PREFIXES = ("then", "do", "{", "!", "time", "exec", "nohup", "sudo")
_DECLARING = ("export", "local", "readonly", "declare", "typeset")


class Word(NamedTuple):
    """A word of a command, and the line (from 1) where it begins."""

    text: str
    line: int


def is_script(path: Path, text: str) -> bool:
    """Return whether a file is a shell script, by its name or its first line."""
    return path.suffix in _SUFFIXES or (not path.suffix and re.match(r"#!.*\b(ba|z|k|da)?sh\b", text) is not None)


def known(text: str) -> str | None:
    """Return a text that is known; of a path whose first folders are not known, the last part."""
    if UNKNOWN not in text:
        return text
    name = text.rsplit("/", 1)[-1]
    return name if text.startswith(UNKNOWN) and "/" in text and name and UNKNOWN not in name else None


def find_file(path: Path, said: str) -> Path | None:
    """Return a file that a script names, from the folder of the script or one above it.

    A first folder that is not known, such as `$ROOT`, counts as one of these.
    """
    said = said.removeprefix(f"{UNKNOWN}/")
    if not said or UNKNOWN in said:
        return None
    candidates = (folder / said for folder in path.absolute().parents)
    return next((candidate for candidate in candidates if os.path.isfile(candidate)), None)


def read_flags(words: list[Word]) -> Options:
    """Read `--name value ...` and `--name=value`; a name without a value is true."""
    options, name, values = Options(), "", list[str | None]()
    for word in words:
        if re.match(r"--[a-zA-Z]", word.text):
            name, equals, first = word.text[2:].partition("=")
            name, values = name.replace("-", "_"), [known(first)] if equals else []
            options.set(name, values[0] if equals else True, word.line)
            name = "" if equals else name
        elif name:
            values.append(known(word.text))
            options.values[name] = values[0] if len(values) == 1 else values
    return options


def read_overrides(words: list[Word]) -> Options:
    """Return the options that a command of Hydra sets as `name=value`, `+name=value` or `++name=value`."""
    options = Options()
    for word in words:
        if match := _OVERRIDE.fullmatch(word.text):
            said = known(match[2])
            value: str | list[str] | None = None
            if said is not None and said.startswith("[") and said.endswith("]"):
                value = [item.strip().strip("'\"") for item in said[1:-1].split(",") if item.strip()]
            elif said is not None and said.lower() != "null":
                value = said.strip("'\"")
            options.set(match[1], value, word.line)
    return options


def read_commands(text: str, first_line: int = 1) -> list[list[Word]]:
    """Return the words of every command that a script names, in order, without redirections and comments."""
    script = _Script()
    script.read(text, first_line)
    return script.commands


@dataclass
class _Script:
    commands: list[list[Word]] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)
    """The words of a variable; one word but for arrays."""
    branches: list[dict[str, list[str] | None]] = field(default_factory=list)
    """For each open branch of an `if` or `case`, or body of a loop, what the variables held that are set in it."""

    def read(self, text: str, line: int) -> None:
        """Note the commands of a script that begins at a line."""
        text = _HEREDOC.sub(lambda match: match[2] + "\n" * (1 + match[3].count("\n")), text)
        words, array, outside = list[Word](), "", list[Word]()
        parts: list[str] | None = None
        begins = line
        for piece in _PIECES.finditer(text + "\n"):
            kind, part = str(piece.lastgroup), piece[0]
            if kind in ("space", "end"):
                words += [Word(word, begins) for word in parts or ()]
                parts = None
                if part == "(" and words and re.fullmatch(r"[A-Za-z_]\w*\+?=", words[-1].text):
                    array, outside, words = words[-1].text, words[:-1], []
                elif part == ")" and array:
                    self._assign(array.rstrip("+="), [word.text for word in words], append="+" in array)
                    array, words = "", outside
                elif kind == "end" and not array:
                    self._end_command(words)
                    words = []
            elif kind not in ("comment", "redirection", "stray", "joined"):
                if parts is None:
                    begins = line
                parts = self._joined(parts, kind, part)
            line += part.count("\n")

    def _joined(self, words: list[str] | None, kind: str, piece: str) -> list[str] | None:
        """Return the words that a word becomes with a further piece; an unquoted variable is split at its spaces."""
        if kind == "quoted":
            words = words or [""]
            for part in _WITHIN.finditer(piece[1:-1]):
                if part.lastgroup == "expansion":
                    values = self._value(part[0])
                    words = [*words[:-1], words[-1] + "".join(values[:1]), *values[1:]]
                elif part.lastgroup != "joined":
                    words[-1] += part[0][1:] if part.lastgroup == "escape" else part[0]
            # Quotes with nothing in them are a word; an expansion that becomes nothing is none.
            return None if words == [""] and piece != '""' else words
        values = [piece[1:-1] if kind == "literal" else piece[1:] if kind == "escape" else piece]
        if kind == "expansion":
            values = self._value(piece)
            if not words or not _ASSIGNMENT.fullmatch(words[-1]):
                values = [word for value in values for word in value.split()]
            if not values:
                return words
        words = words or [""]
        return [*words[:-1], words[-1] + values[0], *values[1:]]

    def _value(self, expansion: str) -> list[str]:
        """Return what an expansion becomes: a text, the words of an array, or nothing."""
        if expansion in ("$@", "$*", "${@}", "${*}") or expansion.startswith("`#"):
            return []  # a comment between continued lines is written in backticks
        if expansion.startswith("$(("):
            names = re.compile(r"\$?\{?([A-Za-z_]\w*)\}?")
            numbers = {name: words[0] for name, words in self.variables.items() if words}
            plain = names.sub(lambda name: numbers.get(name[1], ""), expansion[3:-2]).replace(" ", "")
            if not re.fullmatch(r"\d{1,9}([*+]\d{1,9}){0,9}", plain):
                return [UNKNOWN]
            return [str(sum(math.prod(map(int, term.split("*"))) for term in plain.split("+")))]
        parameter = _PARAMETER.fullmatch(expansion)
        if parameter is None:
            return [UNKNOWN]
        value = self.variables.get(parameter[1] or parameter[2])
        if parameter[4] is not None and value in (None, [""]):
            return ["".join(self._joined(None, "quoted", '"' + re.sub("[\"']", "", parameter[4]) + '"') or ())]
        if value is None:
            return [UNKNOWN]
        return value if parameter[3] else value[:1]

    def _assign(self, name: str, value: list[str], append: bool = False) -> None:
        before = self.variables.get(name)
        if self.branches:
            self.branches[-1].setdefault(name, before)
        if append:
            value = (before or []) + value
        # A variable that holds itself several times grows exponentially.
        self.variables[name] = value if sum(map(len, value)) + len(value) <= LONGEST else [UNKNOWN]

    def _end_command(self, words: list[Word]) -> None:
        """Note a command, without the words of `if`, `case` and loops around it."""
        while words and words[0].text in (*_OPENING, *_CLOSING, *_BETWEEN, *_PREFIXES):
            first = words[0].text
            if first in (*_BETWEEN, *_CLOSING) and self.branches:
                for name, before in self.branches.pop().items():
                    if self.variables.get(name) != before:
                        self._assign(name, [UNKNOWN])
            if first in (*_OPENING, *_BETWEEN):
                self.branches.append({})
            if first in ("for", "select") and len(words) > 1:
                items = [word.text for word in words[3:]]
                self._assign(words[1].text, items if len(items) == 1 else [UNKNOWN])
            if first in (*_OPENING, "elif"):
                return
            words = words[1:]
        if words and words[0].text in _DECLARING:
            words = [word for word in words[1:] if _ASSIGNMENT.fullmatch(word.text)]
        assignments = [match for word in words if (match := _ASSIGNMENT.fullmatch(word.text))]
        if len(assignments) == len(words):
            for match in assignments:
                self._assign(match[1], [match[3]])
            return
        for shell, option, script in zip(words, words[1:], words[2:], strict=False):
            if shell.text in ("bash", "sh") and re.fullmatch(r"-[a-z]*c", option.text):
                commands = read_commands(script.text)
                self.commands += [[Word(word.text, script.line) for word in command] for command in commands]
                return
        self.commands.append(words)
