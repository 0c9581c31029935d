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
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorabench.audit.finding import Finding
from lorabench.audit.readers.flat import Options
from lorabench.audit.yaml_lines import LONGEST

UNKNOWN = "\0"
"""Stands in a word for the part that only the running script knows."""

_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".job")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_]\w*")
_ORDINARY = re.compile(r"[^\s\\'\"$`<>;&|()]+")
_OPENING = ("if", "for", "while", "until", "case", "select")
_CLOSING = ("fi", "done", "esac")
_PREFIXES = ("then", "do", "{", "!", "time", "exec", "nohup", "sudo")
_DECLARING = ("export", "local", "readonly", "declare", "typeset")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Word:
    text: str
    line: int
    """From 1: where the word begins."""


def is_script(path: Path, text: str) -> bool:
    """Whether a file is a shell script, by its name or its first line."""
    return path.suffix in _SUFFIXES or (not path.suffix and re.match(r"#!.*\b(ba|z|k|da)?sh\b", text) is not None)


def read_commands(text: str, first_line: int = 1) -> list[list[Word]]:
    """Return the words of every command that a script names, in order, without redirections and comments."""
    script = _Script(text, first_line)
    script.read()
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
    options = Options()
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not re.match(r"--[a-zA-Z]", word.text):
            continue
        name, equals, first = word.text[2:].partition("=")
        values = [first] if equals else []
        while not equals and at < len(words) and not re.match(r"--[a-zA-Z]", words[at].text):
            values.append(words[at].text)
            at += 1
        said = [known(value) for value in values]
        value = True if not said else said[0] if len(said) == 1 else said
        options.set(name.replace("-", "_"), value, word.line)
    return options


def cut_off(word: Word) -> Finding:
    """Say that the options from a word on are not part of the command before it."""
    return Finding(
        code="no-effect",
        level="error",
        message=f"{word.text} and the options after it are not part of the command: the line before does not end "
        "with a backslash, or a comment stands between",
        source="the file alone",
        sure="certain",
        line=word.line,
    )


@dataclass
class _Block:
    """An `if`, `case` or loop that is open."""

    condition: bool | None = None
    """Of the branch that is being read; null if it is not known."""
    taken: bool = False
    """An earlier branch is known to be taken."""
    before: dict[str, list[str] | None] = field(default_factory=dict)
    """What the variables held that were set in the branch."""


@dataclass
class _Script:
    text: str
    line: int
    at: int = 0
    commands: list[list[Word]] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)
    """The words of a variable; one word but for arrays."""
    blocks: list[_Block] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    """Delimiters of texts that follow the current line (`<<EOF`)."""

    def read(self) -> None:
        while self.at < len(self.text):
            words = self._words("\n;&|()")
            end = self._skip(1)
            self._end_command(words, alone=end in ("\n", ";"))
            if end == "\n":
                self._skip_bodies()

    def _skip(self, characters: int) -> str:
        skipped = self.text[self.at : self.at + characters]
        self.line += skipped.count("\n")
        self.at += characters
        return skipped

    def _skip_bodies(self) -> None:
        for delimiter in self.bodies:
            end = re.compile(rf"^[ \t]*{re.escape(delimiter)}[ \t]*$", re.MULTILINE).search(self.text, self.at)
            self._skip((end.end() if end else len(self.text)) - self.at)
        self.bodies = []

    def _words(self, ends: str) -> list[Word]:
        """Read words up to one of the characters that end a command."""
        words: list[Word] = []
        pieces: list[str] | None = None  # of the word that is being read
        line = self.line
        drop = False  # the next word is the target of a redirection

        def finish() -> None:
            nonlocal pieces, drop
            if pieces is not None and not drop:
                words.append(Word("".join(pieces), line))
            if pieces is not None:
                drop = False
            pieces = None

        while self.at < len(self.text):
            character = self.text[self.at]
            if character == "\\" and self.text[self.at + 1 : self.at + 2] == "\n":
                self._skip(2)
            elif pieces is None and character == "#":
                end = self.text.find("\n", self.at)
                self._skip((len(self.text) if end < 0 else end) - self.at)
            elif character in "<>" or self.text.startswith("&>", self.at):
                if pieces and "".join(pieces).isdigit():
                    pieces = None
                finish()
                operation = re.compile(r"&?[<>]+[&|-]?").match(self.text, self.at)
                redirection = self._skip(len(operation[0]) if operation else 1)
                if redirection.startswith("<<") and not redirection.startswith("<<<"):
                    delimiter = re.compile(r"\s*[\"'\\]?(\w+)[\"']?").match(self.text, self.at)
                    if delimiter:
                        self.bodies.append(delimiter[1])
                        self._skip(len(delimiter[0]))
                else:
                    drop = True
            elif character in ends:
                array = _ASSIGNMENT.fullmatch("".join(pieces or ()))
                if character != "(" or array is None or array[3]:
                    break
                self._skip(1)
                self._assign(array[1], [word.text for word in self._array()], bool(array[2]))
                pieces = None
            elif character.isspace():
                finish()
                self._skip(1)
            else:
                if pieces is None:
                    pieces, line = [], self.line
                quoted = character in "\"'"
                fragments = self._fragments()
                plain = len(fragments) == 1 and not re.search(r"\s", fragments[0])
                if plain or quoted or _ASSIGNMENT.fullmatch("".join(pieces)):
                    pieces.append(fragments[0] if fragments else "")
                    for fragment in fragments[1:]:  # an array in quotes is several words
                        finish()
                        pieces = [fragment]
                    if not fragments and pieces == [""]:
                        pieces = None
                else:  # an unquoted variable is split at its spaces
                    parts = [part for fragment in fragments for part in fragment.split()]
                    pieces.extend(parts[:1])
                    for part in parts[1:]:
                        finish()
                        pieces = [part]
                    if not pieces:
                        pieces = None
        finish()
        return words

    def _array(self) -> list[Word]:
        words = self._words(")")
        self._skip(1)
        return words

    def _fragments(self) -> list[str]:
        """Read a quoted text, an expansion, or ordinary characters; several fragments are words of an array."""
        character = self.text[self.at]
        if character == "'":
            end = self.text.find("'", self.at + 1)
            return [self._skip((len(self.text) if end < 0 else end + 1) - self.at).strip("'")]
        if character == '"':
            self._skip(1)
            fragments = [""]
            while self.at < len(self.text) and self.text[self.at] != '"':
                if self.text[self.at] == "$" or self.text[self.at] == "`":
                    expanded = self._expansion()
                    if not expanded and fragments == [""] and self.text[self.at : self.at + 1] == '"':
                        fragments = []
                        break
                    fragments[-1] += expanded[0] if expanded else ""
                    fragments += expanded[1:]
                elif self.text[self.at] == "\\":
                    escaped = self._skip(2)
                    fragments[-1] += {"\\\n": ""}.get(escaped, escaped[1:] if escaped[1:] in '"$`\\' else escaped)
                else:
                    fragments[-1] += self._skip(1)
            self._skip(1)
            return fragments
        if character in "$`":
            return self._expansion()
        if character == "\\":
            return [self._skip(2)[1:]]
        ordinary = _ORDINARY.match(self.text, self.at)
        return [self._skip(len(ordinary[0]) if ordinary else 1)]

    def _expansion(self) -> list[str]:
        if self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            output = self._skip((len(self.text) if end < 0 else end + 1) - self.at)
            return [] if output.startswith("`#") else [UNKNOWN]  # a comment between continued lines is written so
        self._skip(1)
        if self.text.startswith("((", self.at):
            return [self._arithmetic(self._balanced("(", ")")[1:-1])]
        if self.text.startswith("(", self.at):
            self._balanced("(", ")")
            return [UNKNOWN]
        if self.text.startswith("{", self.at):
            return self._parameter(self._balanced("{", "}"))
        name = _NAME.match(self.text, self.at)
        if name:
            self._skip(len(name[0]))
            return self.variables.get(name[0], [UNKNOWN])[:1]
        special = self._skip(1)
        return [] if special in ("@", "*") else [UNKNOWN] if special in "0123456789#?$!-" else ["$" + special]

    def _balanced(self, opening: str, closing: str) -> str:
        """Skip a bracket and what it holds, and return what it holds."""
        depth, start = 0, self.at
        while self.at < len(self.text):
            character = self._skip(1)
            depth += (character == opening) - (character == closing)
            if depth == 0:
                break
        return self.text[start + 1 : self.at - 1]

    def _parameter(self, inside: str) -> list[str]:
        parts = re.fullmatch(r"([A-Za-z_]\w*)(\[[@*]\])?(:?[-=](.*))?", inside, re.DOTALL)
        if parts is None:
            return [] if inside in ("@", "*") else [UNKNOWN]
        value = self.variables.get(parts[1])
        if parts[3] is not None and (value is None or value == [""]):
            default = _Script(parts[4], self.line, variables=self.variables)
            return ["".join(piece for part in default._default() for piece in part)]
        if value is None:
            return [UNKNOWN]
        return value if parts[2] else value[:1]

    def _default(self) -> list[list[str]]:
        parts = []
        while self.at < len(self.text):
            parts.append(self._fragments())
        return parts

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
        if self.blocks:
            self.blocks[-1].before.setdefault(name, before)
        if append:
            value = (before or []) + value
        # A variable that holds itself several times grows exponentially.
        self.variables[name] = value if sum(map(len, value)) + len(value) <= LONGEST else [UNKNOWN]

    def _end_branch(self) -> None:
        """Make unknown what a branch or loop has set that is not known to be taken."""
        block = self.blocks[-1]
        if block.condition is None:
            for name, before in block.before.items():
                if self.variables.get(name) != before:
                    self.variables[name] = [UNKNOWN]
        block.taken = block.taken or block.condition is True
        block.before = {}

    def _left_out(self) -> bool:
        """Return whether the branch that is being read is known not to be taken."""
        return any(block.condition is False for block in self.blocks)

    def _end_command(self, words: list[Word], alone: bool) -> None:
        """Note a command; `alone` says that no other command follows on a condition."""
        while words:
            first = words[0].text
            if first in _OPENING:
                self.blocks.append(_Block(_compare(words[1:]) if first == "if" and alone else None))
                if first in ("for", "select") and len(words) > 1:
                    items = [word.text for word in words[3:]]
                    self._assign(words[1].text, items if len(items) == 1 else [UNKNOWN])
                return
            if first in ("else", "elif") and self.blocks:
                self._end_branch()
                taken, known = self.blocks[-1].taken, self.blocks[-1].condition is not None
                condition = True if first == "else" else _compare(words[1:]) if alone else None
                self.blocks[-1].condition = False if taken else condition if known else None
                if first == "elif":
                    return
            elif first in _CLOSING and self.blocks:
                self._end_branch()
                self.blocks.pop()
            elif first not in _PREFIXES:
                break
            words = words[1:]
        if not words or self._left_out():
            return
        if words[0].text in _DECLARING:
            words = [word for word in words[1:] if _ASSIGNMENT.fullmatch(word.text)]
        assignments = [_ASSIGNMENT.fullmatch(word.text) for word in words]
        if all(assignments):
            for match in assignments:
                assert match is not None
                self._assign(match[1], [match[3]])
        elif (within := _within(words)) is not None:
            self.commands += [
                [replace(word, line=within.line) for word in command] for command in read_commands(within.text)
            ]
        else:
            self.commands.append(words)


def _within(words: list[Word]) -> Word | None:
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
