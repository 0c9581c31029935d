"""The process in which vLLM draws responses: `python -m lorabench.training.rl.engine_worker DESCRIPTOR START`.

It answers the messages of `lorabench.training.rl.engine`, which are JSON in both directions, over the socket of that
descriptor. START is JSON: the trainer's process id, its temporary folder, and the arguments of vLLM's `LLM`.
Signals that ask a job to end are left to the trainer, which still needs responses until its step is finished.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any


class _Engine:
    """A running engine, whose methods are the messages that it answers."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.model_executor.models import registry

        # vLLM would look at the class of the model in one more process, which imports all of vLLM again.
        registry._run_in_subprocess = lambda look: look()
        self._llm = LLM(**options)
        self._adapter: Any = None

    def adapter(self, number: int, folder: str) -> None:
        """Replace the adapter by the one in a folder, which is read at once, under a new number."""
        from vllm.lora.request import LoRARequest

        engine = self._llm.llm_engine
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
        self._adapter = LoRARequest(f"adapter-{number}", number, folder)
        engine.add_lora(self._adapter)

    def weights(self, folder: str) -> None:
        """Replace all weights by those in a folder; keys and values of the old ones are discarded."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._llm.reset_prefix_cache()

    def sample(self, requests: list[tuple[list[int], int | None]], options: dict[str, Any]) -> list[Any]:
        """Draw responses to prompts, each with its seed (None: greedy), by options of vLLM's `SamplingParams`.

        A response is its tokens, their log-probabilities, and whether it was cut at its largest length.
        """
        from vllm import SamplingParams

        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        sampling = [SamplingParams(temperature=float(seed is not None), seed=seed, **options) for _, seed in requests]
        drawn = []
        for result in self._llm.generate(inputs, sampling, use_tqdm=False, lora_request=self._adapter):
            response = result.outputs[0]
            tokens = list(response.token_ids)
            logprobs = [chosen[token].logprob for chosen, token in zip(response.logprobs or [], tokens, strict=True)]
            drawn.append((tokens, logprobs, response.finish_reason == "length"))
        return drawn


def main() -> None:
    """Answer messages, the first one without being asked, until the trainer ends this process, or dies."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    connection, start = Connection(int(sys.argv[1])), json.loads(sys.argv[2])
    threading.Thread(target=end_with, args=(start["trainer"], start["folder"]), daemon=True).start()
    engine: _Engine | None = None
    while True:
        try:
            if engine is None:
                engine, result = _Engine(start["options"]), None
            else:
                message = json.loads(connection.recv_bytes())
                result = getattr(engine, message["do"])(**message["with"])
            answer = {"result": result}
        except Exception as error:
            traceback.print_exc()
            reason = str(error).strip().split("\n")[0]
            answer = {"error": f"{type(error).__name__}: {reason}"}
        connection.send_bytes(json.dumps(answer).encode())
        if engine is None:
            return


def end_with(trainer: int, folder: str) -> None:
    """End this process, whatever it computes, when the trainer has died; remove the folder of both."""
    while os.getppid() == trainer:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()
