"""YAML of users: what would take long to read, or has a second meaning, is one sentence; the rest is what YAML says."""

import re

import pytest

from lorabench.errors import UserError
from lorabench.utils.yaml_files import read_yaml

# Nine aliases of nine aliases, and so on, 30 times: 9^30 values in 2 kB.
BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 31)
)
REFUSED = {
    "aliases of aliases": (BOMB, "line 5: there are more than 20,000 keys and values"),
    "a list in itself": ("&a [*a]", "line 1: *a is an alias of what contains it"),
    "very deep lists": ("[" * 500_000, "not valid YAML: .*(nesting|expected)|more than 50 levels"),
    "deep blocks": ("- " * 400_000, "line 1: there are more than 50 levels"),
    "too large": (" " * 1_000_001, "a YAML file has at most 1 MB here"),
    "a repeated key": ("a: 1\nb:\n  c: 2\n  'c': 3\n", "line 4: the key 'c' is there twice"),
    "a long number": ("x: " + "9" * 5_000, "the number 99999999999999999999... has more than 20 digits (line 1)"),
    "no number": ("x: 0x_", "not valid YAML: invalid literal for int"),
    "a tag that makes objects": ("!!python/object/apply:os.getpid []", "can't be used here"),
    "a key that is a list": ("{[1]: 2}", "not valid YAML: while constructing a mapping, found unhashable key (line 1)"),
    "Latin-1": ("größe: 1".encode("latin-1"), "not valid YAML: it is not UTF-8"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    pattern = message if "|" in message else re.escape(message)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


def test_what_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    # A mark of the byte order, an alias, and a mapping that changes what it merges.
    path.write_text("base: &base {lr: 1.0e-3, seed: 0}\nown: {<<: *base, seed: 1}\nagain: *base\n", "utf-8-sig")
    base = {"lr": 1e-3, "seed": 0}
    assert read_yaml(path) == {"base": base, "own": {"lr": 1e-3, "seed": 1}, "again": base}
