"""A world written to disk: the same for the same seed, held out as it must be, and a base that is
loadable and kept.
"""

import json
import random

import pytest

from rlhf.config import parse
from rlhf.data.records import Instruction, Prompt, prompt_group
from rlhf.data.split import split_of
from rlhf.errors import UserError
from rlhf.sandbox import base, build, corpus

TINY = {
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


def config(folder, **options):
    return build.SandboxConfig(output_dir=str(folder), **(TINY | options))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    report = build.build(config(folder))
    return folder, report


def test_files_hold_records_and_their_counts(world):
    folder, report = world
    instructions, prompts = rows(folder / "instructions.jsonl"), rows(folder / "prompts.jsonl")
    assert (len(instructions), len(prompts)) == (60, 200)
    for row in instructions:
        Instruction(
            prompt=row["messages"][:-1],
            response=row["messages"][-1]["content"],
            metadata=row["metadata"],
        )
    for row in prompts:
        assert {"intent", "item", "remedy"} <= set(row["metadata"])
        assert row["metadata"]["item"] in row["prompt"][0]["content"]
        Prompt(**row)
    assert json.loads((folder / "world.json").read_text()) == report
    assert sum(report["prompts_by_split"].values()) == 200


def test_no_test_prompt_is_in_the_instructions_or_the_pretraining_text(world):
    folder, _ = world
    prompts = {prompt_group(r["prompt"]) for r in rows(folder / "prompts.jsonl")}
    instructions = {prompt_group(r["messages"]) for r in rows(folder / "instructions.jsonl")}
    assert len(prompts) == 200 and len(instructions) == 60
    assert any(split_of(g) == "test" for g in prompts)
    assert not prompts & instructions
    assert not any(split_of(g) == "test" for g in instructions)
    here = config(folder)
    documents = build.pretraining_documents(here, corpus.make_world(0, 40, 12), 800)
    groups = {prompt_group(d) for d in documents if not isinstance(d, str)}
    assert len(groups) > 300 and not groups & {g for g in prompts if split_of(g) == "test"}


def test_default_prompts_leave_three_hundred_for_the_test_split(tmp_path):
    defaults = build.SandboxConfig(output_dir=str(tmp_path))
    found = build.prompt_rows(defaults, corpus.make_world(0, defaults.n_items, defaults.n_intents))
    assert sum(split_of(prompt_group(r["prompt"])) == "test" for r in found) >= 300


def test_prompts_do_not_change_with_the_number_of_instructions(tmp_path):
    here = corpus.make_world(0, 40, 12)
    few, many = (
        config(tmp_path, n_prompts=50, n_instructions=10),
        config(tmp_path, n_prompts=80, n_instructions=300),
    )
    assert build.prompt_rows(few, here) == build.prompt_rows(many, here)[:50]
    assert build.instruction_rows(few, here) == build.instruction_rows(many, here)[:10]


def test_the_same_seed_builds_the_same_world_to_the_last_byte(world, tmp_path):
    folder, report = world
    again = build.build(config(tmp_path))
    assert again["files"] == report["files"]
    assert (tmp_path / "base/model.safetensors").read_bytes() == (
        folder / "base/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "base/tokenizer.json").read_bytes() == (
        folder / "base/tokenizer.json"
    ).read_bytes()
    other = build.build(config(tmp_path / "other", world_seed=1))
    assert other["files"]["prompts.jsonl"] != report["files"]["prompts.jsonl"]
    assert other["base"]["fingerprint"] != report["base"]["fingerprint"]


def test_a_second_build_keeps_the_base_and_changed_settings_do_not(world, tmp_path, capsys):
    build.build(config(tmp_path))
    written = (tmp_path / "base/model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    build.build(config(tmp_path, n_prompts=100))
    assert "reusing the base" in capsys.readouterr().out
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns == written
    assert len(rows(tmp_path / "prompts.jsonl")) == 100
    build.build(config(tmp_path, pretrain_steps=2))
    assert "settings have changed" in capsys.readouterr().out
    assert (tmp_path / "base/model.safetensors").stat().st_mtime_ns != written
    assert not (tmp_path / "base.partial").exists()


def test_the_base_loads_as_a_hub_model_and_its_template_is_fit_for_training(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.chat_template_utils import has_generation_markers, is_chat_template_prefix_preserving

    folder, report = world
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert sum(p.numel() for p in model.parameters()) == report["base"]["parameters"]
    assert len(tokenizer) <= model.config.vocab_size == 384
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.config.eos_token_id
    assert has_generation_markers(tokenizer.chat_template) and is_chat_template_prefix_preserving(
        tokenizer
    )
    chat = [
        {"role": "user", "content": "Hi.\nWhere is it?"},
        {"role": "assistant", "content": "Here ☕."},
    ]
    text = (
        "<|im_start|>user\nHi.\nWhere is it?<|im_end|>\n<|im_start|>assistant\nHere ☕.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    head = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(head) and head.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    kept = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(kept) == "Here ☕.<|im_end|>"


def test_batches_go_through_all_rows_once_in_like_lengths():
    data = [base.Row([i] * (1 + i % 7)) for i in range(64)]
    found = list(base.batches(data, 8, random.Random(0)))
    assert sorted(row.ids[0] for batch in found for row in batch) == list(range(64))
    assert sum(len({len(r) for r in batch}) <= 2 for batch in found) == 8


def test_learning_rate_warms_up_and_falls_to_a_fiftieth():
    # 100 steps: warm-up 5; step 0 = 1/5 of the peak, step 4 = the peak; then the cosine, at step
    # 100 0.02
    assert [base.learning_rate(s, 100, 1.0) for s in (0, 4, 5, 100)] == pytest.approx(
        [0.2, 1.0, 1.0, 0.02]
    )


def test_loss_of_a_right_padded_batch_counts_true_tokens_only():
    import torch

    tokenizer = base.train_tokenizer(["some text"] * 3, 300)
    model = base.make_model(
        tokenizer, base.BaseConfig(vocab_size=384, hidden_size=16, num_layers=1, num_heads=2)
    )
    with torch.no_grad():
        one, other = [base.Row([7, 8, 9, 10, 11])], [base.Row([12, 13, 14])]
        (x, n), (y, m), (both, all) = (
            base.language_loss(model, rows, tokenizer.pad_token_id, 1.0)
            for rows in (one, other, one + other)
        )
    # 4 and 2 predicted tokens: the mean of both rows is (4 x + 2 y) / 6
    assert (n, m, all) == (4, 2, 6)
    assert both.item() == pytest.approx((4 * x.item() + 2 * y.item()) / 6, abs=1e-6)
    assert base.evaluate(model, tokenizer, one + other, 2) == pytest.approx(both.item(), abs=1e-6)


def test_a_prompt_counts_its_weight():
    import torch

    tokenizer = base.train_tokenizer(["some text"] * 3, 300)
    model = base.make_model(
        tokenizer, base.BaseConfig(vocab_size=384, hidden_size=16, num_layers=1, num_heads=2)
    )
    ids = [7, 8, 9, 10, 11]
    with torch.no_grad():
        whole, answer, weighted = (
            base.language_loss(model, [base.Row(ids, prompt)], tokenizer.pad_token_id, weight)
            for prompt, weight in ((0, 1.0), (3, 0.0), (3, 0.1))
        )
    # of the 4 predicted tokens 2 are the prompt's: weights 4, 2 and 2.2; prompt loss = 4 whole - 2
    # answer
    assert [n for _, n in (whole, answer, weighted)] == pytest.approx([4, 2, 2.2])
    prompt_sum = 4 * whole[0].item() - 2 * answer[0].item()
    assert weighted[0].item() == pytest.approx(
        (2 * answer[0].item() + 0.1 * prompt_sum) / 2.2, abs=1e-5
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_items": 500}, "'n_items' is 500"),
        ({"off_brand": 1.5}, "'off_brand' is 1.5"),
        ({"hidden_size": 30, "num_heads": 4}, "even multiple of num_heads"),
        ({"n_items": 2, "n_intents": 2, "n_prompts": 9000}, "raise n_items or n_intents"),
        ({"vocab_size": 100}, "'vocab_size' is 100"),
    ],
)
def test_options_that_cannot_work_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        parse(
            build.SandboxConfig, [f"--{name}={value}" for name, value in (TINY | options).items()]
        )


def test_options_come_from_the_command_line():
    found = parse(
        build.SandboxConfig, ["--world_seed", "3", "--off_brand", "0.4"], prog="rlhf sandbox build"
    )
    assert (found.world_seed, found.off_brand) == (3, 0.4)
