"""A fork server: a process that has imported what the steps of a workflow need, and forks a process for each step.

Most steps of a small preset take less time than these imports. The workflow starts a server on a machine without GPUs.
The command `lorabench` of a rule hands over its arguments, folder, environment and open files to it, passes signals on
to the forked process, and exits with the status of that. Without a server, or where the environment differs from that
of the server, the command runs by itself, and does the same.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from lorabench.utils.signals import HANDLED

ADDRESS = "LORABENCH_FORKS"
"""The environment variable with the path of the server's socket."""

# Snakemake gives each rule its number of threads in these variables, which libraries read when they are imported.
_THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "GOTO", "OPENBLAS", "MKL", "NUMEXPR")]
_THREADS.append("VECLIB_MAXIMUM_THREADS")
# Variables in which the environments of a command and the server may differ: a shell sets some or drops them, no
# library keeps the folder of temporary files, the order of sets must not matter where hashes of text are random, and an
# evaluation sets those of progress bars itself.
_MAY_DIFFER = {
    *(ADDRESS, "_", "SHLVL", "PWD", "OLDPWD", "PS1", "PS2"),
    *("TMPDIR", "TEMPDIR", "TEMP", "TMP", "PYTHONHASHSEED", "TQDM_DISABLE", "TQDM_MININTERVAL"),
}


_LLAMA, _ANALYSIS = "transformers.models.llama.modeling_llama", ("pyarrow.dataset", "scipy.stats")
_LM_EVAL = ("lm_eval.evaluator", "lm_eval.models.huggingface", "langdetect")
PRELOADED = {
    "plan": ("lorabench.store.io",),
    "dataset": ("lorabench.data.files", "lorabench.data.problems", "lorabench.data.sft", "reasoning_gym"),
    "pretraining": ("lorabench.evaluation.pretraining", "reasoning_gym"),
    "tokens": ("lorabench.data.tokens", "transformers.models.auto.tokenization_auto"),
    "train": ("lorabench.training.job", "lorabench.training.sft", "lorabench.training.rl.trainer", _LLAMA),
    "compute": ("lorabench.training.step_cost", _LLAMA),
    "evaluate": ("lorabench.evaluation.runner", *_LM_EVAL, _LLAMA),
    "counts": ("lorabench.models.counts",),
    "collect": ("lorabench.store.collect",),
    "collect-evals": ("lorabench.store.collect",),
    "claims": ("lorabench.claims.judge", "lorabench.claims.learning_rate", *_ANALYSIS),
    "figure": (
        *("lorabench.figures.catalog", "lorabench.figures.by_lr", "lorabench.figures.curves", "lorabench.figures.rl"),
        *("matplotlib.backends.backend_svg", "matplotlib.style", *_ANALYSIS),
    ),
    "verdicts-by-margin": ("lorabench.report.other_margins", *_ANALYSIS),
    "report": ("lorabench.report.page", *_ANALYSIS),
}
"""What the server imports before it forks the first step of a name. These modules compute nothing when imported."""


def _identity() -> list[Any]:
    """Return what a command must have in common with the server: the code and the environment."""
    return [sys.prefix, __file__, {name: os.environ[name] for name in os.environ if name not in _MAY_DIFFER}]


def run_in_fork() -> int | None:
    """Run this process's command in a fork of the server that the environment names, and return its exit status.

    None is returned, and nothing is done, where there is no server or it does not suit the command. The caller has
    blocked the signals HANDLED, which wait until the process is known that they are passed on to.
    """
    if ADDRESS not in os.environ:
        return None
    request = {"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ), "identity": _identity()}
    message = json.dumps(request).encode() + b"\n"
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as replies:
        try:
            connection.connect(os.environ[ADDRESS])
            if rest := message[socket.send_fds(connection, [message], [0, 1, 2]) :]:
                connection.sendall(rest)
            process = int(replies.readline() or 0)
        except OSError:
            process = 0
        if not process:
            return None

        def pass_on(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

        # A shell starts background jobs with SIGINT ignored, which must stay so.
        for number in HANDLED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        status = replies.readline()
        # A repeated signal must not change the exit status.
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)
        if status:
            return int(status)
    pass_on(signal.SIGTERM, None)
    print("lorabench: the process that waited for this step was killed, and the step is stopped", file=sys.stderr)
    return 1


def start() -> None:
    """Start a server for the commands of rules with one thread, which ends with this process, and name it to them.

    It is started on Linux only, since other systems' libraries do not work in forked processes.
    """
    if sys.platform != "linux":
        return
    folder = tempfile.mkdtemp(prefix="lorabench-")
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(f"{folder}/socket")
        except OSError:  # The path may be too long.
            os.rmdir(folder)
            return
        listener.listen()
        environment = {"TQDM_DISABLE": "1", "TQDM_MININTERVAL": "60"} | os.environ | dict.fromkeys(_THREADS, "1")
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
        code = f"from lorabench.cli.forks import serve; serve({listener.fileno()})"
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, env=environment, pass_fds=[listener.fileno()]
        )
        os.environ[ADDRESS] = listener.getsockname()
    # This closes the server's standard input and waits for it.
    atexit.register(server.communicate)


def serve(listener: int) -> None:
    """Fork a process for each command that arrives at the socket with a file number.

    The server ends when the standard input and the last command have ended. In the forked processes this function runs
    the command; the signals HANDLED are blocked there until it handles them.
    """
    status: object = None

    def end_at_once() -> None:
        """End a forked process without clearing away all modules, which would take a second."""
        if isinstance(status, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    # The first function to be registered is the last to be called.
    atexit.register(end_at_once)
    request, files = _next_request(socket.socket(fileno=listener))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())
    os.chdir(request["cwd"])
    # Variables that modules have set when they were imported stay. Processes that the command starts are no forks.
    os.environ.update(request["environment"] | {"PYTHONHASHSEED": "0"})
    del os.environ[ADDRESS]
    tempfile.tempdir = None
    sys.argv = request["argv"]
    from lorabench.cli.commands import app

    try:
        app()
    except SystemExit as end:
        status = end.code
        raise


def _next_request(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Wait for commands and fork a process for each; returns the command and its open files in these processes only."""
    identity = _identity()
    # Collecting garbage would write into the objects of all modules, and so copy their memory in each process.
    gc.disable()
    for module in ("lorabench.cli.commands", "lorabench.planning.plan", "lorabench.store.layout"):
        importlib.import_module(module)
    # A signal to the whole process group must not end this process before those that it has forked.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    # The standard input ends with the process that started this server.
    while sys.stdin not in select.select([sys.stdin, listener], [], [])[0]:
        with listener.accept()[0] as connection:
            message, files, *_ = socket.recv_fds(connection, 1 << 16, 3)
            while not message.endswith(b"\n") and (part := connection.recv(1 << 16)):
                message += part
            request = json.loads(message) if message.endswith(b"\n") else {}
            if request.get("identity") == identity:
                name = next((word for word in request["argv"][1:] if word != "step"), "")
                for module in PRELOADED.get(name, ()):
                    # Where a module can't be imported, the command says so itself.
                    with contextlib.suppress(Exception):
                        importlib.import_module(module)
                gc.freeze()
                # Where there is no memory for a copy, the command runs by itself.
                with contextlib.suppress(OSError):
                    if os.fork() == 0:
                        gc.enable()
                        listener.close()
                        # A second process runs the command, and the first one reports its end.
                        if (command := os.fork()) == 0:
                            return request, files
                        for file in files:
                            os.close(file)
                        _report_end(command, connection)
            for file in files:
                os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
    listener.close()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def _report_end(command: int, connection: socket.socket) -> NoReturn:
    """Report the process of a command and then its status to the one that gave it; end it if that one is killed."""

    def reply(number: int) -> None:
        # The process at the other end may have been killed.
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % number)

    reply(command)

    def end_with_giver() -> None:
        # The process at the other end may have been killed, and the command have ended.
        with contextlib.suppress(OSError):
            connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(command, signal.SIGTERM)

    threading.Thread(target=end_with_giver, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    # Shells report a signal that ended a process in this way.
    reply(code if code >= 0 else 128 - code)
    os._exit(0)
