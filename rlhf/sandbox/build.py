"""`rlhf sandbox build`: write a small world with a known true reward, ready for every stage.

    output_dir/base/               model and tokenizer, as a Hub model's folder
    output_dir/instructions.jsonl  {"messages", "metadata"}: what SFT imitates, a share of it off-brand
    output_dir/prompts.jsonl       {"prompt", "metadata"}: what is sampled, judged, trained on and compared
    output_dir/held_out.jsonl      exchanges like the instructions, of test groups: what a policy should not unlearn
    output_dir/short.jsonl         short exchanges as the base was pretrained on and SFT never shows: another domain
    output_dir/voice.yaml          the brand voice of the shop: the true reward
    output_dir/world.json          settings, fingerprints, counts, losses of the base

The world seed decides all of it. No prompt of the test split stands in the instructions or the
pretraining text.
"""

import hashlib
import itertools
import json
import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config import SEED, option
from rlhf.data.records import digest, prompt_group
from rlhf.data.split import split_of
from rlhf.errors import UserError
from rlhf.files import lock_folder, unlock_folder, write_atomic
from rlhf.sandbox import SHOP_VOICE, base, corpus, packaged, phrases

# of the pretraining documents; without short ones the base does not learn to copy
PLAIN_SHARE, SHORT_SHARE = 0.05, 0.45


@dataclass
class SandboxConfig:
    """Build the sandbox: a base model, instructions and prompts of an invented shop."""

    output_dir: str = option(
        "runs/sandbox", "folder of the world; a base that is there and has these settings is reused"
    )
    world_seed: int = option(
        0, "decides goods, texts and base; runs on one world differ in their own seeds", **SEED
    )
    n_instructions: int = option(
        3000, "exchanges in instructions.jsonl, for SFT", low=1, high=100_000
    )
    n_prompts: int = option(
        4000, "prompts in prompts.jsonl; about a tenth are test prompts", low=1, high=100_000
    )
    off_brand: float = option(
        0.6, "share of the instructions' answers that are off-brand", low=0, high=1
    )
    n_items: int = option(
        40,
        f"different goods, 2 to {len(phrases.ITEMS)}; more are harder to copy from the prompt",
        low=2,
        high=len(phrases.ITEMS),
    )
    n_intents: int = option(
        12,
        f"different things that customers want, 2 to {len(phrases.INTENTS)}",
        low=2,
        high=len(phrases.INTENTS),
    )
    vocab_size: int = option(1024, "tokens of the byte-level BPE", low=384, high=32_768)
    hidden_size: int = option(
        96, "width of the base; 96 wide and 4 deep is 0.54 M parameters", low=1
    )
    num_layers: int = option(4, "layers of the base", low=1)
    num_heads: int = option(4, "attention heads; the width must be an even multiple of them", low=1)
    intermediate_size: int = option(256, "width of the feed-forward layers", low=1)
    pretrain_steps: int = option(450, "pretraining steps of the base", low=1)
    pretrain_batch_size: int = option(32, "documents in a pretraining step", low=1)
    pretrain_documents: int = option(
        15000,
        "documents of the pretraining text; gone through again when they do not suffice",
        low=1,
    )
    pretrain_off_brand: float = option(
        0.7, "share of off-brand answers in the pretraining text", low=0, high=1
    )
    pretrain_learning_rate: float = option(
        4e-3, "peak learning rate of pretraining for embeddings and norms (AdamW)", above=0, high=1
    )
    pretrain_muon_learning_rate: float = option(
        0.02, "peak learning rate of pretraining for all other matrices (Muon)", above=0, high=1
    )

    pretrain: bool = option(
        False, "pretrain the base even where the package has the one of these settings"
    )

    def validate(self) -> None:
        if self.pretrain_documents < self.pretrain_batch_size:
            raise UserError(
                f"'pretrain_documents' is {self.pretrain_documents}, expected at least one batch of "
                f"{self.pretrain_batch_size}"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"option 'hidden_size': found {self.hidden_size}, expected an even multiple of num_heads, "
                f"which is {self.num_heads}"
            )
        world = corpus.make_world(self.world_seed, self.n_items, self.n_intents)
        # most of a half of the prompts must stay free, or drawing new ones takes for ever
        if max(self.n_prompts, self.n_instructions) > world.distinct_prompts // 5:
            raise UserError(
                f"this world has {world.distinct_prompts} different prompts, too few for {self.n_prompts} prompts and "
                f"{self.n_instructions} instructions: raise n_items or n_intents, or ask for less"
            )

    def base_config(self) -> base.BaseConfig:
        return base.BaseConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            intermediate_size=self.intermediate_size,
            steps=self.pretrain_steps,
            batch_size=self.pretrain_batch_size,
            learning_rate=self.pretrain_learning_rate,
            muon_learning_rate=self.pretrain_muon_learning_rate,
            seed=self.world_seed,
        )


def build(config: SandboxConfig) -> dict[str, Any]:
    """Write the world into `config.output_dir` and return what world.json says; a base with these
    settings is kept.
    """
    folder = Path(config.output_dir)
    lock_folder(folder)
    world = corpus.make_world(config.world_seed, config.n_items, config.n_intents)
    rows = {
        "instructions.jsonl": instruction_rows(config, world),
        "prompts.jsonl": prompt_rows(config, world),
        "held_out.jsonl": held_out_rows(config, world),
        "short.jsonl": short_rows(config, world),
    }
    files = {name: _write_jsonl(folder / name, content) for name, content in rows.items()}
    for name, content in rows.items():
        print(f"{folder / name}: {len(content)} rows")
    shutil.copyfile(SHOP_VOICE, folder / "voice.yaml")
    losses = build_base(config, world)
    by_split: Counter[str] = Counter()
    for row in rows["prompts.jsonl"]:
        by_split[split_of(prompt_group(row["prompt"]))] += 1
    report = {
        "settings": asdict(config),
        "items": list(world.items),
        "intents": list(world.intents),
        "distinct_prompts": world.distinct_prompts,
        "prompts_by_split": dict(sorted(by_split.items())),
        "files": files,
        "base": losses,
    }
    write_atomic(folder / "world.json", json.dumps(report, indent=2) + "\n")
    unlock_folder(folder)
    print(f"{folder / 'world.json'}: settings, fingerprints and losses")
    return report


def instruction_rows(config: SandboxConfig, world: corpus.World) -> list[dict]:
    """Return exchanges for SFT, `off_brand` of them with faults (named in the metadata); no test
    group is among them.
    """

    def is_wanted(group: str) -> bool:
        return split_of(group) != "test" and not _is_prompt(group)

    rng = random.Random(f"instructions {config.world_seed}")
    cases = corpus.draw_cases(world, rng, is_wanted)
    rows = []
    for _ in range(config.n_instructions):
        case = next(cases)
        answer, faults = corpus.draw_answer(world, case, config.off_brand, rng)
        messages = [*case.messages, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "metadata": {**case.metadata, "faults": list(faults)}})
    return rows


def held_out_rows(config: SandboxConfig, world: corpus.World, count: int = 300) -> list[dict]:
    """Return exchanges as in the instructions, of test groups that are no prompts."""

    def is_wanted(group: str) -> bool:
        return split_of(group) == "test" and not _is_prompt(group)

    rng = random.Random(f"held out {config.world_seed}")
    cases = corpus.draw_cases(world, rng, is_wanted)
    rows = []
    for case in itertools.islice(cases, count):
        answer, _ = corpus.draw_answer(world, case, config.off_brand, rng)
        messages = [*case.messages, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "split": "test"})
    return rows


def short_rows(config: SandboxConfig, world: corpus.World, count: int = 300) -> list[dict]:
    """Return short exchanges, each once."""
    rng, rows = random.Random(f"short {config.world_seed}"), {}
    for _ in range(20 * count):
        exchange = corpus.short_exchange(world, rng)
        rows.setdefault(json.dumps(exchange), {"messages": exchange, "split": "test"})
        if len(rows) == count:
            break
    return list(rows.values())


def prompt_rows(config: SandboxConfig, world: corpus.World) -> list[dict]:
    """Return prompts without answers, of all splits; none of them is an instruction's."""
    rng = random.Random(f"prompts {config.world_seed}")
    cases = corpus.draw_cases(world, rng, _is_prompt)
    rows = []
    for case in itertools.islice(cases, config.n_prompts):
        rows.append({"prompt": case.messages, "metadata": case.metadata})
    return rows


def pretraining_documents(
    config: SandboxConfig, world: corpus.World, count: int, split: str = "train"
) -> list:
    """Return the base's text: exchanges of one split's groups, short exchanges (both lists of
    messages), plain sentences.
    """
    rng = random.Random(f"pretraining {split} {config.world_seed}")
    documents: list = []
    while len(documents) < count:
        kind = rng.random()
        if kind < PLAIN_SHARE:
            documents.append(corpus.plain_sentence(world, rng))
            continue
        if kind < PLAIN_SHARE + SHORT_SHARE:
            documents.append(corpus.short_exchange(world, rng))
            continue
        case = corpus.draw_case(world, rng)
        # no test prompt stands in what the base has read
        if split_of(case.group) == split:
            answer, _ = corpus.draw_answer(world, case, config.pretrain_off_brand, rng)
            documents.append([*case.messages, {"role": "assistant", "content": answer}])
    return documents


def made_from(config: SandboxConfig, texts: list[list]) -> str:
    """Return 16 hex digits of what the base is made from: its settings and its texts."""
    return digest(json.dumps([asdict(config.base_config()), texts], sort_keys=True))


def build_base(config: SandboxConfig, world: corpus.World) -> dict[str, Any]:
    """Write tokenizer and base into output_dir/base, and return what sandbox.json says of them.

    The base of the package is taken where it is made from these settings and texts and `pretrain`
    is off; else one is pretrained. One that is there is kept if it is the one that would be written.
    """
    folder = Path(config.output_dir) / "base"
    texts = [
        pretraining_documents(config, world, config.pretrain_documents),
        pretraining_documents(config, world, 500, split="validation"),
    ]
    source = made_from(config, texts)
    found = {} if config.pretrain else packaged.read_record()
    if found.get("made_from") != source:
        # the code too: another way of pretraining gives another base
        code = Path(base.__file__).read_text(encoding="utf-8")
        found = {"made_from": source, "fingerprint": digest(source + code), "packaged": False}

    record = folder / "sandbox.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if all(known.get(name) == found[name] for name in ("fingerprint", "packaged")):
            print(f"{folder}: reusing the base with these settings ({found['fingerprint']})")
            return known
        print(f"{folder}: settings have changed, remaking the base")

    partial = folder.with_name("base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if found["packaged"]:
        packaged.copy_to(partial)
        how = "from the package"
    else:
        found |= base.train_base(*texts, config.base_config(), partial)
        how = f"pretrained in {found['seconds']:.0f} s"
        (partial / "sandbox.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)  # whole or not there at all
    print(
        f"{folder}: {found['parameters']:,} parameters, {how}, loss per token "
        f"{found['loss/train']:.3f} in training, {found['loss/held_out']:.3f} on held-out text (nats)"
    )
    return found


def _is_prompt(group: str) -> bool:
    """Return whether a group may be a prompt, as half of them may; the others may be instructions,
    so that neither list depends on the other.
    """
    return digest(f"sandbox {group}")[0] in "01234567"


def _write_jsonl(path: Path, rows: list[dict]) -> str:
    """Write the rows and return the file's SHA-256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
