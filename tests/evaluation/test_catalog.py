"""Tasks by name: filters applied by lm-eval itself, bad input, and the command that looks tasks up."""

import json

import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.config.execution import EVAL_SOURCES, EvalTask
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.evaluation import catalog

from .conftest import RAW, Prepared


def task(name: str, source: str | None = None) -> EvalTask:
    return EvalTask(name=name, about="learned", source=source)


def loaded(prepared: Prepared, name: str, source: str) -> catalog.LoadedTask:
    wanted = task(name, source)
    return catalog.load_task(catalog.task_index([wanted]), wanted, prepared.layout)


def graded(prepared: Prepared, name: str, source: str, response: str, target: str) -> dict[str, float]:
    from lm_eval.api.instance import Instance

    built = loaded(prepared, name, source).leaves[name]
    doc = {"question": "?", "answer": target, "source": "made up"}
    instance = Instance("generate_until", doc, ("?", {}), 0, metadata=(name, 0, 1))
    instance.resps.append(response)
    built._instances = [instance]
    built.apply_filters()
    return {key: built.process_results(doc, [value])["exact_match"] for key, value in instance.filtered_resps.items()}


def test_filters_of_answers(prepared):
    for response, target, strict, flexible in [
        ("3 + 4 = 7\n#### 7", "7", 1, 1),
        ("#### 7 apples", "7", 0, 1),
        ("#### 8\nno: #### 8\n#### 7", "7", 1, 1),
        ("#### 7\nthat is 9", "7", 1, 0),
        ("it is 7 or 8\n#### 8", "7", 0, 0),
        ("", "7", 0, 0),
        ("#### 1,612.5", "1612.5", 1, 1),
        ("#### -7", "7", 0, 0),
    ]:
        scores = graded(prepared, "lorabench_worked", "worked", response, target)
        assert scores == {"strict-match": strict, "flexible-extract": flexible}, response
    # Other tasks take the whole answer.
    for name, source, response, right in [
        ("lorabench_arithmetic", "gcd", " 12 ", 1),
        ("lorabench_arithmetic", "gcd", "it is 12", 0),
        ("lorabench_instruct", "instruct", "\n12\n", 1),
        ("lorabench_instruct", "instruct", "12 3", 0),
    ]:
        assert graded(prepared, name, source, response, "12") == {"none": right}, (name, response)


@pytest.mark.slow
def test_tasks_of_presets_are_known_and_an_unknown_one_is_named():
    for name in ("core", "paper"):
        catalog.task_index(load_preset(name).evaluation.tasks)
    with pytest.raises(UserError, match="'gsm8' is not known to lm-eval"):
        catalog.task_index([task("gsm8")])


def test_answers_that_leave_no_room_for_prompts_are_refused(prepared):
    arithmetic = loaded(prepared, "lorabench_arithmetic", "gcd")
    catalog.check_lengths([arithmetic], "tiny", 9)
    with pytest.raises(UserError, match="max_new_tokens = 8; model 'tiny' takes 8"):
        catalog.check_lengths([arithmetic], "tiny", 8)


def test_tasks_are_looked_up_by_a_command_and_missing_files_are_named(prepared):
    result = CliRunner().invoke(app, ["step", "fetch", "--preset", "mine.yaml"])
    assert result.exit_code == 0, result.output
    fetched = json.loads(prepared.layout.eval_tasks.read_text())["tasks"]
    assert fetched.keys() == {task["name"] for task in RAW["evaluation"]["tasks"]}
    assert {path.stem for path in catalog.TASKS.glob("*.yaml")} == EVAL_SOURCES.keys()
    path = prepared.layout.dataset("gcd")
    aside = path.rename(path.with_suffix(".aside"))
    try:
        with pytest.raises(UserError, match=f"reads {path}, which does not exist"):
            loaded(prepared, "lorabench_arithmetic", "gcd")
    finally:
        aside.rename(path)
