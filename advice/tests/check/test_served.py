"""A server of a tiny base with or without an adapter: what it serves is told by its log-probabilities."""

from __future__ import annotations

import contextlib
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
from lora_advice.check.probe import logits, probe
from lora_advice.check.served import check_served
from lora_advice.cli import app
from lora_advice.errors import UserError
from lora_advice.user_model import find_model
from peft import PeftModel
from typer.testing import CliRunner

from .conftest import SHIPPED, load

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
    return probe(find_model(str(SHIPPED / "llama-64")), adapters("llama-64"), text)


@pytest.fixture(scope="module")
def models(adapters) -> Models:
    """The base, the base with the adapter (in bf16, as servers compute), the adapter at half of its scale, another."""

    def base(name: str = "llama-64") -> torch.nn.Module:
        return load(name)

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
    weak = probe(find_model(str(SHIPPED / "llama-64")), adapters("llama-64", 1e-7), text)
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


MODELS = b'{"data": [{"id": "base"}]}'
COMPLETIONS = (
    *(b'{"choices": []}', b'{"choices": null}', b'{"choices": [1]}', b'{"choices": [{"logprobs": [1]}]}', b"{}"),
    *(
        b'{"choices": [{"logprobs": {"token_logprobs": [null, %s]}}]}' % bad
        for bad in (b"NaN", b"5", b"true", b"-1e308")
    ),
    b'{"choices": [{"prompt_logprobs": [null, 5]}]}',
)
ANSWERS = (
    *((b"HTTP/1.1 200 OK\r\n\r\n" + body, "the answer of .* is not a mapping") for body in (b"[]", b"null", b"1")),
    *((b"HTTP/1.1 200 OK\r\n\r\n" + body, "is not valid JSON") for body in (b"", b"{", b"[" * 9999, b"\xff")),
    (b'HTTP/1.1 200 OK\r\n\r\n{"data": [{}]}', "data: allowed: 1 to 100 models"),
    (b'HTTP/1.1 200 OK\r\n\r\n{"data": []}', "data: allowed: 1 to 100 models"),
    (b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "\\u001b[31m"}]}', "data: allowed: 1 to 100 models"),
    (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 5_000_000, "answers with more than 4 MB"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "is not valid JSON"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\na", "can't be asked: IncompleteRead"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n", "can't be asked: .*more than 100 headers"),
    (b"HTTP/1.1 abc\r\n\r\n", "can't be asked: BadStatusLine"),
    (b"", "can't be asked: RemoteDisconnected"),
    (b"HTTP/1.1 500 \x1b[31m\r\n\r\n\x1b[0m", r"answers with status 500 \(\[31m\): \[0m$"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n\r\n", r"answers with status 302 \(Found\)$"),
    (b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1:9/\r\n\r\n", r"answers with status 302 \(Found\)$"),
    (b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n", "can't be asked: ValueError"),
)


@pytest.fixture
def answer() -> Iterator[Callable[..., str]]:
    """Return a function that serves bytes, or one byte each so many seconds, and returns the server's address."""
    listeners = []

    def start(models: bytes, completions: bytes = b"", pause: float = 0.0) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        content = models if connection.recv(65536).startswith(b"GET") else completions
                        for start in range(0, len(content), 1 if pause else 10**9):
                            connection.sendall(content[start : start + (1 if pause else 10**9)])
                            time.sleep(pause)
                        # Closing with a request that is not read would reset the connection.
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(65536):
                            pass

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(("content", "words"), ANSWERS, ids=[repr(content[:60]) for content, _ in ANSWERS])
def test_an_answer_that_is_none_is_one_sentence(probed, answer, content, words):
    with pytest.raises(UserError, match=words) as caught:
        check_served(probed, answer(content), None, seconds=30)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", COMPLETIONS)
def test_log_probabilities_that_are_none_are_one_sentence(probed, answer, content):
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    with pytest.raises(UserError, match="choices.* a list of answers with log-probabilities, at most 0"):
        check_served(probed, answer(head + MODELS, head + content), None, seconds=30)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_a_server_that_sends_a_byte_at_a_time_is_left_in_time(probed, answer, head):
    started = time.monotonic()
    with pytest.raises(UserError, match="has not answered within 0.3 seconds"):
        check_served(probed, answer(head + b" " * 1000, pause=0.05), None, seconds=0.3)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://a b", "http://127.0.0.1:x", "http://a..b", "http://" + "a" * 300]
)
def test_an_address_that_is_none_is_one_sentence(probed, url):
    with pytest.raises(UserError, match="can't be asked: "):
        check_served(probed, url, None, seconds=30)


def test_a_server_that_is_not_there_is_named(probed):
    with pytest.raises(UserError, match=r"server http://127.0.0.1:9/v1/models can't be asked: .*refused"):
        check_served(probed, "http://127.0.0.1:9", None)
    with pytest.raises(UserError, match="must begin with http"):
        check_served(probed, "localhost:8000", None)


def test_the_command_names_what_is_served(adapters, models, serve, text):
    arguments = ["check", str(adapters("llama-64")), "--model", str(SHIPPED / "llama-64"), "--text", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--served", serve(models), "--served-model", "tuned"])
    assert result.exit_code == 0, result.output
    assert "model 'tuned' serves the adapter" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--served", serve(models), "--served-model", "half", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["models"][0]["serves"] == "neither"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed; docs/cluster.md says how")
def test_vllm_serves_the_adapter_by_its_name_and_the_base_by_its_own(text, tmp_path, adapters):
    # The size of its heads, 32, is one that vLLM computes on a CPU.
    adapter = adapters("llama-128")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"port": port, "host": "127.0.0.1", "model": str(SHIPPED / "llama-128")}
    options |= {"dtype": "float32", "max-model-len": 256, "max-num-seqs": 1, "kv-cache-memory-bytes": 1 << 26}
    options |= {"max-lora-rank": 8, "lora-modules": f"tuned={adapter}"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        probed = probe(find_model(str(SHIPPED / "llama-128")), adapter, text)
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
