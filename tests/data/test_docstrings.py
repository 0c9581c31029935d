"""Descriptions of functions from installed packages: only English sentences, splits by package, identity by content."""

from __future__ import annotations

import base64
import hashlib
import sys
from pathlib import Path

import pytest

from lorabench.config.datasets import DocstringsDataset
from lorabench.data import docstrings, installed
from lorabench.data.identity import dataset_id
from lorabench.data.sft import about, build_dataset, read_dataset
from lorabench.errors import UserError

SPEC = DocstringsDataset(kind="docstrings", train=1, validation=1, test=1, min_words=6)

GOOD = '''
def {name}(x, factor=2):
    """Multiply the {thing} by a factor, and return the result as it is.

    Args:
        x: left out.
    """
    # {thing}
    return x * factor
'''
BAD = '''
def same_text_a(x):
    """Return the value that is given by the `x` of the caller."""
    return x.a

def same_text_b(y):
    """Return the value that is given by the `y` of the caller."""
    return y.bb

def same_code(x, factor=2):
    """Scale a number by the factor that is given, as others do."""
    # apples
    return x * factor

def pointer(x):
    """See the other function for what this one does with it."""
    return x.c

def old(x):
    """Return the value, but this function is deprecated in the next version."""
    return x.d

def doctest(x):
    """Return the value that is the same as this >>> f(1) for the caller."""
    return x.e

def sections(x):
    """Return the value of the argument that is given here.
    Args: x, which is a number of the caller."""
    return x.f

def short(x):
    """Return the value."""
    return x.g

def no_stop(x):
    """Return the value that is given by the caller of this function"""
    return x.h

def no_code(x):
    """Return the value that is given by the caller, or nothing at all."""
'''


def install(site: Path, name: str, files: dict[str, str], version: str = "1.0") -> None:
    """Write a distribution as an installer does, with its record."""
    lines = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        sha256 = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        lines.append(f"{path},sha256={sha256},{len(text)}")
    meta = site / f"{name}-{version}.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n"
    )
    (meta / "RECORD").write_text("\n".join([*lines, f"{meta.name}/RECORD,,"]))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages that is the only one."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(docstrings, "PACKAGES", {"test": ("ta",), "validation": ("va",), "train": ("tr",)})
    installed._installed.cache_clear()
    yield tmp_path
    installed._installed.cache_clear()


def install_all(site: Path, **changes) -> None:
    for name, thing in (("ta", "apples"), ("va", "pears"), ("tr", "plums")):
        install(site, name, {f"{name}/code.py": GOOD.format(name=name, thing=thing)} | changes.get(name, {}))


def made(spec: DocstringsDataset = SPEC) -> dict[str, list[tuple[str, str]]]:
    chosen = docstrings.choose_docstrings(spec)
    return {
        split: [tuple(m["content"] for m in chat.messages) for chat in chats] for split, chats in chosen.splits.items()
    }


def test_a_function_is_shown_without_its_docstring_and_described_by_the_first_paragraph(site):
    install_all(site)
    prompt = "What does this Python function do?\n\ndef ta(x, factor=2):\n    # apples\n    return x * factor"
    assert made()["test"] == [(prompt, "Multiply the apples by a factor, and return the result as it is.")]


def test_unusable_descriptions_are_left_out_and_counted_by_reason(site, tmp_path):
    install_all(site, tr={"tr/bad.py": BAD, "tr/broken.py": f"def (:\n{BAD}", "tr/tests/test_a.py": GOOD})
    assert {split: len(rows) for split, rows in made().items()} == {"test": 1, "validation": 1, "train": 1}
    build_dataset(SPEC, tmp_path / "made.parquet")
    note = about(tmp_path / "made.parquet")
    assert note["left_out"] == {
        "file that can't be parsed": 1,
        "shares its description with another function": 2,
        "repeats the code of another function": 1,
        "a pointer or a deprecation": 2,
        "not a paragraph of English sentences": 3,
        "of too few words": 1,
        "no code besides the docstring": 1,
    }
    assert (note["rows"], note["usable"], note["licences"]["tr"]) == (13, 3, "MIT")
    assert note["id"] == "docstrings of ta 1.0, va 1.0, tr 1.0"


def test_a_long_function_is_cut_after_a_whole_line_unless_its_signature_is_too_long(site):
    lines = "".join(f"    line_{number} = {'x' * 60}\n" for number in range(20))
    signature = "def {}(\n" + "".join(f"    argument_{number}: {'x' * 60},\n" for number in range(9)) + "):\n"
    described = '    """Return what is left after all lines of the function have run."""\n'
    install_all(
        site,
        ta={"ta/code.py": f"def long():\n{described}{lines}", "ta/b.py": signature.format("f") + described + lines},
    )
    [(prompt, _)] = made()["test"]
    code = prompt.split("\n\n")[1].splitlines()
    assert code[0] == "def long():"
    assert code[1:-1] == lines.splitlines()[: len(code) - 2] != []
    assert code[-1] == "    ..."
    assert len("\n".join(code)) < 410


def test_another_version_or_content_is_another_dataset(site):
    install_all(site)
    ids = [dataset_id(SPEC), dataset_id(SPEC.model_copy(update={"seed": 1}))]
    for name, version, text in (("tr", "1.1", GOOD), ("tr", "1.1", GOOD + "\n")):
        for old in site.glob(f"{name}-*"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        install(site, name, {f"{name}/code.py": text.format(name=name, thing="plums")}, version)
        installed._installed.cache_clear()
        ids.append(dataset_id(SPEC))
    assert len(set(ids)) == 4


def test_what_is_wrong_is_one_sentence(site):
    with pytest.raises(UserError, match="not installed: ta, va, tr; install lorabench with all its dependencies"):
        dataset_id(SPEC)
    install_all(site)
    installed._installed.cache_clear()
    with pytest.raises(
        UserError, match=r"found 1 train examples of at most 800 characters in the docstrings of tr; 9 are"
    ):
        made(SPEC.model_copy(update={"train": 9}))
    (site / "tr/code.py").write_text(BAD)
    with pytest.raises(UserError, match=r"tr/code.py of package tr 1.0 was changed after it was installed"):
        made()


def test_an_installation_without_a_record_of_sources_is_refused(site):
    install_all(site)
    (site / "va-1.0.dist-info/RECORD").write_text("va.pth,,\n")
    with pytest.raises(UserError, match=r"the installation of package va 1.0 has no record of its sources"):
        dataset_id(SPEC)


@pytest.mark.slow
def test_the_real_packages_hold_enough_for_the_overnight_preset(tmp_path):
    spec = DocstringsDataset(kind="docstrings", train=4000, validation=96, test=256)
    build_dataset(spec, tmp_path / "made.parquet")
    rows = list(read_dataset(tmp_path / "made.parquet"))
    sources = {split: {row["source"] for row in rows if row["split"] == split} for split in docstrings.PACKAGES}
    assert {split: of <= set(docstrings.PACKAGES[split]) for split, of in sources.items()} == dict.fromkeys(
        sources, True
    )
    answers = [row["messages"][1]["content"] for row in rows]
    assert len(set(answers)) == len(rows) == 4352
    assert all(answer.endswith(".") and answer.isascii() for answer in answers)
    assert 110 < sum(map(len, answers)) / len(answers) < 180
    assert all(len(row["messages"][0]["content"]) < 450 for row in rows)
