"""`lorabench init` writes a valid preset for the model and data, and reports a mistake before it writes."""

import json

import pytest

from lorabench.config.experiments import AutoLrs
from lorabench.config.inputs import PathModel
from lorabench.config.loading import load_preset
from lorabench.custom.model import find_model
from lorabench.custom.preset import DEFAULT_RANK, Choices, init_preset, recommended_batch, recommended_rank, splits
from lorabench.data.sft import make_dataset
from lorabench.data.tokens import encode_chat
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.models.specs import model_id
from lorabench.planning.plan import make_plan

from .conftest import write_rows


def init(path, model, data, choices=None, force=False, form=None):
    said: list[str] = []
    return init_preset(path, model, str(data), form, choices or Choices(), force, said.append), "\n".join(said)


def test_the_preset_describes_the_data(tmp_path):
    data = write_rows(tmp_path / "own.jsonl", 1000)
    with data.open("a") as file:
        file.write("{}\n")
    preset, said = init(tmp_path / "mine.yaml", "tiny", data)
    assert preset == load_preset(str(tmp_path / "mine.yaml"))
    assert "1000 of 1001 rows can be used as prompt/completion; left out: 1 no text (first: row 1001)" in said
    dataset, [block] = preset.datasets["own"], preset.experiments.rank
    assert (dataset.train, dataset.validation, dataset.test, dataset.format) == (800, 100, 100, "prompt/completion")
    assert block.ranks == {"all": [1, 8, 32]}
    assert block.lrs.fullft == block.lrs.lora == AutoLrs()
    # The geometric mean of the law's 5e-5 (2000/128)^0.781 = 4.28e-4 for FullFT and ten times that for LoRA.
    assert "it starts at 1.4e-3" in (tmp_path / "mine.yaml").read_text()
    assert (block.batch_sizes, block.seeds.best, block.epochs) == ([8], 3, 1.0)
    assert len(list(make_dataset(dataset))) == 1000


@pytest.mark.parametrize("grader", [None, "number"])
def test_what_a_user_chooses_counts_and_variants_stand_beside_the_same_runs_of_lora(tmp_path, grader):
    columns = ("question", "answer") if grader else ("prompt", "completion")
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(dict.fromkeys(columns, str(n))) + "\n" for n in range(60)))
    variants = ("dora", "rslora", "olora", "qlora")
    gpu = None if grader else "A10"
    choices = Choices((2, 5), seeds=2, epochs=3.0, held_out=0.2, gpu=gpu, grader=grader, variants=variants)
    preset, said = init(tmp_path / "mine.yaml", "tiny", data, choices)
    main, beside = list(preset.experiments.trained().values())
    assert (main[0].ranks, main[0].seeds.best) == ({"all": [2, 5]}, 2)
    if not grader:
        assert (main[0].epochs, preset.protocol.precision, preset.execution.gpu) == (3.0, "bf16", "A10")
        assert (preset.datasets["own"].train, preset.datasets["own"].test) == (36, 12)
        assert "runs have 27 steps; below 100" in said
    [block] = beside
    assert block.variants == ["lora", "dora", "rslora", "olora", "qlora"]
    assert [block.model_copy(update={"variants": ["lora"]})] == main
    assert sorted(len(sweep.experiments) for sweep in make_plan(preset).sweeps) == [1] * 8 + [2] * 3


def test_a_base_without_a_template_gets_the_plain_one_and_is_another_model_with_it(tmp_path, base):
    preset, said = init(tmp_path / "mine.yaml", str(base), write_rows(tmp_path / "own.jsonl", 20))
    assert "chat_template: plain" in said
    spec = preset.models["base"]
    assert model_id(spec) != model_id(spec.model_copy(update={"chat_template": None}))
    tokenizer = load_tokenizer(spec)
    ids, scored = encode_chat(tokenizer, [{"role": "user", "content": "2+2 "}, {"role": "assistant", "content": "\n4"}])
    assert tokenizer.decode(ids) == "User:\n2+2\n\nAssistant:\n4<|end|>\n\n"
    assert tokenizer.decode([i for i, is_scored in zip(ids, scored, strict=True) if is_scored]) == "4<|end|>"
    with pytest.raises(ValueError, match="is no file; allowed: plain, or the path of a Jinja file"):
        PathModel.model_validate(spec.model_dump() | {"chat_template": "fancy"})


def test_names_of_files_can_hold_anything(tmp_path):
    for name in ('true # "x" \u2028: {no}\n[a].jsonl', "true.jsonl", "2024.jsonl", "_.jsonl"):
        preset, _ = init(tmp_path / "my odd.yaml", "tiny", write_rows(tmp_path / name, 20), force=True)
        [dataset] = preset.datasets.values()
        assert dataset.path == str(tmp_path / name)


def test_sizes_of_splits_and_batches_and_ranks_by_hand():
    sizes = {(50, 0.1): [40, 5, 5], (10, 0.01): [8, 1, 1], (100_000, 0.1): [98_500, 500, 1000]}
    assert {case: list(splits(*case).values()) for case in sizes} == sizes
    with pytest.raises(UserError, match="9 usable examples are too few; at least 10 are needed"):
        splits(9, 0.1)
    # Batches are small and make a hundred steps where the data allow.
    sizes = {2: 2, 40: 4, 799: 4, 800: 8, 1600: 16, 3200: 32, 10**6: 32}
    assert {examples: recommended_batch(examples) for examples in sizes} == sizes
    # A rank has a parameter for each scored token. These are the parameters of rank 1, the unembedding included.
    llama, per_rank = find_model("meta-llama/Llama-3.1-8B"), 2_753_792
    ranks = {None: DEFAULT_RANK, 5e6: DEFAULT_RANK, 32 * per_rank: 32, 32 * per_rank + 1: 64, 100 * per_rank: 128}
    assert {tokens: recommended_rank(llama, tokens) for tokens in ranks} == ranks
    assert recommended_rank(llama, 1e12) == 512
    assert recommended_rank(find_model("tiny"), 1e12) == 64, "half of the width"


MISTAKES = (
    ("mine.txt", {}, "mine.txt must end in .yaml"),
    ("laptop.yaml", {}, "'laptop' is the name of a shipped preset"),
    ("there.yaml", {}, "there.yaml exists; --force overwrites it"),
    ("mine.yaml", {"choices": Choices(gpu="H9000")}, "gpu = 'H9000': not known; allowed: A100-40GB"),
    ("mine.yaml", {"form": "tables"}, "format 'tables': allowed: messages, conversations"),
    ("mine.yaml", {"choices": Choices(grader="numbr")}, "grader 'numbr': allowed: number, boxed"),
    ("mine.yaml", {"choices": Choices(grader="number"), "form": "text"}, "--format and --grader"),
    ("mine.yaml", {"choices": Choices(variants=("adalora",))}, "variants.1 = 'adalora': input should be 'lora'"),
    ("mine.yaml", {"form": "text"}, "0 of 20 rows can be used as text; left out: 20 no text"),
)


def test_a_mistake_is_reported_and_nothing_written(tmp_path):
    data = write_rows(tmp_path / "own.jsonl", 20)
    (tmp_path / "there.yaml").write_text("mine")
    for name, changes, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            init(tmp_path / name, "tiny", data, **changes)
        assert {path.name for path in tmp_path.iterdir()} == {"own.jsonl", "there.yaml"}
        assert (tmp_path / "there.yaml").read_text() == "mine"
    preset, _ = init(tmp_path / "there.yaml", "tiny", data, force=True)
    assert load_preset(str(tmp_path / "there.yaml")) == preset


def test_problems_with_answers_make_a_preset_of_reinforcement_learning(tmp_path):
    problems = [{"question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(400)]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, [*problems, {"question": "no answer"}])))
    preset, said = init(tmp_path / "mine.yaml", "tiny", data, Choices(grader="number"))
    assert preset == load_preset(str(tmp_path / "mine.yaml"))
    assert "400 of 401 rows can be used as question/answer; left out: 1" in said
    problems, [block] = preset.problems["sums"], preset.experiments.rl
    assert (problems.kind, problems.grader, problems.train) == ("file", "number", 320)
    assert block.ranks == {"all": [1, 32]}
    assert (block.problems_per_step, block.group_size, block.steps, block.seeds.best) == (16, 16, 50, 3)
    # Half of the 512 tokens that the model takes.
    assert block.max_new_tokens == 256
    assert block.lrs.fullft == block.lrs.lora == AutoLrs()
