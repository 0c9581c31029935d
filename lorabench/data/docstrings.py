"""Python functions with the descriptions that people wrote for them, from the docstrings of installed packages.

The user's turn shows a function without its docstring; the assistant's turn is the docstring's first paragraph. The
splits come from different packages. The sources are parsed, never imported or run.
"""

from __future__ import annotations

import ast
import gc
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from lorabench.config.datasets import DocstringsDataset
from lorabench.data.chat import SPLITS, Chat, Split
from lorabench.data.installed import InstalledPackage, installed_packages, sources_digest
from lorabench.errors import UserError

PACKAGES: Mapping[Split, tuple[str, ...]] = {
    "test": ("accelerate", "more-itertools", "networkx", "peft", "rich", "snakemake"),
    "validation": ("click", "Jinja2", "sacrebleu", "urllib3"),
    "train": (
        "datasets",
        "fonttools",
        "GitPython",
        "huggingface-hub",
        "lm-eval",
        "matplotlib",
        "mpmath",
        "nltk",
        "numpy",
        "pandas",
        "pillow",
        "pydantic",
        "scipy",
        "SQLAlchemy",
        "sympy",
        "transformers",
    ),
}
"""The packages of each split, all of them dependencies of lorabench. Torch is none of them, since its version differs
by machine. Of functions with the same code, the first one is kept, in the order of this list."""

_QUESTION = "What does this Python function do?"

_CODE_CHARS = 400
"""Longer functions are shown up to the last whole line within this limit."""

# The syntax that is understood is the same for every version of Python that runs this.
_SYNTAX = (3, 11)

_NO_PROSE, _SHORT, _POINTER = "not a paragraph of English sentences", "of too few words", "a pointer or a deprecation"
_LONG, _NO_CODE = "too long", "no code besides the docstring"
_SAME_TEXT, _SAME_CODE = "shares its description with another function", "repeats the code of another function"
_UNPARSED = "file that can't be parsed"

# An English description consists of letters and spaces by this share at least, and has some common words.
_PROSE, _FEWEST_COMMON = 0.88, 3

_TRIPLE_QUOTES, _PARAGRAPH_END = re.compile("\"\"\"|'''"), re.compile(r"\n\s*\n")
_WORD = re.compile(r"[A-Za-z]+")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<>]+)`")
_EMPHASIS = re.compile(r"(?<!\w)\*{1,2}(\w+)\*{1,2}(?!\w)")
_MARKUP = re.compile(
    r">>>|https?:|::|\.\.|[@{}\\|$#]|\w_(\s|$)|`_|<[^>]*>`|:[a-z]+:|"
    r"\b(Args|Arguments|Parameters?|Params|Returns?|Raises|Yields|Usage|Examples?|Notes?|Todo|Warning|See [Aa]lso):|"
    r"TODO|FIXME|XXX|\[\d"
)
_POINTS = re.compile(
    r"(See|Alias|Same as|Refer|Like|Equivalent to|Wrapper|Overrid|Inherit|Copied|Adapted|Calls? )\w*\b|"
    r".*\b(deprecat|obsolete|overrid|backwards?[- ]compat|docstring|see\b)",
    re.IGNORECASE | re.DOTALL,
)
_ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s", re.MULTILINE)
_TITLE = re.compile(r"^.{1,49}[^.,;:(\s]\n(?=[A-Z])")
_COMMON_WORD = re.compile(
    r"\b(an?|and|are|as|be|been|by|can|for|from|has|have|if|in|into|is|its?|may|must|not?|of|on|or|so|such|than|that|the|"
    r"their|then|there|these|this|to|used|using|was|when|where|which|will|with)\b"
)


@dataclass(frozen=True)
class DescribedFunction:
    """A function of a package: its code without the docstring, and the docstring's first paragraph as one line."""

    package: str
    code: str
    description: str

    def chat(self) -> Chat:
        """Return the chat that asks for the description."""
        return Chat.of(self.package, f"{_QUESTION}\n\n{self.code}", self.description)


@dataclass(frozen=True)
class DocstringChats:
    """The examples of each split.

    Attributes:
        about: the packages, their licences, the number of functions in the files that were parsed, the number of usable
            ones, and what was left out by reason.
    """

    splits: Mapping[Split, list[Chat]]
    about: dict[str, Any]

    def __iter__(self) -> Iterator[tuple[Split, Chat]]:
        for split in SPLITS:
            for chat in self.splits[split]:
                yield split, chat


def docstrings_digest() -> str:
    """Return the hash of the sources that the examples come from.

    Raises:
        UserError: a package is missing.
    """
    return sources_digest(installed_packages(_names()))


def choose_docstrings(spec: DocstringsDataset) -> DocstringChats:
    """Choose the examples of each split at random by the spec's seed, from the packages of that split.

    Raises:
        UserError: a package is missing or was changed, or a split's packages have too few usable functions.
    """
    packages, left_out = installed_packages(_names()), Counter[str]()
    with _without_collection():
        described = [function for package in packages for function in _functions(package, spec, left_out)]
    usable = list(_distinct(described, left_out))
    splits: dict[Split, list[Chat]] = {}
    for split in SPLITS:
        chats = [function.chat() for function in usable if function.package in PACKAGES[split]]
        wanted = getattr(spec, split)
        if len(chats) < wanted:
            raise UserError(
                f"found {len(chats)} {split} examples of at most {spec.max_chars} characters in the docstrings of "
                f"{', '.join(PACKAGES[split])}; {wanted} are needed"
            )
        Random(spec.seed).shuffle(chats)
        splits[split] = chats[:wanted]
    about = {
        "id": f"docstrings of {', '.join(f'{package.name} {package.version}' for package in packages)}",
        "licences": {package.name: package.licence for package in packages},
        "rows": len(usable) + sum(left_out.values()) - left_out[_UNPARSED],
        "usable": len(usable),
        "left_out": dict(left_out),
    }
    return DocstringChats(splits, about)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause Python's collection of garbage, which takes a fifth of the time of parsing and finds nothing in trees."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _names() -> list[str]:
    return [name for names in PACKAGES.values() for name in names]


def _functions(
    package: InstalledPackage, spec: DocstringsDataset, left_out: Counter[str]
) -> Iterator[DescribedFunction]:
    """Yield a package's functions that have a usable description; count the others by reason."""
    for _, text in package.texts():
        if not _may_describe(text, spec.min_words):
            continue
        try:
            with warnings.catch_warnings():
                # Python warns of escape sequences in other people's code.
                warnings.simplefilter("ignore")
                tree = ast.parse(text, feature_version=_SYNTAX)
        except (SyntaxError, ValueError, RecursionError):
            left_out[_UNPARSED] += 1
            continue
        # These are the lines that Python counts; `splitlines` would also split at form feeds.
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for node in _definitions(tree.body):
            if docstring := ast.get_docstring(node):
                paragraph = _PARAGRAPH_END.split(docstring.strip(), maxsplit=1)[0]
                function, reason = None, unusable(paragraph, spec.min_words)
                if reason is None:
                    function = DescribedFunction(package.name, _code(node, lines), one_line(paragraph))
                    too_long = function.chat().chars() > spec.max_chars
                    reason = _NO_CODE if not function.code else _LONG if too_long else None
                if reason is None and function is not None:
                    yield function
                else:
                    left_out[str(reason)] += 1


def _may_describe(text: str, min_words: int) -> bool:
    """Return whether a text in triple quotes may be usable, because parsing takes far longer than looking for one."""
    starts = (_PARAGRAPH_END.split(text, maxsplit=1)[0].strip() for text in _TRIPLE_QUOTES.split(text)[1:])
    return any(unusable(start, min_words) is None for start in starts)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a module; functions within functions are not searched."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node
            case ast.ClassDef() | ast.With() | ast.If() | ast.Try():
                yield from _definitions([*node.body, *getattr(node, "orelse", [])])


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return the signature and body without the docstring, cut after whole lines; empty if nothing else is there."""
    docstring, *others = node.body
    end = docstring.end_lineno or docstring.lineno
    if not others or docstring.lineno == node.lineno or others[0].lineno == end:
        return ""
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[end : node.end_lineno]]
    whole = [line.rstrip() for line in textwrap.dedent("\n".join(kept)).splitlines() if line.strip()]
    shown: list[str] = []
    for line in whole:
        if sum(map(len, shown)) + len(shown) + len(line) > _CODE_CHARS:
            break
        shown.append(line)
    signature = docstring.lineno - node.lineno
    if len(shown) == len(whole):
        return "\n".join(shown)
    # A function is not shown if its signature alone exceeds the limit.
    return "\n".join([*shown, "    ..."]) if len(shown) > signature else ""


def one_line(paragraph: str) -> str:
    """Return a paragraph in one line, with the marks of Sphinx reduced to backticks."""
    return " ".join(_EMPHASIS.sub(r"`\1`", _ROLE.sub(r"`\1`", paragraph)).replace("``", "`").split())


def unusable(paragraph: str, min_words: int) -> str | None:
    """Return why a paragraph is no description in English sentences; None if it is one."""
    if len(_WORD.findall(paragraph)) < min_words:
        return _SHORT
    text = one_line(paragraph)
    prose = sum(character.isalpha() or character == " " for character in text)
    sentences = text.isascii() and text.endswith(".") and text[0].isupper() and text.count("`") % 2 == 0
    if not sentences or prose < _PROSE * len(text) or len(set(_COMMON_WORD.findall(text.lower()))) < _FEWEST_COMMON:
        return _NO_PROSE
    if _MARKUP.search(text) or _ITEM.search(paragraph) or _TITLE.match(paragraph):
        return _NO_PROSE
    return _POINTER if _POINTS.match(text) else None


def _distinct(functions: list[DescribedFunction], left_out: Counter[str]) -> Iterator[DescribedFunction]:
    """Yield the functions whose description no other has, each code once.

    Descriptions are compared without the names in backticks, code without the function's name: both by letters alone.
    """
    texts = [_letters(re.sub(r"`[^`]*`", "", function.description)) for function in functions]
    counts, seen = Counter(texts), set[str]()
    for function, text in zip(functions, texts, strict=True):
        code = _letters(re.sub(r"def \w+", "def", function.code, count=1))
        if counts[text] > 1:
            left_out[_SAME_TEXT] += 1
        elif code in seen:
            left_out[_SAME_CODE] += 1
        else:
            seen.add(code)
            yield function


def _letters(text: str) -> str:
    return "".join(re.findall(r"[a-z]+", text.lower()))
