"""Each fault is provoked, found, and comes with what to do."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.doctor import inputs, machine
from rlhf.doctor.findings import Finding, run_check
from rlhf.doctor.run import checks_of, read_program
from rlhf.errors import UserError
from rlhf.startup import free_port
from tests.conftest import ROOT


def faults(findings) -> list[str]:
    return [f"{f.found} -> {f.remedy}" for f in findings if not f.good]


def the_fault(findings) -> str:
    (fault,) = faults(findings)
    return fault


# --- the command


def test_a_good_machine_ends_with_0_without_torch():
    code = (
        "import sys, rlhf.doctor.machine as machine, rlhf.cli\n"
        "machine.has_driver = lambda: False\n"
        "machine.LEAST_DISK = machine.LEAST_SHARED = 0\n"
        "rlhf.cli.main(['doctor'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("versions", "accelerator", "compiler", "operators", "disk", "ports", "addresses"):
        assert f"good  {name}" in done.stdout


def test_a_fault_ends_with_1_and_says_what_to_do(tmp_path, capsys):
    config = tmp_path / "sft.yaml"
    config.write_text(f"data: [{tmp_path}/rows.jsonl]\noutput_dir: {tmp_path}/run\n")
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(config)])
    said = capsys.readouterr().out
    assert stop.value.code == 1 and said.endswith("1 to look at\n")
    assert f"FAULT data           {tmp_path}/rows.jsonl: not there" in said
    assert "-> check the path" in said

    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(config), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1 and report["good"] is False
    (bad,) = [finding for finding in report["findings"] if not finding["good"]]
    assert bad["name"] == "data" and bad["remedy"] == "check the path"


def test_a_config_that_is_not_there_is_an_error_of_its_own(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "configs/sfd.yaml"])
    assert stop.value.code == 2 and "Did you mean configs/sft.yaml?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,said",
    [
        # options of PPO, with one that it does not know
        (
            "reward: [{length: 1}]\nkl_coeff: 0.1\ndata: x",
            "option 'kl_coeff'. Did you mean 'kl_coef'?",
        ),
        ("data: x\nreward: 5", "option 'reward', item 1: expected a mapping"),
        # whole, and refused by what the program checks
        ("model_name_or_path: a\ndata: x\noutput_dir: y\nlora_r: 0", "'lora_r' is 0"),
        (
            "methods: {}\nseeds: [0]\noutput_dir: y",
            "found the file of an experiment (rlhf experiment run)",
        ),
    ],
)
def test_options_that_a_program_would_refuse_are_refused(text, said, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        read_program(str(file))
    assert said in str(error.value)


def test_options_are_read_as_the_program_reads_them(tmp_path):
    file = tmp_path / "run.yaml"
    # what is missing may come from the command line
    file.write_text("data: a,b\nreport_to: wandb\nbeta: 1e-1")
    assert read_program(str(file)) == {"data": ["a,b"], "report_to": "wandb", "beta": 0.1}


def test_an_error_inside_a_check_is_a_fault_and_keeps_what_came_before():
    def broken_check():
        yield Finding("disk", "fine")
        raise OSError("a driver is missing")

    found = run_check(broken_check)
    assert [finding.good for finding in found] == [True, False]
    assert found[1].name == "broken check" and "OSError: a driver is missing" in found[1].found


def test_each_check_has_a_name():
    assert len({check.__name__ for check in checks_of({})}) == 12


# --- the machine


def test_versions(monkeypatch):
    installed = {"torch": "2.13.0+cpu", "peft": "0.19.0"}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        metadata,
        "requires",
        lambda name: ["torch>=2.13,<2.15", "peft>=0.21.2,<0.22", "wandb<1; extra == 'wandb'"],
    )
    assert the_fault(machine.versions()) == (
        "peft 0.19.0, and <0.22,>=0.21.2 is needed -> pip install 'peft<0.22,>=0.21.2'"
    )
    assert "wandb is not installed" in faults(machine.versions(("wandb",)))[1]

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert "pip install --no-deps -e ." in the_fault(machine.versions())


@pytest.mark.parametrize(
    "cuda,visible,expected",
    [
        ("13.0", "", "unset it to use the GPUs"),
        (None, None, "install torch with CUDA"),
        ("13.0", None, "a driver for CUDA 13.0 or newer"),
    ],
)
def test_a_gpu_that_torch_cannot_use(cuda, visible, expected, monkeypatch):
    import torch

    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert expected in the_fault(machine.accelerator())


def test_a_gpu_that_is_taken_or_old(monkeypatch):
    import torch

    memory = [(70 << 30, 80 << 30), (5 << 30, 80 << 30), (15 << 30, 16 << 30)]
    capability = [(9, 0), (9, 0), (7, 0)]
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    found = list(machine.accelerator())
    assert [finding.good for finding in found] == [True, False, False]
    assert found[0].found == "GPU 0: H100, 70 of 80 GiB free"
    assert "another process uses it" in found[1].remedy and "no bfloat16" in found[2].remedy


def test_no_compiler_no_headers_no_ninja(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert faults(machine.compiler()) == [
        "g++ is not there -> install g++ and Python's headers (Debian: apt install g++ python3-dev)",
        "ninja is not there -> pip install ninja",
    ]
    monkeypatch.undo()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in the_fault(machine.compiler())


def test_operators(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new"))
    assert "none compiled yet" in next(machine.operators()).found
    folder = tmp_path / "new" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "deepspeed_shm_comm.so").touch()
    assert next(machine.operators()).found == "compiled: deepspeed_shm_comm"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "set TORCH_EXTENSIONS_DIR" in the_fault(machine.operators())


def test_room(monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(50 << 30))
    assert faults(machine.room((f"{tmp_path}/not/yet",))) == []

    by_path = {tmp_path: usage(1 << 30), machine.SHARED_MEMORY: usage(64 << 20)}
    monkeypatch.setattr(machine.shutil, "disk_usage", by_path.__getitem__)
    disk, shared = faults(machine.room((f"{tmp_path}/not/yet",)))
    assert disk == (
        f"{tmp_path}/not/yet: 1.0 GiB free -> free some space: at least 2 GiB for checkpoints"
    )
    assert "--shm-size=16g" in shared and "0.1 GiB" in shared
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "can be written" in faults(machine.room((str(tmp_path),)))[0]


def test_ports(monkeypatch):
    monkeypatch.delenv("PET_MASTER_PORT", raising=False)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        assert the_fault(machine.ports()) == (
            f"port {port}: Address already in use -> another run uses it: "
            f"deepspeed --master_port {port % 65000 + 1} ..."
        )
    assert faults(machine.ports()) == []
    for wrong in ("http", "70000"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        assert f"MASTER_PORT is '{wrong}'" in the_fault(machine.ports())


def test_addresses(monkeypatch):
    for name in (*machine.MACHINES, "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "PET_MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    known = {"node1": "127.0.1.1", "node0": "10.0.0.1"}

    def resolve(name):
        if name not in known:
            raise socket.gaierror(errno.ENOENT, "Name or service not known")
        return known[name]

    monkeypatch.setattr(machine.socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(machine.socket, "gethostbyname", resolve)
    # on one machine its name need not be known to others
    assert faults(machine.addresses()) == []
    monkeypatch.setenv("PET_NNODES", "2")
    assert "GLOO_SOCKET_IFNAME" in the_fault(machine.addresses())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert [f.found for f in machine.addresses()] == [
        "node1 is 127.0.1.1",
        "the first rank, node0, is 10.0.0.1",
    ]
    monkeypatch.setenv("MASTER_ADDR", "node9")
    assert "node9: Name or service not known" in the_fault(machine.addresses())
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    assert "eth77: no such interface -> one of" in the_fault(machine.addresses())


# --- what a run reads


def test_models(base_path, tmp_path):
    import shutil

    assert faults(inputs.models({"model_name_or_path": base_path})) == []
    missing = str(Path(base_path).parent / "absent" / "model")
    assert f"{missing}: not there" in the_fault(inputs.models({"model_name_or_path": missing}))

    cut = tmp_path / "cut"
    shutil.copytree(base_path, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in the_fault(inputs.check_model(str(cut)))
    weights.unlink()
    (cut / "tokenizer.json").unlink()
    assert "weights and a tokenizer missing" in the_fault(inputs.check_model(str(cut)))

    # a reward model, and the base of its adapter, which was moved
    (cut / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere/base"}')
    options = {"reward": [{"ensemble": [str(cut)]}, {"function": "mine:score"}]}
    assert [fault.partition(":")[0] for fault in faults(inputs.models(options))] == [
        str(cut),
        "/nowhere/base",
    ]
    # one that moved together with its adapter is found, as the programs find it
    shutil.copytree(base_path, tmp_path / "base")
    (cut / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert [fault.partition(":")[0] for fault in faults(inputs.models(options))] == [str(cut)]
    (cut / "adapter_config.json").write_text("{}")
    assert "names no 'base_model_name_or_path'" in faults(inputs.models(options))[1]


def test_scorers(tmp_path):
    voice, guide = tmp_path / "voice.yaml", tmp_path / "guide.md"
    voice.touch()
    # a judge's model is at its address, and a function's options are its own
    judge = {"openai": "http://127.0.0.1:9/v1", "model": "gpt", "guide": str(guide)}
    options = {
        "reward": [{"voice": str(voice), "judge": judge}, {"function": "mine:f", "guide": "short"}],
        "eval_scorers": [judge],
    }
    assert list(inputs.models(options)) == []
    assert [f.good for f in inputs.scorers(options)] == [True, False, False]
    assert f"{guide}: not there" in faults(inputs.scorers(options))[0]
    guide.touch()
    assert faults(inputs.scorers(options)) == []


def test_every_option_that_names_rows_is_looked_at():
    for name in ("data", "eval_data", "ptx_data", "reference_data"):
        assert "rows.jsonl: not there" in the_fault(inputs.data({name: ["/nowhere/rows.jsonl"]}))


def test_data(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "votes.db").write_text("store")
    good = f"{rows},{tmp_path}/votes.db@118"
    assert faults(inputs.data({"data": good})) == []
    assert f"Did you mean {rows}?" in the_fault(inputs.data({"data": [f"{tmp_path}/row.jsonl"]}))
    assert "empty.jsonl: empty" in the_fault(inputs.data({"data": [f"{tmp_path}/empty.jsonl"]}))


@pytest.mark.parametrize(
    "error,expected",
    [
        ("GatedRepoError", "accept it there; hf auth login"),
        ("RepositoryNotFoundError", "where it is private: hf auth login"),
        ("ConnectionError", "check the network and HF_ENDPOINT"),
        (None, None),
    ],
)
def test_names_on_the_hub(error, expected, monkeypatch):
    import huggingface_hub
    import requests
    from huggingface_hub import errors

    def repo_info(self, name, **options):
        if error is None:
            return
        if error == "ConnectionError":
            raise requests.ConnectionError("no route")
        # these want an answer of the server
        wanted = getattr(errors, error)
        raise wanted.__new__(wanted)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    found = faults([inputs.hub_finding("model", "owner/model")])
    assert found == [] if expected is None else expected in found[0]


def test_the_hub_offline(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = the_fault(inputs.data({"data": ["owner/set@train"]}))
    assert "hf download owner/set --repo-type dataset" in found
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/file")
    assert inputs.hub_finding("model", "owner/model").good


def test_services(monkeypatch):
    import requests

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert list(inputs.wandb({})) == list(inputs.vllm({})) == []
    report = {"report_to": "wandb"}
    assert "wandb login" in the_fault(inputs.wandb(report))
    # the ways of a run to a key
    for key in ("WANDB_IDENTITY_TOKEN_FILE", "WANDB_API_KEY"):
        with monkeypatch.context() as set_:
            set_.setenv(key, "x" * 40)
            assert "127.0.0.1:9 does not answer" in the_fault(inputs.wandb(report))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert faults(inputs.wandb(report)) == []
    server = {"vllm_url": "http://127.0.0.1:9/"}
    assert "127.0.0.1:9 does not answer" in the_fault(inputs.vllm(server))
    answer = namedtuple("answer", "status_code")
    asked = []

    def get(url, timeout):
        asked.append(url)
        return answer(502 if len(asked) == 1 else 401)

    monkeypatch.setattr(requests, "get", get)
    assert "answers 502" in the_fault(inputs.vllm(server))
    # a key is the run's matter: there is a server, whose address may have its /v1
    assert faults(inputs.vllm({"vllm_url": "http://127.0.0.1:9/v1"})) == []
    assert asked == ["http://127.0.0.1:9/v1/models"] * 2


def test_extras_follow_the_configuration():
    options = {"report_to": "wandb", "optim": "adamw_8bit", "model_name_or_path": "a/b.gguf"}
    assert inputs.extras_of(options) == ("wandb", "quant", "gguf")
    assert inputs.extras_of({}) == ()


def test_a_folder_with_one_gguf_file_is_a_model(tmp_path):
    (tmp_path / "a.gguf").touch()
    options = {"model_name_or_path": str(tmp_path)}
    assert inputs.extras_of(options) == ("gguf",) and faults(inputs.models(options)) == []
    (tmp_path / "b.gguf").touch()
    assert "2 GGUF files (a.gguf, b.gguf)" in the_fault(inputs.models(options))
