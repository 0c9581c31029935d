"""Problem sets: distinct, disjoint, with the right answers; sets of the hub are read from local copies."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorabench.config.inputs import HubProblems, ReasoningProblems
from lorabench.data.grading import BOX, NUMBER_BOX, gsm8k_answer, last_box, last_number, number
from lorabench.data.problems import make_problems, read_problems, write_problems
from lorabench.errors import UserError

from ..hub.repositories import SUBJECTS, write_deepmath, write_gsm8k

COUNTS = {"train": 40, "validation": 10, "test": 10}


def reasoning(kind="arithmetic", **changes):
    return make_problems(ReasoningProblems(kind=kind, **(COUNTS | changes)))


def write_rows(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")


def hendrycks(question, solution):
    return {"problem": question, "level": "Level 1", "type": "Algebra", "solution": solution}


def math500(question, answer):
    return {"problem": question, "solution": "?", "answer": answer, "subject": "A", "level": 1, "unique_id": question}


@pytest.fixture
def copies(tmp_path):
    """Write copies of the sets; return a function that makes the problems of a kind."""

    def make(kind, math=(), math500_rows=(), **changes):
        if kind == "gsm8k":
            write_gsm8k(tmp_path)
        if kind == "math":
            for subject in SUBJECTS:
                folder = tmp_path / "EleutherAI/hendrycks_math" / subject
                write_rows(folder, "train.parquet", [hendrycks(f"{subject} one?", r"\boxed{1}")])
                write_rows(folder, "test.parquet", [hendrycks(f"{subject} two?", r"\boxed{2}")])
            write_rows(tmp_path / "EleutherAI/hendrycks_math/geometry", "train.parquet", math)
            write_rows(tmp_path / "HuggingFaceH4/MATH-500", "test.jsonl", math500_rows)
        if kind == "deepmath":
            write_deepmath(tmp_path)
        return make_problems(HubProblems(kind=kind, path=str(tmp_path), **(COUNTS | changes)))

    return make


def test_splits_are_whole_distinct_short_and_have_a_number():
    for changes in [{}, {"tasks": ["products", "gcd", "count_bits"]}, {"kind": "gsm_symbolic"}]:
        rows = reasoning(**changes)
        assert Counter(row["split"] for row in rows) == COUNTS
        assert len({row["question"] for row in rows}) == 60
        assert all(number(row["answer"]) is not None and len(row["question"]) <= 400 for row in rows)


def test_same_seed_same_problems_and_another_seed_others():
    assert reasoning() == reasoning()
    assert reasoning() != reasoning(seed=100_000)


def test_sums_are_right_and_as_long_as_asked_for():
    for row in reasoning(min_digits=3, max_digits=4, min_terms=3, max_terms=5):
        terms = row["question"].removesuffix(" =").rpartition(": ")[2].split()
        assert 3 <= len(terms[::2]) <= 5
        assert all(3 <= len(term) <= 4 for term in terms[::2])
        total = int(terms[0]) + sum(int(f"{sign}{term}") for sign, term in zip(terms[1::2], terms[2::2], strict=True))
        assert row["answer"] == str(total)


def test_splits_are_equally_hard_where_easy_problems_run_out():
    """There are 200 sums of two single digits, and half of the drawn problems are such sums until they are used up."""

    def easy(split):
        terms = [row["question"].rpartition(": ")[2].split() for row in rows if row["split"] == split]
        return sum(len(term[0]) == len(term[2]) == 1 for term in terms) / len(terms)

    rows = reasoning(train=1000, validation=200, test=400)
    assert easy("train") == pytest.approx(easy("test"), abs=0.08)


def test_gsm_symbolic_uses_the_templates_of_the_worked_solutions():
    assert all(int(row["source"].partition("/")[2]) % 2 == 1 for row in reasoning("gsm_symbolic"))


def test_impossible_wishes_are_refused():
    with pytest.raises(UserError, match="distinct train problems of kind 'arithmetic'; 500 are needed"):
        reasoning(train=500, max_digits=1)


def test_presets_that_can_not_be():
    for kind, changes, message in [
        ("arithmetic", {"min_digits": 3}, "min_digits = 3 is more than max_digits = 2"),
        ("arithmetic", {"tasks": ["dice"]}, "chain_sum"),
        ("gsm_symbolic", {"max_terms": 3}, "max_terms: gsm_symbolic has no such choice"),
        ("aime24", {"train": 1, "validation": 0}, "aime24 is only tested on"),
        ("math", {"validation": 0}, "both must be at least 1"),
        ("math", {"revisions": {"openai/gsm8k": "main"}}, "unknown id 'openai/gsm8k'; allowed: EleutherAI/hendrycks"),
        ("math", {"path": "no/where"}, "folder 'no/where' does not exist"),
    ]:
        model = ReasoningProblems if kind in ("arithmetic", "gsm_symbolic") else HubProblems
        with pytest.raises(ValidationError, match=message):
            model(kind=kind, **(COUNTS | changes))


def test_round_trip(tmp_path):
    rows = reasoning()
    write_problems(rows, tmp_path / "problems.parquet")
    assert read_problems(tmp_path / "problems.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["problems.parquet"]


def test_a_file_with_a_shared_problem_is_refused_whatever_its_spaces(tmp_path):
    rows = reasoning()
    copy = {**rows[0], "split": "test", "question": f" {rows[0]['question']}\n"}
    write_problems([*rows, copy], tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="splits 'train' and 'test' share the example"):
        read_problems(tmp_path / "bad.parquet")


def test_gsm8k_keeps_line_separators_and_its_own_test(copies):
    rows = copies("gsm8k")
    assert Counter(row["split"] for row in rows) == COUNTS
    for row in rows:
        n = int(row["question"].split()[3])
        assert row["question"] == f"How many\u2028are {n} thousand?" + NUMBER_BOX
        assert row["answer"] == str(n * 1000)
        assert (n >= 100) == (row["split"] == "test")


def test_math_trains_on_everything_but_math_500(copies, caplog):
    rows = copies(
        "math",
        math=[
            hendrycks("tested?", r"so \boxed{5}"),
            hendrycks("empty?", r"so \boxed{}"),
            hendrycks("blank?", r"so \fbox{ }."),
            hendrycks("bare?", r"so $\boxed 2$."),
            hendrycks("nested?", r"not \boxed{1} but $\boxed{\frac{1}{\sqrt{2}}}$."),
            hendrycks("fbox?", r"so \fbox{$\{1,2\}$}."),
            hendrycks(" bare? ", r"so $\boxed 2$."),
        ],
        math500_rows=[math500("tested? ", "5"), math500("other?", "6")],
        train=15,
        validation=1,
        test=1,
    )
    answers = {row["question"].removesuffix(BOX): row["answer"] for row in rows}
    held_out = {row["question"].removesuffix(BOX) for row in rows if row["split"] == "test"}
    assert held_out < {"tested?", "other?"}
    assert set(answers) - held_out == {
        *(f"{subject} one?" for subject in SUBJECTS if subject != "geometry"),
        *(f"{subject} two?" for subject in SUBJECTS),
        *("bare?", "nested?", "fbox?"),
    }
    assert answers["bare?"] == "2"
    assert answers["nested?"] == r"\frac{1}{\sqrt{2}}"
    assert answers["fbox?"] == r"$\{1,2\}$"
    assert (
        "EleutherAI/hendrycks_math/geometry: left out of the problems of train: 2 without an answer (first: row "
        in caplog.text
    )
    assert len(caplog.records) == 1


def test_deepmath_holds_out_the_same_problems_however_much_is_trained_on(copies):
    def held_out(rows):
        return [row for row in rows if row["split"] != "train"]

    few, many = copies("deepmath"), copies("deepmath", train=80)
    assert held_out(few) == held_out(many)
    assert held_out(few) != held_out(copies("deepmath", seed=1))
    assert all(row["answer"] == rf"\dfrac{{{row['question'].split()[2][:-1]}}}{{7}}" for row in many)
    with pytest.raises(UserError, match="found 80 distinct train problems of kind 'deepmath'; 81 are needed"):
        copies("deepmath", train=81)


def test_what_is_wrong_with_a_copy_is_named(tmp_path):
    spec = HubProblems(kind="aime25", path=str(tmp_path), train=0, validation=0, test=1)
    folder = tmp_path / "math-ai/aime25"
    with pytest.raises(UserError, match=r"aime25 has no test\*.parquet or test\*.jsonl"):
        make_problems(spec)
    write_rows(folder, "test.jsonl", [{"problem": "?", "result": "1"}])
    with pytest.raises(
        UserError, match=r"math-ai/aime25 has the columns problem, result in .*test.jsonl:1; answer is needed"
    ):
        make_problems(spec)
    (folder / "test.jsonl").write_text("{")
    with pytest.raises(UserError, match="test.jsonl:1 is not JSON"):
        make_problems(spec)


def test_the_last_box():
    contents = [
        (r"\boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{1} then \fbox{2}.", "2"),
        (r"\boxed {\frac{1}{2}} {", r"\frac{1}{2}"),
        (r"\boxed{\{x : x > 0\}}", r"\{x : x > 0\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"$\boxed 2$ is it", "2"),
        ("\\boxed 12\nis it", "12"),
        (r"\boxed{}", ""),
        (r"\boxed", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxedness{2}", None),
        ("no box", None),
        ("\\boxed{a\u2028b}", "a\u2028b"),
    ]
    for text, content in contents:
        assert last_box(text) == content, text


def test_the_last_number():
    values = [
        ("12 and -3", -3),
        ("10 - 3", 3),
        ("10-3", 3),
        ("it is (-3).", -3),
        ("so $1,234.50!", Fraction(2469, 2)),
        ("#### 33.0", 33),
        ("1,2,3", 3),
        ("12,345,67", 67),
        (".5", Fraction(1, 2)),
        ("none", None),
        ("9" * 5000, None),
    ]
    for text, value in values:
        assert last_number(text) == value, text


@given(st.integers(), st.integers(0, 999))
def test_numbers_are_read_exactly(whole, thousandths):
    assert number(f"{whole:,}") == number(str(whole)) == whole
    assert number(f"{abs(whole)}.{thousandths:03d}") == abs(whole) + Fraction(thousandths, 1000)


def test_what_is_no_number():
    for text in ("", "1/2", "1e3", "12,34", "--1", "1 2", "\uff11\uff12", "0x1", "1_000", "inf"):
        assert number(text) is None, text


def test_the_answer_of_a_gsm8k_solution():
    assert gsm8k_answer("a #### 1\n#### 1,234,567\n") == "1234567"
    assert gsm8k_answer("no mark") is None
    assert gsm8k_answer("####") is None
