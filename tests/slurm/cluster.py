"""A Slurm cluster of one node on this machine, and the workflow on it, from a clone with an adapted profile.

munged, slurmctld and slurmd have their own folder, and the node has two GPUs. The daemons, the scheduler, sbatch and
srun are Slurm's; only the devices behind the GPUs are /dev/null and /dev/zero.
"""

import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorabench.runs import Job

from ..workflow.checkout import adapt_profile, fresh_clone

T = TypeVar("T")

_CONF = """
ClusterName=lorabench
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that was put back into the queue waits until its credentials expire, so they expire soon.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
# Finished jobs are kept until the test ends.
MinJobAge=3600
KillWait=10
NodeName={node} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_GRES = "NodeName={node} Name=gpu File=/dev/null\nNodeName={node} Name=gpu File=/dev/zero\n"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")


def missing() -> str | None:
    """Return what this machine lacks for Slurm; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [program for program in _PROGRAMS if not shutil.which(program, path=_path())]
    return f"no {', '.join(absent)}: install Debian's slurm-wlm and munge" if absent else None


def until(condition: Callable[[], T], what: str, seconds: float) -> T:
    """Wait until a condition returns a true value, and return it; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@dataclass(frozen=True)
class Cluster:
    """A running Slurm cluster."""

    folder: Path
    node: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of processes that use this Slurm; `lorabench` is next to the interpreter of the tests."""
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{_path()}"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def __call__(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Return all jobs so far, as `scontrol show job` describes them, in the order of their submission."""
        lines = self("scontrol", "show", "job", "--oneliner").splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines if line.startswith("JobId=")]

    def node_state(self, state: str) -> None:
        """Set the state of the node: `down`, or back by `resume`."""
        self("scontrol", "update", f"nodename={self.node}", f"state={state}", "reason=test")

    def is_idle(self) -> bool:
        """Return whether the node waits for jobs."""
        command = ["sinfo", "--noheader", "--format=%t"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return "idle" in done.stdout


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """Start a Slurm whose files are all in `folder`; stop it and its jobs at the end."""
    cluster = Cluster(folder, platform.node().partition(".")[0])
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    names: dict[str, object] = {"folder": folder, "node": cluster.node}
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for name, server in zip(("controller_port", "node_port"), sockets, strict=True):
        names[name] = server.getsockname()[1]
        server.close()
    (folder / "slurm.conf").write_text(_CONF.format(**names))
    (folder / "gres.conf").write_text(_GRES.format(**names))
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    # Snakemake's plugin drops SLURM_CONF from the environment of srun: on a cluster it lies in /etc/slurm.
    srun = folder / "bin/srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun", path=_path())} "$@"\n')
    srun.chmod(0o755)

    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as out:
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=out, stderr=out))

    try:
        # munged refuses pytest's folders, which are closed to other users, unless it is forced.
        start("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        until((folder / "munge.socket").exists, "munged", 20)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", cluster.node)
        until(cluster.is_idle, f"an idle node; see the logs in {folder}", 60)
        yield cluster
        cluster("scancel", "--user=root")
        until(lambda: not cluster("squeue", "--noheader"), "the end of all jobs", 60)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Without cgroups, Slurm loses processes whose parent died with the node.
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # It may just have ended.
                if f"{folder}/".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def adapted_clone(folder: Path, preset: Path) -> Path:
    """Make a clone with a preset, whose profile looks at the state of jobs early."""
    fresh_clone(folder)
    shutil.copy(preset, folder)
    adapt_profile(folder, "status-checks: 40", "status-checks: 2")
    return folder


@contextmanager
def workflow(cluster: Cluster, checkout: Path, *arguments: str) -> Iterator[Callable[[], str]]:
    """Run the README's command in the background; yield a function that returns its output, empty until its end."""
    log = checkout / "snakemake.out"
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--profile", "slurm", *arguments]
    command += ["--config", "preset=cluster.yaml"]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=checkout, env=cluster.environment, stdout=out, stderr=out)

    def output() -> str:
        if process.poll() is None:
            return ""
        assert process.returncode == 0, log.read_text()
        return log.read_text()

    try:
        yield output
    finally:
        process.kill()
        process.wait()


def saved_step(checkpoint: Path) -> int:
    """Return the step in the header of a checkpoint, which may be replaced at any time."""
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


def job_tries(jobs: list[dict[str, str]], job: Job) -> list[dict[str, str]]:
    """Return the tries of a training job, in the order of their submission."""
    return [submitted for submitted in jobs if submitted["Comment"] == f"rule_train_wildcards_{job.job_id}"]


def rule_jobs(jobs: list[dict[str, str]], rule: str) -> list[dict[str, str]]:
    """Return the jobs of a rule."""
    return [job for job in jobs if re.match(rf"rule_{rule}(_wildcards|$)", job["Comment"])]
