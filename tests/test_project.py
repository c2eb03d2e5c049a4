"""What the project promises about itself: layers, no circles, configs, README, generated pages."""

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
# Imports go down: a module may import modules of its own layer and of those after it.
LAYERS = [
    ["rlhf.cli", "launch"],
    ["rlhf.commands"],
    [
        "rlhf.sandbox.quickstart",
        "rlhf.compare.measure",
        "rlhf.experiment",
        "rlhf.export",
        "rlhf.best_of_n",
        "rlhf.serve",
        "rlhf.brand",
        "rlhf.doctor",
        "rlhf.plan",
    ],
    ["reward"],
    [
        "rlhf.ppo.trainer",
        "rlhf.ppo.passes",
        "rlhf.ppo.experience",
        "rlhf.ppo.batches",
        "rlhf.ppo.loop",
        "rlhf.offline",
        "rlhf.sandbox",
        "rlhf.collect",
        "rlhf.exchange",
    ],
    ["rlhf.judge.commands"],
    ["rlhf.ppo.rollout", "rlhf.compare", "rlhf.report", "rlhf.judge", "rlhf.voting"],
    ["rlhf.roles", "rlhf.evaluate", "rlhf.stages"],
    ["rlhf.runs.start"],
    ["rlhf.engines", "rlhf.runs.budget"],
    ["rlhf.model"],
    ["rlhf.ppo", "rlhf.runs", "rlhf.jobs"],
    ["rlhf.ranks", "rlhf.guards"],
    ["rlhf.tensors"],
    ["rlhf.options", "rlhf.data"],
    [
        "rlhf.row_file",
        "rlhf.files",
        "rlhf.model.files",
        "rlhf.http_client",
        "rlhf.http_server",
        "rlhf.validation",
        "rlhf.program",
    ],
    ["rlhf.config", "rlhf.plugins"],
    [
        "rlhf.errors",
        "rlhf.values",
        "rlhf.stats",
        "rlhf.text",
        "rlhf.startup",
        "rlhf.library_names",
        "rlhf.model.weight_files",
    ],
]


PRODUCT = ("rlhf", "reward", "launch")


def modules(*tops: str) -> dict[str, Path]:
    """{dotted name: file} of the modules in these folders; the product's by default."""
    found = {}
    for top in tops or PRODUCT:
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            # not what benchmarks have fetched
            if ".cache" not in path.parts:
                found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path, tops: tuple[str, ...] = PRODUCT) -> set[str]:
    """The project's names that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.module and node.level == 0, f"{path}: relative imports hide their target"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in tops}


def import_graph() -> dict[str, set[str]]:
    """{module: modules that it imports}; packages whose __init__ imports nothing are no part of it."""
    known = modules()
    graph = {}
    for module, path in known.items():
        imported = imports_of(path) & set(known) - {module, "rlhf", "reward"}
        graph[module] = {
            other
            for other in imported
            if imports_of(known[other]) or known[other].name != "__init__.py"
        }
    return graph


def layer_of(module: str) -> int:
    best = max(
        ((len(name), number) for number, names in enumerate(LAYERS) for name in names
         if module == name or module.startswith(name + ".")),
        default=None,
    )  # fmt: skip
    assert best is not None, f"{module} is in no layer: add it to LAYERS"
    return best[1]


def test_imports_go_down():
    wrong = [
        f"{module} imports {imported}"
        for module, imports in import_graph().items()
        for imported in imports
        if module not in ("rlhf", "reward") and layer_of(imported) < layer_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_make_no_circle():
    """Nor within a layer, and imports inside functions count."""
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        # each module in this list is imported by the one after it
        pytest.fail("circle of imports: " + " <- ".join(error.args[1]))


def test_rlhf_never_imports_reward_but_in_its_commands():
    for module, path in modules().items():
        if module.startswith("rlhf") and module != "rlhf.commands":
            assert not any(name.split(".")[0] == "reward" for name in imports_of(path)), module


def defined_in(path: Path) -> set[str]:
    """The names that a module defines or imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def test_benchmarks_import_what_is_there():
    """No other test imports them all; ruff does not look into other modules."""
    tops = (*PRODUCT, "benchmarks", "tests")
    known = modules(*tops)
    for path in modules("benchmarks").values():
        for name in imports_of(path, tops) - set(known):
            module, _, last = name.rpartition(".")
            there = module in known and last in defined_in(known[module])
            # a package without __init__.py
            assert there or (ROOT / name.replace(".", "/")).is_dir(), f"{path}: {name}"


def test_benchmarks_that_are_named_are_there():
    """In programs, configs and pages; results and the log keep the commands of their day."""
    known = modules("benchmarks")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    for name in listed.stdout.split():
        path = ROOT / name
        is_past = name.startswith("benchmarks/results/") or name == "docs/LOG.md"
        is_text = path.suffix in (".py", ".sh", ".md", ".yaml") or name == "Makefile"
        if is_past or not is_text or not path.exists():
            continue
        text = path.read_text()
        started = set(re.findall(r"-m (benchmarks[\w.]*\w)", text))
        assert started <= set(known), f"{name}: {started - set(known)}"
        for file in re.findall(r"\bbenchmarks/[\w/-]+\.(?:py|sh|yaml)\b", text):
            assert (ROOT / file).exists(), f"{name}: {file}"


# processes that benchmarks.speed.bench starts
OF_BENCH = [
    f"benchmarks.speed.{name}" for name in ("generation", "offline", "ours", "peer", "shapes")
]


def test_the_page_of_benchmarks_has_each_script():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    named = set(re.findall(r"`(\w+[./]\w+)(?:\.sh)?`", text))
    for module, path in modules("benchmarks").items():
        short = module.removeprefix("benchmarks.")
        if "__main__" in path.read_text() and module not in OF_BENCH and "." in short:
            # the other form is that of a shell script, which starts it
            assert {short, short.replace(".", "/")} & named, f"benchmarks/README.md lacks {short}"


def test_no_library_imports_a_program():
    """By name, or by executing its file."""
    for module, path in modules().items():
        if not module.startswith("launch"):
            assert not any(name.split(".")[0] == "launch" for name in imports_of(path)), module
            executed = re.search(
                r"spec_from_file_location|runpy|import_module\([\"']launch", path.read_text()
            )
            assert not executed, f"{module}: {executed.group(0)}"


def test_light_modules_stay_light():
    """`rlhf --help` and reading data must not pay for torch."""
    code = (
        "import sys, rlhf.cli, rlhf.config, rlhf.data.load, rlhf.data.store, rlhf.runs.tracking, reward.compose\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def config_class(path: Path):
    """The options a YAML under configs/ is for."""
    name = path.stem
    if path.parent.name == "experiments":
        from rlhf.experiment.config import ExperimentConfig

        return ExperimentConfig
    # sample_quick is a smaller sample, sft_8gpus another recipe
    name = name.partition("_")[0]
    if path.parent in (SANDBOX, REAL) and name in ("sandbox", "annotate", "sample", "compare"):
        from rlhf.collect.sample import SampleConfig
        from rlhf.compare.measure import CompareConfig
        from rlhf.sandbox.annotators import AnnotateConfig
        from rlhf.sandbox.build import SandboxConfig

        return {
            "sandbox": SandboxConfig,
            "annotate": AnnotateConfig,
            "sample": SampleConfig,
            "compare": CompareConfig,
        }[name]
    from rlhf.options.programs import PROGRAMS

    return PROGRAMS[name]


SANDBOX = ROOT / "rlhf" / "sandbox" / "configs"
REAL = ROOT / "configs" / "real"
FOLDERS = (
    ROOT / "configs",
    ROOT / "configs" / "8b",
    ROOT / "configs" / "experiments",
    REAL,
    SANDBOX,
)
# of the sandbox's shop; no options
VOICES = ("voice.yaml", "street.yaml")
CONFIGS = sorted(
    path for folder in FOLDERS for path in folder.glob("*.yaml") if path.name not in VOICES
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_configs_parse(path):
    from dataclasses import MISSING, fields

    from rlhf.config import parse

    cls = config_class(path)
    given = yaml.safe_load(path.read_text()) or {}
    required = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING
    ]
    flags = [
        f"--{name}=x"
        for name in required
        if name not in given and name not in ("reward", "runs", "pairs")
    ]
    flags += ["--pairs={data: [x]}"] if "pairs" in required and "pairs" not in given else []
    flags += ["--reward=[{model: x}]"] if "reward" in required and "reward" not in given else []
    flags += ["--runs=x,y"] if "runs" in required and "runs" not in given else []
    parse(cls, ["--config", str(path), *flags])


def test_experiments_name_files_that_are_there():
    """In the repository, or below runs/, where the commands at a config's head make them."""
    for path in (
        p for p in CONFIGS if p.parent.name == "experiments" or p.parent in (SANDBOX, REAL)
    ):
        text = path.read_text()
        named = re.findall(r"(?<![\w/])[\w./-]+\.(?:py|sh|yaml|jsonl|json|db)\b", text)
        missing = [n for n in named if not n.startswith(("runs/", "PAIRS"))
                   and not (ROOT / n).exists() and not (path.parent / n).exists()]  # fmt: skip
        assert not missing, f"{path}: {missing}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda p: p.name)
def test_reference_configs_say_how_they_are_run(path):
    head = path.read_text().split("\n\n")[0]
    for word in ("deepspeed launch/", "Hardware", "Data", "Source", "Run here"):
        assert word in head, f"{path.name}: its head does not say '{word}'"


def test_voices_parse():
    from reward.voice.scorer import load_voice

    for path in sorted(ROOT.glob("configs/voices/*.yaml")):
        load_voice(str(path))


def test_metrics_page_is_current():
    from rlhf.runs.metrics import metrics_page

    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page(), "run: make docs"


def commands_in(text: str) -> list[list[str]]:
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        line.split("#")[0].split() for line in lines if line.strip() and not line.startswith("#")
    ]


def test_readme_commands_exist():
    """Each command of the README names a make target, a program with its config, or an `rlhf`
    command.
    """
    from rlhf.commands import COMMANDS

    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = commands_in((ROOT / "README.md").read_text())
    assert len(commands) >= 6
    for words in commands:
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] in ("deepspeed", "python"):
            script = next(w for w in words if w.endswith(".py"))
            assert (ROOT / script).is_file(), words
            for flag, value in itertools.pairwise(words):
                assert flag != "--config" or (ROOT / value).is_file(), words
        elif words[0] == "rlhf":
            assert any(" ".join(words[1 : 1 + n]) in COMMANDS for n in (1, 2)), words
        else:
            assert words[0] in ("git", "cd", "source", "export", "pip"), words


def test_the_tree_is_true():
    text = (ROOT / "docs" / "index.md").read_text()
    tree = re.search(r"```text\n(.*?)```", text, re.S).group(1)
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/") or re.search(r"\.\w+$", name):
            assert (ROOT / name).exists(), f"the tree names {name}"


def test_the_project_speaks_of_itself_alone():
    wrong = re.compile(r"(?<![\w.:/])/(?:home|root|work|tmp|opt)/\w")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json")
            and name != "tests/test_project.py"
        ):
            found = wrong.search(path.read_text())
            assert not found, f"{name}: {found.group(0)}"


def test_the_documentation_names_code_that_is_there():
    """Each `module.name` and test in backticks on a page of docs/; the log speaks of its day."""
    all_tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    by_module: dict[str, str] = {}
    for name, path in modules().items():
        last = name.rpartition(".")[2]
        by_module[last] = by_module.get(last, "") + path.read_text()

    gone = []
    for page in sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "LOG.md"}):
        text = page.read_text()
        for module, name in re.findall(r"`([a-z_]+)\.([A-Za-z_]+)(?:\(.*?\))?`", text):
            is_file = name in ("py", "json", "jsonl", "yaml", "md", "png", "db")
            is_there = f"{module}.{name}" in modules() or re.search(
                rf"\b{name}\b", by_module.get(module, "")
            )
            if module in by_module and not is_file and not is_there:
                gone.append(f"{page.name}: {module}.{name}")
        for name in re.findall(r"`(test_\w+)`", text):
            if f"def {name}(" not in all_tests:
                gone.append(f"{page.name}: {name}")
        for name in re.findall(r"`(?:tests/[\w/]*)?(test_\w+\.py)`", text):
            if not list((ROOT / "tests").rglob(name)):
                gone.append(f"{page.name}: {name}")
    assert not gone, "\n".join(gone)
