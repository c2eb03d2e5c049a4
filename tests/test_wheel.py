"""The wheel works without the checkout: built, installed into a fresh environment, run in an empty
folder.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("launch", "reward", "rlhf")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, since a build folder that lies about would leak files into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", built, source], check=True
    )
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment that has the wheel, and sees its dependencies where they
    are installed.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--python",
        python,
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # after the wheel on the path; .pth files in that folder, such as one of an editable install,
    # are not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(command: list, cwd: Path) -> str:
    """Run a command that must succeed outside the checkout; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_its_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert "Apache License" in archive.read(licence).decode()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wanted = {name for name in listed.stdout.split() if (ROOT / name).is_file()}
    assert held == wanted


def test_an_index_would_accept_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = Metadata.from_email(archive.read(name), validate=True)
    assert metadata.license_expression == "Apache-2.0" and metadata.author == "The rlhf authors"
    # development tools come with the extra `dev` alone
    tools = {"pytest", "ruff", "playwright", "scikit-learn", "krippendorff"}
    plain = {
        r.name
        for r in metadata.requires_dist
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }
    assert not plain & tools and {"torch", "pydantic"} <= plain
    assert {"collect", "prepare", "wandb", "dev"} <= set(metadata.provides_extra)


SANDBOX = {
    "n_instructions": 60,
    "n_prompts": 200,
    "vocab_size": 384,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "pretrain_steps": 3,
    "pretrain_batch_size": 8,
    "pretrain_documents": 64,
}
SFT = {
    "model_name_or_path": "world/base",
    "data": "world/instructions.jsonl",
    "output_dir": "sft",
    "max_steps": 1,
    "eval_prompts": 2,
    "eval_data": "world/prompts.jsonl",
    "eval_scorers": "[{voice: world/voice.yaml}]",
    "max_prompt_length": 200,
    "max_response_length": 200,
}
# Runs the program that its arguments name, as `python -m` does, then prints the files of the
# modules it imported.
REPORT_IMPORTS = """
import json, runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(program, run_name="__main__", alter_sys=True)
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
print(json.dumps({name: file for name, file in files.items() if file}))
"""


def test_a_pipeline_runs_outside_the_checkout(python, tmp_path):
    rlhf = python.parent / "rlhf"
    assert run([rlhf, "--version"], tmp_path).startswith("rlhf ")
    assert "experiment run" in run([rlhf, "--help"], tmp_path)
    run([rlhf, "sandbox", "build", "--output_dir", "world", *flags(SANDBOX)], tmp_path)

    printed = run([python, "-c", REPORT_IMPORTS, "launch.sft", *flags(SFT)], tmp_path)
    files = json.loads(printed.splitlines()[-1])
    assert (tmp_path / "sft" / "adapter_model.safetensors").is_file()
    dependencies = Path(sysconfig.get_path("purelib"))
    from_checkout = {
        name: file
        for name, file in files.items()
        if Path(file).is_relative_to(ROOT) and not Path(file).is_relative_to(dependencies)
    }
    assert not from_checkout
    ours = [file for name, file in files.items() if name.partition(".")[0] in PACKAGES]
    assert ours and all(Path(file).is_relative_to(python.parent.parent) for file in ours)


def test_the_documented_command_finds_the_programs(python, tmp_path):
    """`deepspeed --module launch.ppo`, whose launcher is a module of DeepSpeed."""
    launcher = [python, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    assert "usage: deepspeed --module launch.ppo" in run(
        [*launcher, "--module", "launch.ppo", "--help"], tmp_path
    )


def flags(options: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
