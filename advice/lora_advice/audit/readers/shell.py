"""The commands of a shell script, with its own variables put in; nothing is executed.

What a script can only know when it runs, such as an argument, the environment or the output of a command, becomes
`UNKNOWN` in a word; `${NAME:-value}` counts as the value. Of an `if` that compares two known texts, only the branch
that is taken counts. A variable that another branch or a loop sets is unknown after it, unless the value is the same.
"""

from __future__ import annotations

import ast
import operator
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lora_advice.audit.readers.options import CERTAIN, THE_FILE, Options
from lora_advice.audit.yaml_lines import LONGEST
from lora_advice.errors import UserError
from lora_advice.finding import Finding

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
_EXPANSIONS = re.compile(rf"(?P<escape>\\.)|(?P<expansion>{_EXPANSION})", re.DOTALL)
_PIECES = re.compile(
    rf"(?P<escape>\\.)|(?P<quoted>{_QUOTED})|(?P<literal>'[^']*')|(?P<comment>(?<![^\s;&|()])#[^\n]*)"
    rf"|(?P<redirection>(?<!\S)\d*(?:&>|[<>])[<>]*[&|-]?[ \t]*(?:{_QUOTED}|{_EXPANSION}|[^\s;|&()<>\"$])*)"
    rf"|(?P<expansion>{_EXPANSION})|(?P<stray>[\"'])",
    re.DOTALL,
)
_PARAMETER = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=](.*))?\})", re.DOTALL)
_OVERRIDE = re.compile(r"[+]{0,2}([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)=(.*)", re.DOTALL)
_JOINED, _MARK = "\1", re.compile("\2(\\d+)\3")
"""A line break after a backslash, and the place of an expansion by its number."""
_OPENING = ("if", "for", "while", "until", "case", "select")
_BETWEEN, _CLOSING = ("else", "elif"), ("fi", "done", "esac")
_PREFIXES = ("then", "do", "{", "!", "time", "exec", "nohup", "sudo")
_DECLARING = ("export", "local", "readonly", "declare", "typeset")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv}


class Word(NamedTuple):
    """A word of a command, and the line (from 1) where it begins."""

    text: str
    line: int


def is_script(path: Path, text: str) -> bool:
    """Return whether a file is a shell script, by its name or its first line."""
    return path.suffix in _SUFFIXES or (not path.suffix and re.match(r"#!.*\b(ba|z|k|da)?sh\b", text) is not None)


def read_commands(text: str, first_line: int = 1) -> list[list[Word]]:
    """Return the words of every command that a script names, in order, without redirections and comments."""
    script = _Script()
    script.read(text, first_line)
    return script.commands


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


def cut_off(word: Word) -> Finding:
    """Say that the options from a word on are not part of the command before it."""
    message = (
        f"{word.text} and the options after it are not part of the command: the line before does not end with a "
        "backslash, or a comment stands between"
    )
    return Finding("no-effect", "error", message, THE_FILE, CERTAIN, line=word.line)


@dataclass
class _Branch:
    """A branch of an `if` or `case`, or the body of a loop, that is open."""

    condition: bool | None = None
    """Whether it is taken; null if that is not known."""
    settled: bool = False
    """Whether an earlier branch is known to be taken."""
    before: dict[str, list[str] | None] = field(default_factory=dict)
    """What the variables held that are set in it."""


@dataclass
class _Script:
    commands: list[list[Word]] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)
    """The words of a variable; one word but for arrays."""
    branches: list[_Branch] = field(default_factory=list)
    expansions: list[tuple[str, bool]] = field(default_factory=list)
    """Each expansion of the script, and whether it stands in quotes."""

    def read(self, text: str, line: int) -> None:
        """Note the commands of a script that begins at a line."""
        text = _HEREDOC.sub(lambda match: match[2] + "\n" * (1 + match[3].count("\n")), text)
        text = _PIECES.sub(self._marked, text)
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
        words, array = list[Word](), ""
        try:
            for token in lexer:
                if not token or token.strip(";&|()\n"):
                    begins = line + len(token) - len(token.lstrip(_JOINED))
                    words += [Word(part, begins) for part in self._expanded(token)]
                    line += token.count("\n") + token.count(_JOINED)
                    continue
                for character in token:
                    line += character == "\n"
                    if character == "(" and words and re.fullmatch(r"[A-Za-z_]\w*\+?=", words[-1].text):
                        array, outside, words = words[-1].text, words[:-1], []
                    elif array and character == ")":
                        self._assign(array.rstrip("+="), [word.text for word in words], append="+" in array)
                        array, words = "", outside
                    elif not array:
                        self._end_command(words, alone=token[0] in "\n;")
                        words = []
        except ValueError as error:
            raise UserError(f"it is not a valid script: {error}") from error
        self._end_command(words, alone=False)

    def _marked(self, piece: re.Match[str], quoted: bool = False) -> str:
        """Return what takes the place of a piece of a script before it is split into words."""
        text, kind = piece[0], piece.lastgroup
        if kind == "escape":
            # Within quotes, shlex keeps a backslash before these letters.
            return _JOINED if text == "\\\n" else text[1:] if quoted and text[1] in "$`" else text
        if kind == "quoted":
            return _EXPANSIONS.sub(lambda part: self._marked(part, quoted=True), text)
        if kind == "expansion":
            self.expansions.append((text, quoted))
            return f"\2{len(self.expansions) - 1}\3" + _JOINED * text.count("\n")
        return text if kind == "literal" else ""

    def _expanded(self, token: str) -> list[str]:
        """Return the words that a token becomes; an unquoted variable is split at its spaces, but in an assignment."""
        words = [""]
        for place, part in enumerate(_MARK.split(token.replace(_JOINED, ""))):
            if place % 2 == 0:
                words[-1] += part
                continue
            expansion, quoted = self.expansions[int(part)]
            values = self._value(expansion)
            if not quoted and not _ASSIGNMENT.fullmatch(words[-1]):
                values = [word for value in values for word in value.split()]
            words[-1] += "".join(values[:1])
            words += values[1:]
        # Quotes with nothing in them are a word; an expansion that becomes nothing is none.
        return words if words != [""] or not token else []

    def _value(self, expansion: str) -> list[str]:
        """Return what an expansion becomes: a text, the words of an array, or nothing."""
        if expansion in ("$@", "$*", "${@}", "${*}") or expansion.startswith("`#"):
            return []  # a comment between continued lines is written in backticks
        if expansion.startswith("$(("):
            return [self._arithmetic(expansion[3:-2])]
        parts = _PARAMETER.fullmatch(expansion)
        if parts is None:
            return [UNKNOWN]
        value = self.variables.get(parts[1] or parts[2])
        if parts[4] is not None and value in (None, [""]):
            inner = _PIECES.sub(self._marked, parts[4])
            return ["".join(self._expanded(inner.replace('"', "").replace("'", "")))]
        if value is None:
            return [UNKNOWN]
        return value if parts[3] else value[:1]

    def _arithmetic(self, expression: str) -> str:
        def value(node: ast.expr) -> int:
            if isinstance(node, ast.Constant) and isinstance(node.value, int):
                return node.value
            if isinstance(node, ast.Name):
                return int(self.variables[node.id][0])
            if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
                return int(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
            raise ValueError

        try:
            plain = re.sub(r"\$\{?(\w+)\}?", r"\1", expression).strip()
            return str(value(ast.parse(plain, mode="eval").body))
        except (ValueError, KeyError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
            return UNKNOWN  # of what is nested too deeply, Python's parser says that it has no memory

    def _assign(self, name: str, value: list[str], append: bool = False) -> None:
        before = self.variables.get(name)
        if self.branches:
            self.branches[-1].before.setdefault(name, before)
        if append:
            value = (before or []) + value
        # A variable that holds itself several times grows exponentially.
        self.variables[name] = value if sum(map(len, value)) + len(value) <= LONGEST else [UNKNOWN]

    def _end_branch(self) -> _Branch:
        """Close a branch; what it has set is unknown then, unless it is known to be taken."""
        branch = self.branches.pop()
        if branch.condition is None:
            for name, before in branch.before.items():
                if self.variables.get(name) != before:
                    self.variables[name] = [UNKNOWN]
        return branch

    def _end_command(self, words: list[Word], alone: bool) -> None:
        """Note a command, without the words of `if`, `case` and loops around it.

        Args:
            alone: whether no other command follows on a condition.
        """
        while words and words[0].text in (*_OPENING, *_CLOSING, *_BETWEEN, *_PREFIXES):
            first, holds = words[0].text, _compare(words[1:]) if alone else None
            if first in _OPENING:
                self.branches.append(_Branch(holds if first == "if" else None))
            elif first in _BETWEEN and self.branches:
                last = self._end_branch()
                settled = last.settled or last.condition is True
                condition = None if last.condition is None else not settled and (first == "else" or holds)
                self.branches.append(_Branch(condition, settled))
            elif first in _CLOSING and self.branches:
                self._end_branch()
            if first in ("for", "select") and len(words) > 1:
                items = [word.text for word in words[3:]]
                self._assign(words[1].text, items if len(items) == 1 else [UNKNOWN])
            if first in (*_OPENING, "elif"):
                return
            words = words[1:]
        if any(branch.condition is False for branch in self.branches):
            return
        if words and words[0].text in _DECLARING:
            words = [word for word in words[1:] if _ASSIGNMENT.fullmatch(word.text)]
        assignments = [match for word in words if (match := _ASSIGNMENT.fullmatch(word.text))]
        if len(assignments) == len(words):
            for match in assignments:
                self._assign(match[1], [match[3]])
        elif (script := _script_within(words)) is not None:
            self.commands += [[Word(word.text, script.line) for word in words] for words in read_commands(script.text)]
        else:
            self.commands.append(words)


def _script_within(words: list[Word]) -> Word | None:
    """Return the text of `bash -c TEXT`, which is a script of its own, after a launcher too."""
    for shell, option, text in zip(words, words[1:], words[2:], strict=False):
        if shell.text in ("bash", "sh") and re.fullmatch(r"-[a-z]*c", option.text):
            return text
    return None


def _compare(words: list[Word]) -> bool | None:
    """Return whether `[ a = b ]` holds; null if it is another condition or a side is not known."""
    texts = [word.text for word in words]
    if len(texts) != 5 or texts[0] not in ("[", "[[") or texts[2] not in ("=", "==", "!="):
        return None
    if any(UNKNOWN in text or "*" in text for text in texts):
        return None
    return (texts[1] == texts[3]) == (texts[2] != "!=")
