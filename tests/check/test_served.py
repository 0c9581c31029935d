"""A server of a tiny base with or without an adapter: what it serves is told by its log-probabilities."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from lorabench.check.probe import logits, probe
from lorabench.check.served import check_served
from lorabench.cli.commands import app
from lorabench.custom.model import find_model
from lorabench.errors import UserError
from lorabench.models.base import load_model, model_location
from lorabench.models.vllm_support import vllm_environment

Models = dict[str, torch.nn.Module]


class Handler(BaseHTTPRequestHandler):
    """Answers as OpenAI's completions do, by `server.models`; `server.style` says how."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        style = self.server.style
        if style == "slow":
            time.sleep(1.0)
        if asked["model"] not in self.server.models or style == "refuses":
            self._answer({"error": {"message": f"no model {asked['model']}"}}, 404)
            return
        ids = torch.tensor(asked["prompt"])
        logs = logits(self.server.models[asked["model"]], ids)[:-1].log_softmax(-1)
        own = logs.gather(1, ids[1:, None])[:, 0].tolist()
        choice: dict = {"text": "", "logprobs": None}
        if style == "echo" and asked.get("echo"):
            choice["logprobs"] = {"token_logprobs": [None, *own, -0.5]}
        elif style == "vllm" and "prompt_logprobs" in asked:
            by_token = [{str(token): {"logprob": value}} for token, value in zip(ids[1:].tolist(), own, strict=True)]
            choice["prompt_logprobs"] = [None, *by_token]
        self._answer({"choices": [choice]})

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Return a function that serves models by name and returns the server's address."""
    servers = []

    def start(models: Models, style: str = "echo") -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.models, server.style = models, style
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def probed(adapters, text):
    return probe(find_model("llama-64"), adapters("llama-64"), text)


@pytest.fixture(scope="module")
def models(adapters) -> Models:
    """The base, the base with the adapter (in bf16, as servers compute), the adapter at half of its scale, another."""

    def base(name: str = "llama-64") -> torch.nn.Module:
        return load_model(find_model(name).spec).eval()

    half = PeftModel.from_pretrained(base(), adapters("llama-64"))
    for module in half.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    tuned = PeftModel.from_pretrained(base(), adapters("llama-64")).merge_and_unload()
    for parameter in tuned.parameters():
        parameter.data = parameter.data.bfloat16()
    return {"base": base(), "tuned": tuned, "half": half, "other": base("qwen-64")}


@pytest.mark.parametrize("style", ["echo", "vllm"])
def test_each_model_of_a_server_is_told(probed, models, serve, style):
    result = check_served(probed, serve(models, style) + "/v1/", None)
    assert {row.name: row.serves for row in result.models} == {
        "base": "base",
        "tuned": "adapter",
        "half": "neither",
        "other": "neither",
    }
    strengths = {row.name: row.strength for row in result.models}
    assert strengths["base"] == pytest.approx(0, abs=1e-4)
    assert strengths["tuned"] == pytest.approx(1, abs=0.05)
    assert 0.3 < strengths["half"] < 0.7
    assert result.models[1].nll == pytest.approx(result.models[1].adapter_nll, abs=0.02)
    assert result.findings == ()


def test_a_server_of_the_base_alone_is_an_error(probed, models, serve):
    result = check_served(probed, serve({"base": models["base"]}), "base")
    assert [(finding.code, finding.level) for finding in result.findings] == [("served", "error")]
    assert "model 'base' serves the base: it has 0% of the adapter's effect" in result.findings[0].message


def test_an_adapter_without_effect_can_not_be_told(adapters, models, serve, text):
    weak = probe(find_model("llama-64"), adapters("llama-64", 1e-7), text)
    result = check_served(weak, serve(models), "base")
    assert result.models[0].serves == "unknown"
    assert [finding.level for finding in result.findings] == ["warning"]


@pytest.mark.parametrize(
    ("style", "words"),
    [
        ("refuses", r"answers with status 404 \(Not Found\): .*no model base"),
        ("silent", "returns 0 log-probabilities for a text of"),
        ("slow", "has not answered within 0.2 seconds"),
    ],
)
def test_what_goes_wrong_is_one_sentence(probed, models, serve, style, words):
    with pytest.raises(UserError, match=words):
        check_served(probed, serve({"base": models["base"]}, style), "base", seconds=0.2)


def test_a_server_that_is_not_there_is_named(probed):
    with pytest.raises(UserError, match=r"server http://127.0.0.1:9/v1/models can't be asked: .*refused"):
        check_served(probed, "http://127.0.0.1:9", None)
    with pytest.raises(UserError, match="must begin with http"):
        check_served(probed, "localhost:8000", None)


def test_the_command_names_what_is_served(adapters, models, serve, text):
    arguments = ["check", "--adapter", str(adapters("llama-64")), "--model", "llama-64", "--text", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--served", serve(models), "--served-model", "tuned"])
    assert result.exit_code == 0, result.output
    assert "model 'tuned' serves the adapter" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--served", serve(models), "--served-model", "half", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["models"][0]["serves"] == "neither"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/vllm.md says how")
def test_vllm_serves_the_adapter_by_its_name_and_the_base_by_its_own(text, tmp_path, adapters):
    # The size of its heads, 32, is one that vLLM computes on a CPU.
    adapter = adapters("llama-128")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"port": port, "host": "127.0.0.1", "model": model_location(find_model("llama-128").spec)}
    options |= {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 1, "kv-cache-memory-bytes": 1 << 26}
    options |= {"max-lora-rank": 8, "lora-modules": f"tuned={adapter}"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | vllm_environment(True, tmp_path)
    # A server has an engine of its own process.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        probed = probe(find_model("llama-128"), adapter, text)
        result, deadline = None, time.monotonic() + 900
        while result is None:
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
            try:
                result = check_served(probed, f"http://127.0.0.1:{port}", None)
            except UserError:
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(60)
    base, tuned = result.models
    assert (base.serves, tuned.name, tuned.serves) == ("base", "tuned", "adapter")
    assert tuned.strength == pytest.approx(1, abs=0.01)
