"""Models and data are described correctly before anything is loaded."""

import json
import shutil

import pytest
from lora_advice.models import facts

from lorabench.config.inputs import HubModel, PathModel, TinyModel
from lorabench.custom.data import examine
from lorabench.custom.model import find_model
from lorabench.data.files import TOO_LONG
from lorabench.errors import UserError
from lorabench.models.base import load_config
from lorabench.models.specs import dimensions


def test_a_shipped_base_a_folder_and_a_known_model_of_the_hub_need_no_connection(base):
    tiny, folder, llama = map(find_model, ("tiny", str(base), "meta-llama/Llama-3.1-8B-Instruct"))
    assert (tiny.spec, tiny.family, tiny.parameters) == (TinyModel(kind="tiny"), "llama", 828_288)
    # Per rank: 3 layers of q, k, v, o (128 + 128) and gate, up, down (128 + 320), and the unembedding (128 + 1024).
    assert tiny.lora_parameters(4) == 4 * (3 * (4 * 256 + 3 * 448) + 1152) == folder.lora_parameters(4)
    assert find_model("qwen-64").spec == TinyModel(kind="tiny", name="qwen-64")
    assert folder.spec == PathModel(kind="path", path=str(base), parameters=828_288, hidden_size=128)
    assert (folder.parameters, folder.max_length) == (828_288, 512)
    assert llama.spec == HubModel(kind="hub", id=llama.name, parameters=8_030_261_248, hidden_size=4096)
    assert llama.lora_parameters(1) == 2_753_792


MODELS = (
    ("config.json", b"\0", "config.json: invalid JSON: "),
    ("config.json", b'{"model_type": "gpt2"}', "has no hidden_size; a causal LM for text is needed"),
    ("config.json", None, "has no config.json"),
    ("model.safetensors", None, "has no weights in .safetensors files"),
    ("model.safetensors", b"\xff" * 8, "model.safetensors is not a safetensors file"),
)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('"hidden_size": "64"', "hidden_size: input should be "),
        ('"num_hidden_layers": 1000000000000000000', "num_hidden_layers: input should be less than"),
        ('"model_type": "\\ud800"', "invalid JSON"),
        (f'"text_config": {"[" * 5000 + "]" * 5000}', "invalid JSON: recursion limit exceeded"),
    ],
)
def test_nonsense_in_a_configuration_is_one_sentence(base, entry, words):
    path = base / "config.json"
    # The last of two entries of a name counts.
    path.write_text(path.read_text().rstrip().removesuffix("}") + f", {entry}}}")
    spec = PathModel(kind="path", path=str(base), parameters=828_288, hidden_size=128)
    for read, argument in ((find_model, str(base)), (dimensions, spec), (load_config, spec)):
        with pytest.raises(UserError, match=words) as caught:
            read(argument)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    assert facts(str(base)) is None, "lora-advice takes it for no model"


def test_what_is_no_model_or_no_data_is_one_sentence(base, tmp_path):
    for number, (name, content, message) in enumerate(MODELS):
        folder = shutil.copytree(base, tmp_path / str(number))
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            find_model(str(folder))
    with pytest.raises(UserError, match="is no folder, no hub id .owner/name. and none of tiny"):
        find_model("x" * 5000)
    with pytest.raises(UserError, match="data 'nothing' is no file and no hub id"):
        examine(find_model("tiny"), "nothing", None)


def test_examples_that_do_not_fit_the_model_are_counted(tmp_path):
    path = tmp_path / "own.jsonl"
    texts = [f"{number} {'word ' * (10 if number % 5 else 2000)}" for number in range(20)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data, _ = examine(find_model("tiny"), str(path), None)
    assert data.usable == 16
    assert data.tally.bad == {TOO_LONG: (4, 1)}
    assert data.source["max_chars"] == max(len(text) for text in texts if len(text) < 1000)
    path.write_text(json.dumps({"text": texts[0]}))
    with pytest.raises(UserError, match="no example fits the 512 tokens that the model takes"):
        examine(find_model("tiny"), str(path), None)


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    # The datasets library reads a folder of this name before it asks the hub.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    answer = {"role": "assistant", "content": "a"}
    chats = [{"messages": [{"role": "user", "content": f"q{n}"}, answer]} for n in range(25)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))
    data, _ = examine(find_model("tiny"), "owner/name", None)
    assert data.source.items() >= {"kind": "hub", "id": "owner/name"}.items()
    assert (data.usable, data.tally.bad) == (25, {})
    (folder / "train.jsonl").write_text('{"q": "1", "a": "2"}\n')
    with pytest.raises(UserError, match="has the columns q, a; messages or conversations is needed, or a file"):
        examine(find_model("tiny"), "owner/name", None)
