"""Collects the text of datasets of kind `docstrings`: functions of installed packages with their descriptions.

    python workflow/scripts/docstrings.py lorabench/data/docstrings.parquet

Each row is a function of at most 800 characters: its code without the docstring, and the docstring's first paragraph if
it is a description in English sentences. The splits come from different packages. Another version of a package has
other functions, so the shipped file was written once, with the versions that its note names; the sources are parsed,
never imported or run. `lorabench.data.docstrings` reads the file.
"""

import ast
import json
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = {
    "test": ("accelerate", "more-itertools", "networkx", "peft", "rich", "snakemake"),
    "validation": ("click", "Jinja2", "sacrebleu", "urllib3"),
    "train": ("datasets", "fonttools", "GitPython", "huggingface-hub", "lm-eval", "matplotlib", "mpmath", "nltk",
              "numpy", "pandas", "pillow", "pydantic", "scipy", "SQLAlchemy", "sympy", "transformers"),
}  # fmt: skip
MIN_WORDS, MAX_CHARS, CODE_CHARS = 14, 800, 400
QUESTION = "What does this Python function do?"

# Folders of tests, of copies of other packages, and (`models`) of the near-copies of one model's code for the next.
SKIPPED = {"tests", "testing", "test", "_vendor", "vendored", "externals", "array_api_compat", "models"}
# An English description consists of letters and spaces by this share at least, and has some common words.
PROSE, FEWEST_COMMON = 0.88, 3
TRIPLE_QUOTES, PARAGRAPH_END = re.compile("\"\"\"|'''"), re.compile(r"\n\s*\n")
WORD = re.compile(r"[A-Za-z]+")
ROLE = re.compile(r":[a-z:]+:`~?([^`<>]+)`")
EMPHASIS = re.compile(r"(?<!\w)\*{1,2}(\w+)\*{1,2}(?!\w)")
MARKUP = re.compile(
    r">>>|https?:|::|\.\.|[@{}\\|$#]|\w_(\s|$)|`_|<[^>]*>`|:[a-z]+:|"
    r"\b(Args|Arguments|Parameters?|Params|Returns?|Raises|Yields|Usage|Examples?|Notes?|Todo|Warning|See [Aa]lso):|"
    r"TODO|FIXME|XXX|\[\d"
)
POINTS = re.compile(
    r"(See|Alias|Same as|Refer|Like|Equivalent to|Wrapper|Overrid|Inherit|Copied|Adapted|Calls? )\w*\b|"
    r".*\b(deprecat|obsolete|overrid|backwards?[- ]compat|docstring|see\b)",
    re.IGNORECASE | re.DOTALL,
)
ITEM = re.compile(r"^\s*([-*+]|\d+[.)])\s", re.MULTILINE)
TITLE = re.compile(r"^.{1,49}[^.,;:(\s]\n(?=[A-Z])")
COMMON_WORD = re.compile(
    r"\b(an?|and|are|as|be|been|by|can|for|from|has|have|if|in|into|is|its?|may|must|not?|of|on|or|so|such|than|that|the|"
    r"their|then|there|these|this|to|used|using|was|when|where|which|will|with)\b"
)


def sources(package: Distribution) -> Iterator[str]:
    """Yield the text of each Python source of a package, in the order of the paths."""
    for file in sorted(package.files or (), key=str):
        path = PurePosixPath(str(file))
        skipped = SKIPPED.intersection(path.parts[:-1]) or path.name.startswith(("test_", "conftest", "__config__"))
        if path.suffix == ".py" and ".." not in path.parts and not skipped:
            yield Path(str(file.locate())).read_bytes().decode(errors="replace")


def functions(package: Distribution, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield a package's functions that have a usable description; count the others by reason."""
    for text in sources(package):
        starts = (PARAGRAPH_END.split(part, maxsplit=1)[0].strip() for part in TRIPLE_QUOTES.split(text)[1:])
        # Parsing takes far longer than looking for a text that may be usable.
        if not any(unusable(start) is None for start in starts):
            continue
        with warnings.catch_warnings():
            # Python warns of escape sequences in other people's code.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, feature_version=(3, 11))
        # These are the lines that Python counts; `splitlines` would also split at form feeds.
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for node in definitions(tree.body):
            if docstring := ast.get_docstring(node):
                paragraph = PARAGRAPH_END.split(docstring.strip(), maxsplit=1)[0]
                description, reason, shown = plain(paragraph), unusable(paragraph), ""
                if reason is None:
                    shown = code(node, lines)
                    chars = len(f"{QUESTION}\n\n{shown}") + len(description)
                    reason = "no code besides the docstring" if not shown else "too long" if chars > MAX_CHARS else None
                if reason is None:
                    yield {"code": shown, "description": description, "words": len(WORD.findall(paragraph))}
                else:
                    left_out[reason] += 1


def definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the functions and methods of a module; functions within functions are not searched."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node
            case ast.ClassDef() | ast.With() | ast.If() | ast.Try():
                yield from definitions([*node.body, *getattr(node, "orelse", [])])


def code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return the signature and body without the docstring, cut after whole lines; empty if nothing else is there."""
    docstring, *others = node.body
    end = docstring.end_lineno or docstring.lineno
    if not others or docstring.lineno == node.lineno or others[0].lineno == end:
        return ""
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[end : node.end_lineno]]
    whole = [line.rstrip() for line in textwrap.dedent("\n".join(kept)).splitlines() if line.strip()]
    shown: list[str] = []
    for line in whole:
        if sum(map(len, shown)) + len(shown) + len(line) > CODE_CHARS:
            break
        shown.append(line)
    if len(shown) == len(whole):
        return "\n".join(shown)
    # A function is not shown if its signature alone exceeds the limit.
    return "\n".join([*shown, "    ..."]) if len(shown) > docstring.lineno - node.lineno else ""


def plain(paragraph: str) -> str:
    """Return a paragraph in one line, with the marks of Sphinx reduced to backticks."""
    return " ".join(EMPHASIS.sub(r"`\1`", ROLE.sub(r"`\1`", paragraph)).replace("``", "`").split())


def unusable(paragraph: str) -> str | None:
    """Return why a paragraph is no description in English sentences; None if it is one."""
    if len(WORD.findall(paragraph)) < MIN_WORDS:
        return "of too few words"
    text = plain(paragraph)
    prose = sum(character.isalpha() or character == " " for character in text)
    sentences = text.isascii() and text.endswith(".") and text[0].isupper() and text.count("`") % 2 == 0
    common = len(set(COMMON_WORD.findall(text.lower())))
    layout = MARKUP.search(text) or ITEM.search(paragraph) or TITLE.match(paragraph)
    if not sentences or prose < PROSE * len(text) or common < FEWEST_COMMON or layout:
        return "not a paragraph of English sentences"
    return "a pointer or a deprecation" if POINTS.match(text) else None


def licence(package: Distribution) -> str:
    """Return the licence that a package's metadata state, in one line."""
    stated = package.metadata
    if "License-Expression" in stated:
        return str(stated["License-Expression"])
    classifiers = [text for text in stated.get_all("Classifier") or [] if text.startswith("License ::")]
    if classifiers:
        return ", ".join(text.rpartition(" :: ")[2] for text in classifiers)
    lines = (stated.get_all("License") or [""])[0].strip().splitlines()
    return lines[0].strip() if lines else "not stated"


def main(path: str) -> None:
    """Write the file."""
    rows: list[dict[str, Any]] = []
    packages, left_out = [], Counter[str]()
    for split, names in PACKAGES.items():
        for name in names:
            package = distribution(name)
            packages.append((name, package.version, licence(package)))
            rows += [{"split": split, "package": name, **row} for row in functions(package, left_out)]
    note = {
        "id": f"docstrings of {', '.join(f'{name} {version}' for name, version, _ in packages)}",
        "licences": {name: stated for name, _, stated in packages},
        "left_out": left_out,
    }
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"lorabench": json.dumps(note)})
    pq.write_table(table, path, compression="zstd", compression_level=19)


if __name__ == "__main__":
    main(sys.argv[1])
