"""Presets: the shipped presets are valid, the schema is current, and a mistake is reported in one clear sentence."""

import json
import re

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter

from lorabench.config.experiments import AutoLrs
from lorabench.config.inputs import MODELS, ModelSpec
from lorabench.config.loading import PRESETS, SCHEMA, load_preset, preset_path, shipped
from lorabench.config.preset import Preset, json_schema
from lorabench.errors import UserError
from lorabench.store.layout import Layout

from ..conftest import REPOSITORY


def test_what_is_shipped_is_valid_and_the_schema_is_current():
    for name in shipped("*"):
        load_preset(name)
    assert SCHEMA.read_text() == json_schema(), "run: lorabench step schema > workflow/presets/schema.json"
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in (*PRESETS.rglob("*.yaml"), *(REPOSITORY / "studies").glob("*/presets/**/*.yaml")):
        validator.validate(yaml.safe_load(path.read_text()))
    for spec in yaml.safe_load(MODELS.read_text()).values():
        TypeAdapter(ModelSpec).validate_python(spec)


RANK, RL, TINY = ("experiments", "rank", 0), ("experiments", "rl_arithmetic", 0), ("models", "tiny")
SIZES = {"parameters": 1, "hidden_size": 1}
TASK = {"name": "lorabench_instruct", "about": "learned", "source": "instruct"}


def evaluation(**changes):
    """Return where an evaluation with a changed task is written, and the evaluation."""
    return ("evaluation",), {"experiments": ["rank"], "tasks": [TASK | changes]}


MISTAKES = [
    (("predictions",), {"lrratio": {}}, "predictions: unknown key 'lrratio'; allowed: lr_"),
    (("predictions",), {"lr_ratio": {"naive": {"c": -1}}}, r"predictions: lr_ratio\.naive\.c = -1: input should be gr"),
    (*evaluation(source="worked"), r"tasks\.0\.source = .worked.: allowed for lorabench_in.*: instruct$"),
    (*evaluation(name="gsm8k"), r"tasks\.0\.source = 'instruct': allowed for gsm8k: None$"),
    (("problems", "test"), {"kind": "sums", "train": 1, "validation": 1, "test": 1}, "held_out: 'test' is trained on"),
    ((*RANK, "rnaks"), [1], r"experiments\.rank\.0: unknown key 'rnaks'; allowed: .*ranks"),
    (("execution", "threads"), "2", r"execution\.threads = '2': this is text to YAML.*write 2$"),
    ((*RANK, "models"), ["tinny"], r"experiments\.rank\.0\.models: unknown name 'tinny'; allowed: tiny"),
    ((*TINY, "kind"), "big", r"models\.tiny = \{'kind': 'big'\}: .* expected tags: 'tiny', 'hub'"),
    (TINY, {"name": "tiny"}, r"models\.tiny: missing key 'kind'; allowed: 'tiny'"),
    ((*RANK, "ranks"), {}, r"ranks \{\} and lrs\.lora .*: give both for LoRA, or neither"),
    (RANK[:2], {"models": ["tiny"]}, r"rank\.models = \['tiny'\]: a block is a mapping; allowed for rank: a list"),
    ((*RANK, "lrs", "lora"), [1e-2, 1e-3], r"lora grid .* must be ascending without repeats"),
    ((*RANK, "batch_sizes"), [65], r"batch_sizes: 65 is more than the 64 training"),
    (("experiments",), {}, r"experiments: none of them trains; needed is one of rank"),
    ((*RL, "prompt"), "Solve!", r"prompt = 'Solve!': must contain \{question\} once"),
    ((*RANK, "lrs"), "atuo", "lrs: 'atuo' is neither auto nor a mapping of fullft and lora$"),
    ((*RANK, "lrs", "lora"), {"begin": 1e-3}, r"rank\.0\.lrs\.lora: unknown key 'begin'; allowed: most, per_"),
    ((*RANK, "seeds"), {"best": 2, "around": 3}, r"rank\.0\.seeds: around = 3: at most best, which is 2$"),
    (TINY, SIZES | {"kind": "path", "path": "/no"}, r"models\.tiny\.path: model folder '/no' has no config\.json"),
    ((*RANK, "steps"), "9" * 400, r"steps = '9+': input should be a valid integer"),
    ((*RANK, "variants"), ["dora"], "experiment rank has the variant 'dora'"),
    (("models", "My Model"), {"kind": "tiny"}, r"models\.My Model = 'My Model'"),
]


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_field(path, value, message, raw_preset, raw_rl_preset, write_preset):
    raw = raw_rl_preset if path[0] == "problems" or path[:3] == RL else raw_preset
    raw_rl_preset["experiments"]["rl_arithmetic"][0]["held_out"] += ["test"] * (path == ("problems", "test"))
    part = raw
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(UserError) as caught:
        load_preset(write_preset(raw))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_mapping(write_preset):
    with pytest.raises(UserError, match=rf"preset 'lpatop': .*allowed: {', '.join(shipped('*'))}, or"):
        load_preset("lpatop")
    for text, message in (("- a\n", "is a mapping of"), ("", "is a mapping of"), ("models: [tiny", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            load_preset(write_preset(text))


def test_a_model_of_the_catalogue_needs_no_definition_and_a_preset_may_have_its_own(raw_preset, write_preset):
    raw_preset["experiments"]["rank"][0]["models"] = ["tiny", "qwen-64"]
    preset = load_preset(write_preset(raw_preset))
    assert {name: spec.name for name, spec in preset.models.items()} == {"tiny": "llama-128", "qwen-64": "qwen-64"}
    raw_preset["models"]["qwen-64"] = {"kind": "tiny", "name": "qwen-128"}
    assert load_preset(write_preset(raw_preset)).models["qwen-64"].name == "qwen-128"
    del raw_preset["models"]
    assert set(load_preset(write_preset(raw_preset)).models) == {"tiny", "qwen-64"}


def test_named_blocks_share_what_is_common_to_them_and_mistakes_call_them_by_name(raw_preset, write_preset):
    [block] = raw_preset["experiments"]["rank"]
    expected = load_preset(write_preset(raw_preset | {"experiments": {"rank": [block | {"seeds": 3}, block]}}))
    named = {"common": block, "more": {"seeds": 3}, "same": {}}
    assert load_preset(write_preset(raw_preset | {"experiments": {"rank": named}})) == expected

    for mistake, message in (
        ({"seeds": 0}, r"seeds\.best = 0: input"),
        ({"models": ["tinny"]}, "models: unknown name"),
    ):
        named = {"common": block, "first": {}, "second": mistake}
        with pytest.raises(UserError, match=rf"experiments\.rank\.second\.{message}"):
            load_preset(write_preset(raw_preset | {"experiments": {"rank": named}}))
    raw_preset["evaluation"] = {"experiments": ["rank"], "tasks": {"gsm8k": {"about": "lost"}}}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.gsm8k\.about = 'lost'"):
        load_preset(write_preset(raw_preset))


def test_a_preset_changes_what_it_extends(raw_preset, write_preset):
    [block] = raw_preset["experiments"]["rank"]
    raw_preset["experiments"]["rank"] = {"grid": block}
    task = {"about": "learned", "source": "instruct"}
    tasks = {"lorabench_instruct": task, "lorabench_instruct_bits": task}
    raw_preset["evaluation"] = {"experiments": ["rank"], "tasks": tasks}
    write_preset(raw_preset, "parent")
    changes = {
        "extends": "parent.yaml",
        "datasets": {"instruct": {"train": 32}},
        "experiments": {"rank": {"grid": {"lrs": {"lora": [0.5]}, "seeds": None}}, "early": [block]},
        "evaluation": {"tasks": {"lorabench_instruct": {"limit": 4}, "lorabench_instruct_bits": None}},
    }
    preset = load_preset(write_preset(changes, "child"))
    assert preset.description == raw_preset["description"]
    assert (preset.datasets["instruct"].train, preset.datasets["instruct"].test) == (32, 8)
    [grid] = preset.experiments.rank
    assert (grid.lrs.fullft, grid.lrs.lora, grid.seeds.best) == ([1e-3, 3e-3], [0.5], 3)
    assert preset.experiments.early[0].seeds.best == 2
    assert [(task.name, task.limit) for task in preset.evaluation.tasks] == [("lorabench_instruct", 4)]
    less = load_preset(write_preset({"extends": ["child.yaml"], "experiments": {"early": None}}, "grandchild"))
    experiments = preset.experiments.model_copy(update={"early": None})
    assert less == preset.model_copy(update={"experiments": experiments})


def test_a_preset_has_no_name_of_something_else_and_no_pattern(raw_preset, write_preset):
    for name in ("a{b}", "Models", "published", "..", "-x", "x ", "x\ny", "x\x1b[31m", "laptop@100", "a*b", "x" * 101):
        with pytest.raises(UserError, match="this is the name of something else|a preset's name begins"):
            preset_path(write_preset(raw_preset, name))
    for name in ("laptop", "my preset", "größe-2", "qwen2.5_7b+x", "x" * 100):
        assert Layout.of(write_preset(raw_preset, name)).root.as_posix() == f"results/{name}"


def test_what_can_not_be_extended_is_one_sentence(write_preset):
    for name, message in [
        ("crore", r"extends = 'crore': no file \S+; allowed: core, .*suites/sft, or a path"),
        ("suites/sft", r"mine\.yaml: description: missing"),
        (3, "extends = 3: the name of a preset, or a list of names, is needed"),
    ]:
        with pytest.raises(UserError, match=message):
            load_preset(write_preset({"extends": name}))
    write_preset({"extends": "second.yaml"}, "first")
    second = write_preset({"extends": "first.yaml"}, "second")
    with pytest.raises(UserError, match=r"must not extend itself, but \S+second.yaml extends \S+first.yaml extends"):
        load_preset(second)


def test_lrs_that_a_sweep_finds(raw_preset, write_preset):
    [block] = raw_preset["experiments"]["rank"]

    def lrs(written, **changes):
        raw_preset["experiments"]["rank"] = [block | {"lrs": written} | changes]
        [parsed] = Preset.model_validate(raw_preset).experiments.rank
        return parsed.lrs.fullft, parsed.lrs.lora

    assert lrs("auto") == (AutoLrs(start=None, per_decade=3, most=9),) * 2
    assert lrs("auto", ranks={}) == (AutoLrs(), [])
    assert lrs({"fullft": [], "lora": {"start": 2e-3, "most": 5}}) == ([], AutoLrs(start=2e-3, most=5))
    # In a preset that extends another, `auto` counts as the mapping of both methods.
    raw_preset["experiments"]["rank"] = {"common": block | {"lrs": "auto"}, "lora-only": {"lrs": {"fullft": []}}}
    [merged] = load_preset(write_preset(raw_preset)).experiments.rank
    assert (merged.lrs.fullft, merged.lrs.lora) == ([], AutoLrs())
    common = block | {"lrs": {"fullft": []}}
    raw_preset["experiments"]["rank"] = {"common": common, "lora": {"lrs": {"lora": "auto"}}, "both": {"lrs": "auto"}}
    lora, both = load_preset(write_preset(raw_preset)).experiments.rank
    assert (lora.lrs.fullft, both.lrs.fullft, both.lrs.lora) == ([], AutoLrs(), AutoLrs())
    raw_preset["experiments"]["rank"] = [block | {"lrs": "auto", "seeds": {"every": 2}}]
    with pytest.raises(UserError, match=r"rank\.0: seeds\.every = 2: allowed with fixed LRs, not with lrs: auto$"):
        load_preset(write_preset(raw_preset))


def test_every_wrong_or_missing_field_is_named(raw_preset, write_preset):
    raw_preset["experiments"]["rank"][0]["ranks"] = {"all": [0, -1]}
    del raw_preset["datasets"]["instruct"]["test"]
    with pytest.raises(UserError) as caught:
        load_preset(write_preset(raw_preset))
    assert len(str(caught.value).splitlines()) == 3
    assert "datasets.instruct.test: missing" in str(caught.value)
