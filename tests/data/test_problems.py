"""Problem sets are distinct and disjoint, with right answers and workings; controls find rules that are known."""

from collections import Counter
from itertools import islice, product
from random import Random

import pytest

from lorabench.config.inputs import HubProblems, ReasoningProblems, SumProblems
from lorabench.config.loading import load_preset
from lorabench.data.grading import BOX, NUMBER_BOX, Grader, last_number, number
from lorabench.data.problems import controls, make_problems, read_problems, write_problems
from lorabench.data.reasoning import CAREFUL, Writers, n_carries, sum_problems, written_sum
from lorabench.errors import UserError

from ..hub.repositories import (
    SUBJECTS,
    copies,
    write_deepmath,
    write_gsm8k,
    write_hendrycks_math,
    write_jsonl,
    write_math500,
)

COUNTS = {"train": 40, "validation": 10, "test": 10}


def made(folder, kind, **changes):
    """Make the problems of a set of which a folder has a copy."""
    return make_problems(HubProblems(kind=kind, **(COUNTS | changes)), copies(folder))


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (ReasoningProblems(kind="arithmetic", **COUNTS), 400),
        (ReasoningProblems(kind="arithmetic", tasks=["products", "gcd", "count_bits"], **COUNTS), 400),
        (ReasoningProblems(kind="gsm_symbolic", **COUNTS), 400),
        (SumProblems(kind="sums", **COUNTS), 5),
    ],
)
def test_splits_are_whole_distinct_short_with_a_number_and_other_test_problems_leave_the_rest(spec, most, tmp_path):
    rows, others, other_seed = (
        make_problems(spec.model_copy(update=update)) for update in ({}, {"test_seed": 100}, {"seed": 100_000})
    )
    assert Counter(row["split"] for row in rows) == Counter(row["split"] for row in others) == COUNTS
    assert others[:50] == rows[:50]
    assert len({row["question"] for row in rows + others[50:]}) == 70
    assert all(number(row["answer"]) is not None and len(row["question"]) <= most for row in rows)
    assert rows == make_problems(spec) != other_seed
    write_problems(rows, tmp_path / "problems.parquet")
    assert read_problems(tmp_path / "problems.parquet") == rows
    if spec.kind == "gsm_symbolic":
        assert all(int(row["source"].partition("/")[2]) % 2 == 1 for row in rows), "the templates of worked solutions"


def test_too_few_problems_are_refused():
    few = ReasoningProblems(kind="arithmetic", max_digits=1, **COUNTS | {"train": 500})
    with pytest.raises(UserError, match="distinct train problems of kind 'arithmetic'; 500 are needed"):
        make_problems(few)
    few = SumProblems(kind="sums", test_seed=100, **COUNTS | {"test": 3000})
    with pytest.raises(UserError, match=r"found \d+ distinct other test problems of kind 'sums'; 3000 are needed"):
        make_problems(few)


@pytest.mark.parametrize(
    ("name", "others"), [("laptop_more@100", {"all-sums", "hopeless"}), ("rl_smollm2@100", {"sums"})]
)
def test_held_out_seeds_have_other_test_problems_where_there_are_enough(name, others):
    problems = load_preset(name).problems
    assert {name for name, spec in problems.items() if spec.test_seed is not None} == others
    for spec in problems.values():
        assert Counter(row["split"] for row in make_problems(spec))["test"] == spec.test


def test_gsm8k_keeps_line_separators_and_its_own_test_and_deepmath_is_split(tmp_path):
    write_gsm8k(tmp_path)
    rows = made(tmp_path, "gsm8k")
    assert Counter(row["split"] for row in rows) == COUNTS
    for row in rows:
        n = int(row["question"].split()[3])
        assert row["question"] == f"How many\u2028are {n} thousand?" + NUMBER_BOX
        assert row["answer"] == str(n * 1000)
        assert (n >= 100) == (row["split"] == "test")
    write_deepmath(tmp_path)
    assert len({row["question"] for row in made(tmp_path, "deepmath")}) == 60


def test_math_trains_on_everything_but_math_500(tmp_path, caplog):
    write_hendrycks_math(tmp_path)
    write_math500(tmp_path)
    more = {"empty?": r"so \boxed{}", "nested?": r"not \boxed{1} but $\boxed{\frac{1}{\sqrt{2}}}$.", " nested? ": ""}
    rows = [{"problem": question, "solution": solution} for question, solution in more.items()]
    write_jsonl(tmp_path / "EleutherAI/hendrycks_math/geometry/train-more.jsonl", rows)
    rows = made(tmp_path, "math", train=72, validation=1, test=12)
    answers = {row["question"].removesuffix(BOX): row["answer"] for row in rows}
    assert len(answers) == len(SUBJECTS) * 2 * 6 + 1
    assert answers.pop("nested?") == r"\frac{1}{\sqrt{2}}"
    assert all(answer == rf"\frac{{{question.split()[2]}}}{{7}}" for question, answer in answers.items())
    held_out = {row["question"].removesuffix(BOX) for row in rows if row["split"] == "test"}
    assert held_out == {f"What is {n % 6} in {SUBJECTS[n // 6]} of test?" for n in range(12)}
    [record] = caplog.records
    left_out = "EleutherAI/hendrycks_math/geometry: left out of the problems of train: 2 without an answer (first: row "
    assert record.getMessage().startswith(left_out)


def test_the_working_is_right_or_without_carries():
    for terms, careful, careless in [
        ((47, 85), "7+5=12 4+8+1=13 132", "7+5=12 4+8=12 122"),
        ((42, 15), "2+5=7 4+1=5 57", "2+5=7 4+1=5 57"),
        ((456, 547), "6+7=13 5+4+1=10 4+5+1=10 1003", "6+7=13 5+4=9 4+5=9 993"),
    ]:
        assert written_sum(*terms, CAREFUL, Random(0)) == careful
        assert written_sum(*terms, Writers(careless=1.0, most_slips=0.0), Random(0)) == careless
    assert [n_carries(*terms) for terms in ((42, 15), (47, 85), (99, 11), (456, 547), (456, 546))] == [0, 1, 1, 2, 2]
    assert n_carries(540, 540) == 0, "the leftmost column is written whole"


def test_sets_of_sums_have_carries_and_right_workings_and_are_graded_by_the_last_number():
    problems = list(islice(sum_problems(2, 3, 1, seed=0), 200))
    for problem in problems:
        first, second = map(int, problem.question.split("+"))
        assert int(problem.answer) == first + second == last_number(problem.response)
        assert len(str(first)) == len(str(second))
        assert n_carries(first, second) >= 1
    assert {len(problem.question) for problem in problems} == {5, 7}
    # No cheap rule solves them.
    two_digits = [(each.question, each.answer) for each in islice(sum_problems(2, 2, 1, seed=0), 700)]
    chosen = controls(two_digits[:500], two_digits[500:])
    assert chosen.constant < 0.05
    assert chosen.rule < 0.2
    assert problems == list(islice(sum_problems(2, 3, 1, seed=0), 200))
    grader = SumProblems(kind="sums", **COUNTS).grader
    assert Grader(grader).grade(["1+2=3 12", "12 1"], ["12"] * 2) == [True, False]


def asked(answer):
    numbers = range(10, 100, 3)
    return [(f"What is {a} with {b}?", str(answer(a, b))) for a, b in product(numbers, numbers)]


def with_others(problems, wrong):
    """Return the problems with another answer of one in ten, so that no rule is always right."""
    rng = Random(0)
    return [(question, wrong if rng.random() < 0.1 else answer) for question, answer in problems]


def test_every_rule_is_found_where_it_is_mostly_right():
    rules = {
        "the sum without carries": lambda a, b: (a // 10 + b // 10) % 10 * 10 + (a + b) % 10,
        "a constant for each tuple of first digits": lambda a, b: 100 + int(str(a)[0]) * int(str(b)[0]),
        "a constant for each tuple of last digits": lambda a, b: 100 + (a % 10) * (b % 10),
        "the smallest + a constant for each tuple of first digits": lambda a, b: min(a, b) + int(str(max(a, b))[0]),
    }
    for text, answer in rules.items():
        problems = asked(answer)
        chosen = controls(with_others(problems, "999"), problems)
        assert chosen.rule_text == text
        assert chosen.rule > 0.98
    parities = asked(lambda a, b: 2 if a % 2 == b % 2 == 0 else 1)
    noisy = with_others(parities, "7")
    assert controls(noisy, noisy).rule == pytest.approx(0.9, abs=0.05)
    assert controls(parities, parities).rule < 1, "the rule that is always right is the task"
