"""The pages that are written by hand stay short enough to be read."""

import re
from pathlib import Path

from ..conftest import REPOSITORY

PAGES = ("*.md", "config/*.md", ".github/*.md", "docs/**/*.md", "studies/*/README.md", "advice/**/*.md")

MOST = 36_000
"""Words of all pages, without code blocks and the parts that are written from results."""


def words_by_hand(page: Path) -> int:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+): written by .*?<!-- end of \1 -->", "", text, flags=re.S)
    return len(re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S).split())


def test_the_pages_written_by_hand_are_few_enough_words():
    words = {page: words_by_hand(page) for pattern in PAGES for page in REPOSITORY.glob(pattern)}
    assert {REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "docs/results.md")} <= words.keys()
    assert sum(words.values()) <= MOST, sorted(words.items(), key=lambda item: -item[1])
