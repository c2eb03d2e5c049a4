"""Names that libraries define, read in their source: torch and they take seconds to import.

Where a source is not as expected, as in another version, nothing is known of its names, and what
checks them leaves that to the library.
"""

import ast
import functools
from importlib.util import find_spec
from pathlib import Path

# what TRL's configs inherit from: package, file, class
ABOVE = (
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("transformers", "training_args.py", "TrainingArguments"),
)
MODEL_TYPES = ("models/auto/auto_mappings.py", "models/auto/configuration_auto.py")
# files without this word are no longer the lists
SURE_TYPE = '"llama"'


def trl_options(config: str) -> list[str]:
    """Return the options of TRL's class `config`, such as SFTConfig, with those that it inherits; none
    where they are not known.
    """
    file = f"trainer/{config.removesuffix('Config').lower()}_config.py"
    names = []
    bases = [config]
    for package, source, name in (("trl", file, config), *ABOVE):
        found = _class(package, source, name)
        # an unknown base may have options of its own
        if found is None or bases != [name]:
            return []
        names += [line.target.id for line in found.body if isinstance(line, ast.AnnAssign)]
        bases = [ast.unparse(base) for base in found.bases]
    return names if not bases else []


def optimizers() -> list[str]:
    """Return the names of transformers' optimizers; none where they are not known."""
    return _values("transformers", "training_args.py", "OptimizerNames")


def adapter_kinds() -> list[str]:
    """Return PEFT's kinds of adapters; none where they are not known."""
    return _values("peft", "utils/peft_types.py", "PeftType")


def is_model_type(name: str) -> bool:
    """Return whether transformers may have models of this type: its lists have the word, or are not
    where they are looked for.
    """
    texts = [_source("transformers", file) for file in MODEL_TYPES]
    names = "".join(texts)
    are_found = all(texts) and SURE_TYPE in names
    return not are_found or f'"{name}"' in names


def _source(package: str, file: str) -> str:
    """Return the text of a file of a package; empty where it is not there."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else Path()
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@functools.cache
def _class(package: str, file: str, name: str) -> ast.ClassDef | None:
    """Return the definition of a class; None where it is not there."""
    lines = ast.parse(_source(package, file)).body
    return next((x for x in lines if isinstance(x, ast.ClassDef) and x.name == name), None)


def _values(package: str, file: str, enum: str) -> list[str]:
    """Return the texts that the members of an enum are; none where one is anything else."""
    found = _class(package, file, enum)
    values = []
    for line in found.body if found else []:
        match line:
            case ast.Assign(value=ast.Constant(value=str(text))):
                values.append(text)
            case ast.Assign() | ast.AnnAssign():
                return []
    return values
