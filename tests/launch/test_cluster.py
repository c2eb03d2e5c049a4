"""The examples under launch/cluster/: what each would start, and how each ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rlhf.errors import EXIT_GUARD, EXIT_INTERRUPTED, EXIT_USER_ERROR
from rlhf.startup import free_port
from tests.conftest import ROOT

CLUSTER = ROOT / "launch" / "cluster"
SCRIPTS = sorted([*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")])
FINAL = [EXIT_USER_ERROR, EXIT_GUARD]
# seconds for launchers and their ranks, which import torch, on a machine that is busy
PATIENCE = 300

# Stands for a program: ends at SIGTERM as a run does. Rank $BAD ends at once with $CODE, the others 2 s after it with 1
PROGRAM = """
import os, signal, sys, time
stopped = []
def say(*words):  # in one write: print makes several where Python does not buffer, and ranks would mix
    os.write(1, (" ".join(words) + "\\n").encode())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopped.append(1))
say("up", os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], *sys.argv[1:])
bad, gone = os.environ.get("BAD"), os.path.realpath(__file__) + os.environ["MASTER_PORT"]
if bad == os.environ["RANK"]:
    open(gone, "w").close()
    sys.exit(int(os.environ["CODE"]))
end = time.time() + 300
while time.time() < end and not stopped and not os.path.exists(gone):
    time.sleep(0.05)
if bad:
    time.sleep(2)
    os.remove(gone)
    sys.exit(1)
time.sleep(1)
say("saved", os.environ["RANK"])
sys.exit(75)
"""
# Stands for a launcher or scheduler: writes down its arguments and variables, ends with $CODE
STUB = """#!/usr/bin/env bash
{ printf '%s\\n' "$(basename "$0")" "$@"; env | grep -E '^(PET_|SHUTDOWN|RETRY)' | sort; echo; } >> "$CALLS"
exit "${CODE:-0}"
"""
# Runs the rest of its arguments on "each machine", which gets no variables but those given: here, or as $ON_HOST says
PDSH = """#!/usr/bin/env bash
while [ "${1:0:1}" = - ]; do
  case $1 in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
number=0
for host in ${hosts//,/ }; do
  command="$*"
  ${ON_HOST:+$ON_HOST $host} env -i HOME="$HOME" PATH="$PATH" bash -c "${command//%n/$number}" &
  pids+=($!)
  number=$((number + 1))
done
worst=0
for pid in "${pids[@]}"; do
  wait "$pid"; code=$?
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder first in PATH, and the calls of the commands made in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def calls(tmp_path: Path) -> list[list[str]]:
    return [block.splitlines() for block in (tmp_path / "calls").read_text().strip().split("\n\n")]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# --- Kubernetes: the fields that the APIs have, as far as the examples use them. `!` marks required ones.

RULES = [
    {
        "action!": str,
        "onExitCodes": {"containerName": str, "operator!": str, "values!": [int]},
        "onPodConditions": [{"type!": str, "status": str}],
    }
]
CONTAINER = {
    "name!": str,
    "image!": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "envFrom": [{"secretRef": {"name!": str, "optional": bool}}],
    "env": [{"name!": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
    "resources": {"limits": dict},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
POD = {
    "spec!": {
        "restartPolicy": str,
        "subdomain": str,
        "terminationGracePeriodSeconds": int,
        "securityContext": {"fsGroup": int},
        "containers!": [CONTAINER],
        "volumes": [
            {
                "name!": str,
                "persistentVolumeClaim": {"claimName!": str},
                "emptyDir": {"medium": str, "sizeLimit": str},
            }
        ],
    }
}
JOB = {
    "completionMode": str,
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podReplacementPolicy": str,
    "podFailurePolicy": {"rules!": RULES},
    "template!": POD,
}
METADATA = {"name!": str, "labels": dict}
REPLICAS = {"replicas": int, "restartPolicy": str, "template!": POD}
KINDS = {
    ("v1", "Service"): {
        "clusterIP": str,
        "publishNotReadyAddresses": bool,
        "selector": dict,
    },
    ("batch/v1", "Job"): JOB,
    ("kubeflow.org/v1", "PyTorchJob"): {
        "nprocPerNode": str,
        "pytorchReplicaSpecs!": {"Master": REPLICAS, "Worker": REPLICAS},
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): {
        "mlPolicy": {"numNodes": int, "torch": dict},
        "template!": {
            "spec!": {
                "failurePolicy": {
                    "maxRestarts": int,
                    "rules": [{"name": str, "action!": str, "onJobFailureReasons": [str]}],
                },
                "replicatedJobs!": [
                    {"name!": str, "template!": {"metadata": {"labels": dict}, "spec!": JOB}}
                ],
            }
        },
    },
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): {
        "runtimeRef!": {"name!": str, "apiGroup": str, "kind": str},
        "trainer": {
            "image": str,
            "command": [str],
            "args": [str],
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"limits": dict},
        },
    },
}


def problems(value, schema, where: str) -> list[str]:
    """Where a value differs from a schema: a type, a list of one schema, or a dict of them by name."""
    if isinstance(schema, type):
        return [] if isinstance(value, schema) else [f"{where}: {value!r} is no {schema.__name__}"]
    if not isinstance(value, type(schema)):
        return [f"{where}: {value!r}, expected a {type(schema).__name__}"]
    if isinstance(schema, list):
        parts = [problems(item, schema[0], f"{where}[{i}]") for i, item in enumerate(value)]
        return [found for part in parts for found in part]
    known = {name.removesuffix("!"): below for name, below in schema.items()}
    missing = [n[:-1] for n in schema if n.endswith("!") and n[:-1] not in value]
    found = [f"{where}: '{name}' is missing" for name in missing]
    for name, below in value.items():
        if name not in known:
            found.append(f"{where}: '{name}' is no field of it")
        else:
            found += problems(below, known[name], f"{where}.{name}")
    return found


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml", "trainjob.yaml"])
def test_manifests_have_the_fields_of_their_apis(name):
    for document in documents(name):
        kind = (document["apiVersion"], document["kind"])
        schema = {"apiVersion!": str, "kind!": str, "metadata!": METADATA, "spec!": KINDS[kind]}
        assert problems(document, schema, f"{name}: {kind[1]}") == []


def test_the_schema_finds_what_is_wrong():
    job = documents("job.yaml")[1]["spec"]
    job["backoffLimit"] = "40"
    job["template"]["spec"]["containers"][0].pop("image")
    job["podFailurPolicy"] = job.pop("podFailurePolicy")
    assert [text.split(": ", 1)[1] for text in problems(job, JOB, "spec")] == [
        "'40' is no int",
        "'image' is missing",
        "'podFailurPolicy' is no field of it",
    ]


def containers() -> dict[str, tuple[dict, dict]]:
    """The container of each manifest, with what the TrainJob adds, and the pod that it is in."""
    job = documents("job.yaml")[1]["spec"]["template"]["spec"]
    torch = documents("pytorchjob.yaml")[0]["spec"]["pytorchReplicaSpecs"]
    runtime, train = documents("trainjob.yaml")
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    trainer = train["spec"]["trainer"]
    merged = node["spec"]["containers"][0] | {key: trainer[key] for key in ("command", "args")}
    merged["resources"] = trainer["resourcesPerNode"]
    worker = torch["Worker"]["template"]["spec"]
    return {
        "job.yaml": (job["containers"][0], job),
        "pytorchjob.yaml": (worker["containers"][0], worker),
        "trainjob.yaml": (merged, node["spec"]),
    }


@pytest.mark.parametrize("name", ["job.yaml", "pytorchjob.yaml", "trainjob.yaml"])
def test_pods_would_start_the_program(name, stubs, tmp_path):
    """The container's command, run here with torchrun as a stub."""
    executable(stubs / "torchrun", STUB)
    container, pod = containers()[name]
    in_image = [container["command"][0], *container["args"]]
    command = [
        str(ROOT / word.removeprefix("/rlhf/")) if word.startswith("/rlhf/") else word
        for word in in_image
    ]
    for word in command:
        assert not word.startswith(str(ROOT)) or Path(word).is_file(), word
    given = {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}
    done = subprocess.run(command, env={**os.environ, **given}, cwd=tmp_path)
    assert done.returncode == 0

    (call,) = calls(tmp_path)
    assert call[:3] == ["torchrun", "--shutdown-timeout", given["SHUTDOWN_SECONDS"]]
    program = call.index(str(ROOT / "launch/ppo.py"))
    assert call[program + 1 : program + 3] == ["--config", str(ROOT / "configs/ppo.yaml")]
    # the ranks are to end before the pod is killed
    assert int(given["SHUTDOWN_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    # the image's user can write to the volume, which belongs to root at first
    uid = re.search(r"--uid (\d+)", (CLUSTER / "Dockerfile").read_text())
    assert pod["securityContext"] == {"fsGroup": int(uid[1])}
    # as many ranks as the pod has GPUs, and a place in shared memory
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert "/dev/shm" in mounts.values()
    output = call[call.index("--output_dir") + 1]
    # and what comes from the Hub is there for the next start
    for path in (output, given["HF_HOME"]):
        assert path.startswith(f"{mounts['data']}/")
    # the command at the head of the file makes the Secret that the pod reads, which may be left out
    (secret,) = container["envFrom"]
    made = f"kubectl create secret generic {secret['secretRef']['name']} --from-literal=HF_TOKEN="
    assert made in (CLUSTER / name).read_text()
    assert secret["secretRef"]["optional"] is True


def test_the_first_machine_may_have_the_name_that_programs_know(stubs, tmp_path):
    executable(stubs / "torchrun", STUB)
    for own in ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, {"MASTER_ADDR": "a"}, {}):
        subprocess.run([CLUSTER / "torchrun.sh", "x.py"], env={**os.environ, **own}, check=True)
    subprocess.run(
        [CLUSTER / "torchrun.sh", "x.py"],
        env={**os.environ, "MASTER_ADDR": "a", "PET_MASTER_ADDR": "b", "PET_MASTER_PORT": "2"},
        check=True,
    )
    assert [call[call.index("x.py") + 1 :] for call in calls(tmp_path)] == [
        ["PET_MASTER_ADDR=a", "PET_MASTER_PORT=1"],
        ["PET_MASTER_ADDR=a", "PET_MASTER_PORT=29500"],
        [],
        ["PET_MASTER_ADDR=b", "PET_MASTER_PORT=2"],
    ]


def test_the_job_knows_its_machines():
    service, job = documents("job.yaml")
    spec = job["spec"]
    env = {e["name"]: e.get("value") for e in spec["template"]["spec"]["containers"][0]["env"]}
    assert env["PET_NNODES"] == str(spec["completions"]) == str(spec["parallelism"])
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert env["PET_MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}


def test_clusters_know_the_exit_codes():
    """What cannot work is final; what saved is started again."""
    job = documents("job.yaml")[1]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert rules[0]["onExitCodes"]["values"] == FINAL
    assert rules[1]["onExitCodes"]["values"] == [EXIT_INTERRUPTED]
    assert rules[2]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # a Job takes a policy of failures with this alone
    assert job["template"]["spec"]["restartPolicy"] == "Never"

    runtime, train = documents("trainjob.yaml")
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    policy = runtime["spec"]["template"]["spec"]["failurePolicy"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (rule,) = node["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == FINAL
    # by the reason of the Job's failure the JobSet tells it from a crash
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "FailJobSet" and policy["maxRestarts"] > 0

    torch = documents("pytorchjob.yaml")[0]["spec"]["pytorchReplicaSpecs"]
    for replica in torch.values():
        (container,) = replica["template"]["spec"]["containers"]
        env = {e["name"]: e["value"] for e in container["env"]}
        # below 128 the operator takes a code for final
        assert replica["restartPolicy"] == "ExitCode" and int(env["RETRY_CODE"]) >= 128


# --- SLURM

SLURM = {
    "SLURM_JOB_NUM_NODES": "8",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_NODELIST": "n[1-8]",
    "SLURM_JOB_ID": "123456",
}
SRUN = '#!/usr/bin/env bash\nSLURM_NODEID=3 "$@"\n'
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'n%s\\n' 1 2 3; else printf '%s\\n' "$(basename "$0")" "$@" '' >> "$CALLS"; fi
"""


def slurm(stubs, **more: str) -> subprocess.CompletedProcess:
    executable(stubs / "srun", SRUN)
    executable(stubs / "scontrol", SCONTROL)
    executable(stubs / "torchrun", STUB)
    command = [CLUSTER / "slurm.sbatch", "launch/ppo.py", "--config", "configs/ppo.yaml"]
    return subprocess.run(command, env={**os.environ, **SLURM, **more}, cwd=ROOT, timeout=60)


def test_slurm_would_start_torchrun_on_each_node(stubs, tmp_path):
    assert slurm(stubs).returncode == 0
    (call,) = calls(tmp_path)
    assert call[0] == "torchrun" and call[call.index("rank") + 1 :] == [
        *("launch/ppo.py", "--config", "configs/ppo.yaml"),
        *("PET_MASTER_ADDR=n1", "PET_MASTER_PORT=23456", "PET_NNODES=8"),
        *("PET_NODE_RANK=3", "PET_NPROC_PER_NODE=8", "SHUTDOWN_SECONDS=840"),
    ]
    head = (CLUSTER / "slurm.sbatch").read_text()
    # the ranks have to be done before the time limit
    (seconds,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", head, re.M)
    assert int(seconds) > 840 and "#SBATCH --requeue" in head


@pytest.mark.parametrize(
    "code,restarts,requeued",
    [(75, 0, True), (1, 0, True), (2, 0, False), (3, 0, False), (75, 50, False)],
)
def test_slurm_queues_again_what_can_go_on(code, restarts, requeued, stubs, tmp_path):
    done = slurm(stubs, CODE=str(code), SLURM_RESTART_COUNT=str(restarts))
    made = [call[:3] for call in calls(tmp_path) if call[0] == "scontrol"]
    assert made == ([["scontrol", "requeue", "123456"]] if requeued else [])
    assert done.returncode == (0 if requeued else code)


# --- calls that cannot work


@pytest.mark.parametrize(
    "words,said",
    [
        (["hostfile.sh"], "found no hosts in ''"),
        (["hostfile.sh", "hosts"], "no file ''"),
        # DeepSpeed would warn and train on this machine alone
        (["hostfile.sh", "hostz", "program.py"], "found no hosts in 'hostz'"),
        (["hostfile.sh", "none", "program.py"], "found no hosts in 'none'"),
        # the hostfile was forgotten
        (["hostfile.sh", "program.py", "--config", "x.yaml"], "no file '--config'"),
        # its ranks would read a program from an empty standard input
        (["torchrun.sh"], "no program given"),
    ],
)
def test_scripts_refuse_to_start_less_than_was_meant(words, said, stubs, tmp_path):
    for launcher in ("deepspeed", "torchrun"):
        executable(stubs / launcher, STUB)
    (tmp_path / "hosts").write_text("10.0.0.1 slots=8\n")
    (tmp_path / "none").write_text("# nobody\n")
    (tmp_path / "program.py").write_text("pass\n")
    command = [CLUSTER / words[0], *words[1:]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR and said in done.stderr
    assert not (tmp_path / "calls").exists()


# --- torchrun and DeepSpeed themselves


def wait_for(text: str, log: Path, count: int) -> None:
    end = time.time() + PATIENCE
    while log.read_text().count(text) < count:
        assert time.time() < end, log.read_text()
        time.sleep(0.1)


def start(command, log: Path, **more: str) -> subprocess.Popen:
    own = {"PET_MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", **more}
    environment = os.environ | own
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        )


@pytest.mark.parametrize("retry,told,ends_with", [(None, "all", 75), ("143", "first", 143)])
def test_torchrun_saves_on_sigterm_and_asks_to_be_started_again(
    retry, told, ends_with, stubs, tmp_path
):
    """Kubernetes tells the first process of a container, SLURM all of them."""
    program = executable(tmp_path / "program.py", PROGRAM)
    log = tmp_path / "log"
    more = {"RETRY_CODE": retry} if retry else {}
    command = [CLUSTER / "torchrun.sh", program, "--kl_coef", "0.1"]
    process = start(command, log, PET_NPROC_PER_NODE="2", **more)
    wait_for("up", log, 2)
    started = psutil.Process(process.pid)
    for each in [started, *(started.children(recursive=True) if told == "all" else [])]:
        each.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == ends_with
    said = log.read_text()
    assert "up 1 2 1 --kl_coef 0.1" in said and said.count("saved") == 2


def test_torchrun_ends_with_the_code_of_the_rank_that_failed(stubs, tmp_path):
    """torchrun by itself would say 1."""
    program = executable(tmp_path / "program.py", PROGRAM)
    log = tmp_path / "log"
    more = {"PET_NPROC_PER_NODE": "2", "BAD": "1", "CODE": "2"}
    process = start([CLUSTER / "torchrun.sh", program], log, **more)
    assert process.wait(timeout=PATIENCE) == 2, log.read_text()


def hostfile_run(tmp_path: Path, stubs: Path, **more: str) -> tuple[subprocess.Popen, Path]:
    """Start hostfile.sh with DeepSpeed's real launcher on "two machines", which are both this one."""
    executable(stubs / "pdsh", PDSH)
    # asked once whether the first machine answers
    executable(stubs / "ssh", "#!/bin/sh\n")
    program = executable(tmp_path / "program.py", PROGRAM)
    (tmp_path / "hosts").write_text("# two\n127.0.0.1 slots=1\nlocalhost slots=1\n")
    log = tmp_path / "log"
    flags = f"--master_addr 127.0.0.1 --master_port {free_port()} --force_multi"
    # what the ranks are to have in their environment
    variables = {"DS_ACCELERATOR": "cpu", **more}
    lines = [f"{name}={value}\n" for name, value in variables.items()]
    (tmp_path / ".deepspeed_env").write_text("".join(lines))
    more = {"LAUNCHER_FLAGS": flags, "PAUSE_SECONDS": "0", **more}
    command = [CLUSTER / "hostfile.sh", tmp_path / "hosts", str(program), "--seed", "1"]
    return start(command, log, **more), log


@pytest.mark.slow
def test_torchrun_alone_saves_and_ends_with_1(stubs, tmp_path):
    """As docs/operations.md says."""
    program = executable(tmp_path / "program.py", PROGRAM)
    log = tmp_path / "log"
    process = start(["torchrun", program], log, PET_NPROC_PER_NODE="2")
    wait_for("up", log, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 1
    assert log.read_text().count("saved") == 2


@pytest.mark.slow
def test_deepspeed_alone_leaves_its_ranks(stubs, tmp_path):
    """As docs/operations.md says."""
    program = executable(tmp_path / "program.py", PROGRAM)
    log = tmp_path / "log"
    command = ["deepspeed", "--num_accelerators", "2", "--no_local_rank"]
    process = start([*command, "--master_port", str(free_port()), program], log)
    wait_for("up", log, 2)
    ranks = [
        each
        for each in psutil.Process(process.pid).children(recursive=True)
        if each.cmdline()[1:] == ["-u", str(program)]
    ]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == -signal.SIGTERM
    time.sleep(1)
    assert [each.is_running() for each in ranks] == [True, True]
    assert "saved" not in log.read_text()
    for each in ranks:
        each.terminate()
    wait_for("saved", log, 2)


@pytest.mark.slow
def test_deepspeed_saves_on_sigterm_and_asks_to_be_started_again(stubs, tmp_path):
    process, log = hostfile_run(tmp_path, stubs)
    wait_for("up", log, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    said = log.read_text()
    assert said.count("saved") == 2 and said.count("up") == 2


@pytest.mark.slow
def test_a_crash_is_started_again_and_an_error_is_not(stubs, tmp_path):
    process, log = hostfile_run(tmp_path, stubs, BAD="1", CODE="1", ATTEMPTS="2")
    assert process.wait(timeout=PATIENCE) == 1
    assert "attempt 2 ended with 1" in log.read_text()
    process, log = hostfile_run(tmp_path, stubs, BAD="1", CODE="2", ATTEMPTS="2")
    assert process.wait(timeout=PATIENCE) == 2
    assert "attempt" not in log.read_text()


# --- the image


def test_the_dockerfile_names_what_is_there():
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and line[0] != "#"]
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}
    assert {name for name, _ in steps} <= known
    rules = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    copied = []
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = rest.split()
            copied += sources
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in rules, f"{source} is kept out of the build"
    # whatever setuptools packages or reads
    assert {"rlhf", "reward", "launch", "pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    commands = [rest for name, rest in steps if name == "RUN"]
    assert commands[0] == "pip install -r requirements.txt"
    assert commands[1].startswith("pip install --no-deps")
    # before the code is copied
    order = [f"{name} {rest}" for name, rest in steps]
    assert order.index("RUN pip install -r requirements.txt") < order.index("COPY rlhf rlhf")
    # the manifests and the image agree on the folder
    assert ["WORKDIR", "/rlhf"] in steps
    started = json.loads(dict(steps)["CMD"])
    from rlhf.commands import COMMANDS

    assert started[0] == "rlhf" and " ".join(started[1:]) in COMMANDS
