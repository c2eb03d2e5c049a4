"""Two machines, simulated: two network namespaces with an address each and a cable between them.

The ranks have no other way to each other: each namespace has its own loopback, and ports of its own.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.errors import EXIT_INTERRUPTED
from rlhf.startup import free_port
from tests.conftest import ROOT
from tests.launch.conftest import SMALL, differences, flags_of
from tests.launch.test_cluster import PDSH, executable

ADDRESS = "10.77.0.{}"
CABLE = "cable0"


@pytest.fixture(scope="module")
def machines():
    """The names of the two namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    names = [f"rlhf-{os.getpid()}-{end}" for end in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    a, b = names
    commands.append(f"ip link add {CABLE} netns {a} type veth peer name {CABLE} netns {b}")
    for number, name in enumerate(names, 1):
        commands.append(f"ip -n {name} address add {ADDRESS.format(number)}/24 dev {CABLE}")
        commands += [f"ip -n {name} link set {link} up" for link in ("lo", CABLE)]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
        yield names
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit code {error.returncode}"
        pytest.skip(f"network namespaces are not allowed here: {command}: {reason}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", **more}


def start(machines: list[str], flags: list[str], logs: Path) -> list[subprocess.Popen]:
    """Start a rank on each machine, as launch/cluster/torchrun.sh does there."""
    processes = []
    for number, name in enumerate(machines):
        own = environment(
            PET_NNODES=str(len(machines)),
            PET_NODE_RANK=str(number),
            PET_NPROC_PER_NODE="1",
            PET_MASTER_ADDR=ADDRESS.format(1),
            # the name of this host is its loopback's, which the other machine does not reach
            GLOO_SOCKET_IFNAME=CABLE,
        )
        command = ["ip", "netns", "exec", name, str(ROOT / "launch/cluster/torchrun.sh")]
        command += [str(ROOT / "launch/sft.py"), *flags]
        with (logs / f"machine{number}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=own)
            )
    return processes


def start_over_ssh(machines: list[str], flags: list[str], folder: Path) -> subprocess.Popen:
    """The same by launch/cluster/hostfile.sh and DeepSpeed's launcher; pdsh enters the namespaces."""
    (folder / "bin").mkdir()
    executable(folder / "bin" / "pdsh", PDSH)
    executable(folder / "bin" / "ssh", "#!/bin/sh\n")
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in machines))
    lines = [f"GLOO_SOCKET_IFNAME={CABLE}\n", "DS_ACCELERATOR=cpu\n", "OMP_NUM_THREADS=1\n"]
    (folder / ".deepspeed_env").write_text("".join(lines))
    own = environment(
        ON_HOST="ip netns exec",
        LAUNCHER_FLAGS=f"--master_addr {ADDRESS.format(1)} --master_port 29500",
        ATTEMPTS="1",
    )
    own["PATH"] = f"{folder / 'bin'}:{own['PATH']}"
    command = [str(ROOT / "launch/cluster/hostfile.sh"), str(folder / "hosts")]
    command += [str(ROOT / "launch/sft.py"), *flags]
    with (folder / "ssh.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=own, cwd=folder)


def end_codes(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.terminate()


def two_ranks_here(flags: list[str], logs: Path) -> None:
    """The same two ranks on one machine."""
    own = environment(PET_NPROC_PER_NODE="2", PET_MASTER_PORT=str(free_port()))
    command = [str(ROOT / "launch/cluster/torchrun.sh"), str(ROOT / "launch/sft.py"), *flags]
    with (logs / "one.log").open("w") as log:
        subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=own, check=True, timeout=900
        )


@pytest.mark.slow
def test_two_machines_stop_together_and_end_as_one_machine_does(
    machines, base_path, files, tmp_path
):
    """SIGTERM on one machine: both save and ask to be started again; another launcher goes on."""
    short = ["--max_steps", "8", *SMALL[:2], *SMALL[4:], "--eval_steps", "1"]

    def flags(output: Path) -> list[str]:
        return [*flags_of("sft", base_path, files["instructions"], output), *short]

    processes = start(machines, flags(tmp_path / "run"), tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.time() + 900
    while not metrics.is_file() or metrics.read_text().count("\n") < 2:
        logs = [log.read_text()[-2000:] for log in sorted(tmp_path.glob("*.log"))]
        assert time.time() < end and all(p.poll() is None for p in processes), "\n".join(logs)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert end_codes(processes) == [EXIT_INTERRUPTED, EXIT_INTERRUPTED]
    assert "stopped by SIGTERM after step" in (tmp_path / "machine0.log").read_text()
    assert not (tmp_path / "run" / "result.json").exists()

    again = start_over_ssh(machines, flags(tmp_path / "run"), tmp_path)
    assert end_codes([again]) == [0], (tmp_path / "ssh.log").read_text()[-3000:]
    assert "resuming from" in (tmp_path / "ssh.log").read_text()
    two_ranks_here(flags(tmp_path / "one"), tmp_path)
    assert differences(tmp_path / "one", tmp_path / "run") == []
