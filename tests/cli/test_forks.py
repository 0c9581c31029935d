"""The fork server: a forked command does what it would do by itself, and nothing stays behind."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from lorabench.cli import forks

# The forked processes run Python code in place of the command line.
SERVER = """
import sys
from lorabench.cli import commands, forks
commands.app = lambda: exec(sys.argv[1], {})
forks.serve(int(sys.argv[1]))
"""
ALONE = "No such command 'mistake'"
CLIENT = [sys.executable, "-c", "from lorabench.cli import app; app()"]


class Server:
    def __init__(self, folder):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            number = listener.fileno()
            command = [sys.executable, "-c", SERVER, str(number)]
            self.environment = {name: os.environ[name] for name in os.environ if name != "PYTEST_CURRENT_TEST"}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=self.environment, pass_fds=[number])
        self.address = str(folder / "socket")

    def start(self, code, **options):
        environment = self.environment | {forks.ADDRESS: self.address} | options.pop("env", {})
        pipe = subprocess.PIPE
        # Tests that run in the background of a shell have SIGINT ignored, which a command would take over.
        options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            [*CLIENT, code], env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe, **options
        )

    def run(self, code, given="", **options):
        with self.start(code, **options) as client:
            return (*client.communicate(given, timeout=20), client.returncode)

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.end()


@pytest.fixture
def other(tmp_path):
    server = Server(tmp_path)
    yield server
    server.end()


WAIT = """
import signal, sys
ends = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, ends)
print("at work", flush=True)
number = signal.sigwait(ends)
print("stopped by", number)
sys.exit(128 + number)
"""


def test_a_forked_command_has_all_that_it_was_given(server, tmp_path):
    code = """
import os, sys, tempfile
print(os.getcwd(), tempfile.gettempdir(), sys.stdin.read(), os.environ.get("LORABENCH_FORKS"))
print("an error", file=sys.stderr)
sys.exit(3)
"""
    for given in ("one", "two"):
        output, errors, status = server.run(code, given, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
        assert output == f"{tmp_path} {tmp_path} {given} None\n"
        assert (errors, status) == ("an error\n", 3)
    # Long arguments arrive, and a signal that kills the command is reported as by a shell.
    assert server.run(f"print(len('{'x' * 100_000}'))") == ("100000\n", "", 0)
    assert server.run("import os; os.kill(os.getpid(), 9)") == ("", "", 137)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_a_forked_command(server, number):
    with server.start(WAIT) as client:
        client.stdout.readline()
        client.send_signal(number)
        output = client.communicate(timeout=20)[0]
    # A forked command ends with a killed one that gave it; it has the other end of the pipe.
    ends = (15, -9) if number == signal.SIGKILL else (number, 128 + number)
    assert (output, client.returncode) == (f"stopped by {ends[0]}\n", ends[1])
    # A signal to the whole group of processes does not end the server.
    if number != signal.SIGKILL:
        server.process.send_signal(number)
    assert server.run("print('on')")[0] == "on\n"


def test_a_server_ends_after_its_starter_and_its_last_command(other):
    with other.start("import sys; print('on', flush=True); print(sys.stdin.read())") as client:
        assert client.stdout.readline() == "on\n"
        other.process.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            other.process.wait(0.2)
        assert client.communicate("done", timeout=20)[0] == "done\n"
    assert (client.returncode, other.process.wait(20)) == (0, 0)
    assert not os.path.exists(other.address)


def test_a_killed_server_leaves_its_commands_alone(other):
    with other.start(WAIT) as client:
        client.stdout.readline()
        other.process.kill()
        other.process.wait()
        client.send_signal(signal.SIGTERM)
        output = client.communicate(timeout=20)[0]
    assert (output, client.returncode) == ("stopped by 15\n", 143)
    # The next command runs by itself.
    assert ALONE in other.run("mistake")[1]


def test_a_command_that_arrives_as_the_starter_dies_is_turned_away(other):
    other.run("pass")
    other.process.send_signal(signal.SIGSTOP)
    other.process.stdin.close()
    with socket.socket(socket.AF_UNIX) as command:
        command.connect(other.address)
        other.process.send_signal(signal.SIGCONT)
        with pytest.raises(ConnectionResetError):
            command.recv(1)
    assert other.process.wait(20) == 0


def test_a_signal_while_a_command_starts_ends_it_in_a_sentence():
    start = """
import os, signal, sys
from lorabench import cli

# A shell starts background jobs with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run_in_fork = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["lorabench", "plan", "--preset", "smoke"]
cli.app()
"""
    result = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr.startswith("lorabench: stopped by SIGINT; ")
    assert result.stderr.count("\n") == 1


def test_a_command_in_another_environment_runs_by_itself(server):
    assert ALONE in server.run("mistake", env={"HF_HUB_OFFLINE": "0"})[1]
    assert server.run("print('on')", env={"SHLVL": "7"})[0] == "on\n"
