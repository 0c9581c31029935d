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

from lora_advice.audit.readers.flat import Options
from lora_advice.audit.yaml_lines import LONGEST
from lora_advice.finding import Finding

UNKNOWN = "\0"
"""Stands in a word for the part that only the running script knows."""

_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".job")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_ROUND, _CURLY = r"\([^()]*+\)", r"\{[^{}]*+\}"
for _ in range(5):  # brackets within brackets
    _ROUND, _CURLY = rf"\((?:[^()]++|{_ROUND})*+\)", rf"\{{(?:[^{{}}]++|{_CURLY})*+\}}"
_EXPANSION = rf"\$(?:{_ROUND}|{_CURLY}|[A-Za-z_]\w*+|[\d@*#?$!({{-])|`[^`]*+`?"
_IN_QUOTES = rf"\\.|{_EXPANSION}|[^\\$`\"]++|[\\$]"
_PIECE = rf"\\.|'[^']*+'?|\"(?:{_IN_QUOTES})*+\"?|{_EXPANSION}"
_PIECES_IN_QUOTES = re.compile(_IN_QUOTES, re.DOTALL)
_PIECES = re.compile(rf"{_PIECE}|[^\\'\"$`]++|[\\$]", re.DOTALL)
_PARAMETER = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(\[[@*]\])?(?::?[-=](.*))?\})", re.DOTALL)
_TOKEN = re.compile(
    r"\\\n|[^\S\n]+|#[^\n]*"
    r"|\d*<<-?(?!<)\s*[\"'\\]?(?P<delimiter>\w+)[\"']?"
    r"|(?P<redirection>\d*(?:&>|[<>])[<>]*[&|-]?)"
    r"|(?P<array>[A-Za-z_]\w*\+?=)\("
    r"|(?P<end>[\n;&|()])"
    rf"|(?P<word>(?:{_PIECE}|[^\s\\'\"$`;&|()<>]++|[\\$])++)",
    re.DOTALL,
)
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
    commands: list[list[Word]] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)
    """The words of a variable; one word but for arrays."""
    blocks: list[_Block] = field(default_factory=list)

    def read(self, text: str, line: int) -> None:
        at, words, array, redirected = 0, list[Word](), "", False
        command, bodies = words, list[str]()
        while token := _TOKEN.match(text, at):
            end, said = token.end(), token[0]
            if token["delimiter"]:
                bodies.append(token["delimiter"])
            elif token["redirection"]:
                redirected = True
            elif token["word"]:
                words += [] if redirected else [Word(part, line) for part in self._expand(said, _PIECES)]
                redirected = False
            elif token["array"]:
                array, words = token["array"], []
            elif token["end"] and array:
                if said == ")":
                    self._assign(array.rstrip("+="), [word.text for word in words], append="+" in array)
                    array, words = "", command
            elif token["end"]:
                self._end_command(words, alone=said in "\n;")
                words = command = []
                redirected = False
                if said == "\n":
                    for delimiter in bodies:
                        last = re.compile(rf"^[ \t]*{delimiter}[ \t]*$", re.MULTILINE).search(text, end)
                        end = last.end() if last else len(text)
                    bodies = []
            line += text.count("\n", at, end)
            at = end
        self._end_command(command, alone=False)

    def _expand(self, text: str, pieces: re.Pattern[str], split: bool = True) -> list[str]:
        """Return the words that a text becomes without its quotes; an unquoted variable is split at its spaces."""
        words: list[str] = []
        for piece in pieces.findall(text):
            if piece[0] == "\\":
                kept = pieces is _PIECES_IN_QUOTES and piece[1:] not in ('"', "$", "`", "\\", "\n")
                found = [piece] if kept else piece[1:].split()
            elif pieces is _PIECES and piece[0] == "'":
                found = [piece.strip("'")]
            elif pieces is _PIECES and piece[0] == '"':
                inside = piece[1:].removesuffix('"')
                found = self._expand(inside, _PIECES_IN_QUOTES, split=False) if inside else [""]
            elif piece == "$" or piece[0] not in "$`":
                found = [piece]
            else:
                found = self._value(piece)
                if split and not (words and _ASSIGNMENT.fullmatch(words[-1])):
                    found = [part for each in found for part in each.split()]
            if words:
                words[-1] += "".join(found[:1])
                found = found[1:]
            words += found
        return words

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
            return ["".join(self._expand(parts[4], _PIECES, split=False))]
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
