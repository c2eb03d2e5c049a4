"""Files, models, adapters and stores that have something wrong with them, in one folder."""

import gzip
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INSTRUCTION = '{"prompt": "where is my lamp %d?", "response": "on its way"}'
PAIR = '{"prompt": "where is my lamp %d?", "chosen": "happy to help %d", "rejected": "no %d"}'


def build(folder: Path, base: str, sft: str, reward: str) -> None:
    """Write everything that tests/faults/table.py names. `base`, `sft` and `reward` are whole."""
    for name, source in {"model": base, "sft": sft, "reward": reward}.items():
        shutil.copytree(source, folder / name)
    write_rows(folder)
    write_configs(folder)
    break_models(folder)
    break_adapters(folder)


def write_rows(folder: Path) -> None:
    """Write whole rows, and files of rows that cannot be read."""
    rows = "\n".join(INSTRUCTION % n for n in range(40))
    pairs = "\n".join(PAIR % (n, n, n) for n in range(40))
    texts = {
        "rows.jsonl": rows,
        "pairs.jsonl": pairs,
        "empty.jsonl": "",
        "cut.jsonl": rows + '\n{"prompt": "where is',
        "list.jsonl": f"[{INSTRUCTION % 0}]",
        "one.json": INSTRUCTION % 0,
        "deep.json": "[" * 20_000 + "]" * 20_000,
        "wide.csv": "prompt,response\na,b,c,d\n",
        "table.xlsx": "x",
        "garbage.parquet": "PAR1 and no more",
        "same.jsonl": pairs + '\n{"prompt": "a", "chosen": "b", "rejected": "b"}',
        "twosplits.jsonl": "\n".join(
            json.dumps({"prompt": "a", "response": "b", "group": "g", "split": split})
            for split in ("train", "test")
        ),
        "nocolumn.jsonl": '{"question": "a", "reply": "b"}',
        "number.jsonl": '{"prompt": 3, "response": "b"}',
        "empty.db": "",
        "garbage.db": "no database" * 100,
        "afile": "",
        "key.pem": "no key",
        "cert.pem": "no certificate",
        "voice.yaml": "rules:\n  - nope: 1\n",
        "brand.yaml": "voice: nowhere.yaml\n",
        "two.gguf/a.gguf": "GGUF",
        "two.gguf/b.gguf": "GGUF",
        "garbage.gguf": "no such format",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "utf16.jsonl").write_bytes(rows.encode("utf-16"))
    (folder / "latin.jsonl").write_bytes((INSTRUCTION % 0).replace("lamp", "Tür").encode("latin-1"))
    packed = gzip.compress(rows.encode())
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "twice.jsonl.gz").write_bytes(gzip.compress(packed))
    (folder / "packed.jsonl").write_bytes(packed)
    (folder / "nowhere.jsonl").symlink_to(folder / "deleted.jsonl")
    os.mkfifo(folder / "pipe.jsonl")


def write_configs(folder: Path) -> None:
    """Write option files that are no YAML, or not of options."""
    texts = {
        "bad.yaml": "learning_rate: [1\n",
        "twice.yaml": "seed: 1\nseed: 2\n",
        "list.yaml": "- seed\n",
        "typo.yaml": "learning_rat: 1e-4\n",
        "type.yaml": "logging_steps: often\n",
        "deep.yaml": "trl: " + "[" * 20_000,
        "experiment.yaml": "methods: {}\nnope: 1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes("run_name: Tür\n".encode("latin-1"))


def copy(folder: Path, source: str, name: str) -> Path:
    """Return a copy of a model to be broken."""
    return Path(shutil.copytree(folder / source, folder / name))


def change_json(file: Path, **values) -> None:
    """Set values of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(file: Path, change) -> None:
    """Write a safetensors file again with other tensors."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def halve(file: Path) -> None:
    """Cut off the second half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def with_nan(weights: dict) -> dict:
    """Return the weights with one that is not a number."""
    name = min(weights)
    return weights | {name: torch.full_like(weights[name], float("nan"))}


def without_one(weights: dict) -> dict:
    """Return the weights but one."""
    return {name: weights[name] for name in sorted(weights)[1:]}


def break_models(folder: Path) -> None:
    """Write whole models with one fault each, named after it."""
    halve(copy(folder, "model", "m-cut") / "model.safetensors")
    (copy(folder, "model", "m-zero") / "model.safetensors").write_bytes(b"")
    (copy(folder, "model", "m-noweights") / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (copy(folder, "model", "m-shard") / "model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    halve(copy(folder, "model", "m-config") / "config.json")
    change_json(copy(folder, "model", "m-type") / "config.json", model_type=None)
    change_json(copy(folder, "model", "m-unknown") / "config.json", model_type="nope")
    change_json(copy(folder, "model", "m-size") / "config.json", hidden_size=64)
    quantized = copy(folder, "model", "m-quantized") / "config.json"
    change_json(quantized, quantization_config={"quant_method": "gptq"})
    for file in (plain := copy(folder, "model", "m-notokenizer")).glob("*token*"):
        file.unlink()
    assert not (plain / "tokenizer.json").exists()
    halve(copy(folder, "model", "m-tokenizer") / "tokenizer.json")
    (copy(folder, "model", "m-template") / "chat_template.jinja").write_text("{{ messages")
    for name, change in {
        "m-nan": with_nan,
        "m-tensor": without_one,
        "m-prefix": lambda weights: {f"_orig_mod.{n}": w for n, w in weights.items()},
    }.items():
        change_weights(copy(folder, "model", name) / "model.safetensors", change)
    pickled = copy(folder, "model", "m-pickle")
    (pickled / "model.safetensors").unlink()
    torch.save({"x": Path("/")}, pickled / "pytorch_model.bin")
    (folder / "m-empty").mkdir()


def break_adapters(folder: Path) -> None:
    """Write adapters and reward models with one fault each, named after it."""
    halve(copy(folder, "sft", "a-config") / "adapter_config.json")
    halve(copy(folder, "sft", "a-cut") / "adapter_model.safetensors")
    (copy(folder, "sft", "a-noweights") / "adapter_model.safetensors").unlink()
    change_weights(copy(folder, "sft", "a-nan") / "adapter_model.safetensors", with_nan)
    change_weights(copy(folder, "sft", "a-tensor") / "adapter_model.safetensors", without_one)
    halve(copy(folder, "sft", "a-identity") / "rlhf.json")
    change_json(copy(folder, "sft", "a-otherbase") / "rlhf.json", base_fingerprint="0" * 16)
    missing = copy(folder, "sft", "a-nobase")
    change_json(missing / "adapter_config.json", base_model_name_or_path="./gone")
    change_json(missing / "rlhf.json", base_model_name_or_path="./gone")
    for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "XLORA", "NOPE"):
        change_json(
            copy(folder, "sft", f"a-{kind.lower()}") / "adapter_config.json", peft_type=kind
        )
    (copy(folder, "sft", "a-critic") / "value_head.safetensors").write_bytes(b"")
    halve(copy(folder, "reward", "r-settings") / "reward.json")
    change_json(copy(folder, "reward", "r-scale") / "reward.json", scale=0)
