"""The four programs on tiny random models of many kinds: `python -m tests.kinds PAGE` writes the
table.

Each program runs whole, in this process: SFT from the base, then reward model, DPO and PPO from the
SFT policy. Right is what no kind may change: DPO's first loss is ln 2, PPO's KL is exactly 0 before
its first update, and the engine's log-probabilities are the learner's.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "max_position_embeddings": 256, "initializer_range": 0.2, "moe_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
MLA = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8,
    "q_lora_rank": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": None,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "attn_layer_indices": [1],
}  # fmt: skip
WINDOW = {"sliding_window": 6}

# What each kind needs beside or in the place of SHAPE; None leaves an entry of it out
KINDS: dict[str, dict[str, Any]] = {
    "apertus": {}, "bamba": MAMBA, "biogpt": {}, "bloom": {}, "codegen": GPT | {"rotary_dim": 4}, "cohere": {},
    "cohere2": WINDOW,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                       "moe_jitter_eps": 0.1},
    },
    "deepseek_v2": MLA | {"head_dim": 8}, "deepseek_v3": MLA, "exaone4": {}, "ernie4_5": {},
    "falcon": {"head_dim": None, "attention_dropout": 0.1, "hidden_dropout": 0.1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "falcon_mamba": {}, "gemma": {}, "gemma2": WINDOW,
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}, "glm4": {}, "glm4_moe": {},
    "gpt2": GPT, "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {}, "gpt_oss": WINDOW, "gptj": GPT | {"rotary_dim": 4}, "granite": {}, "granitemoe": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {}, "llama4_text": {}, "mamba": {},
    "mamba2": {"num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}, "mistral": WINDOW,
    "mixtral": {"router_jitter_noise": 0.1}, "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo2": {}, "olmo3": {}, "olmo_hybrid": LINEAR, "olmoe": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "init_std": 0.2, "layerdrop": 0.1},
    "phi": {}, "phi3": {}, "phimoe": {},
    "qwen2": {"vocab_size": 336},  # its tokenizer adds a token
    "qwen2_moe": {"shared_expert_intermediate_size": 32}, "qwen3": {},
    "qwen3_5_text": LINEAR, "qwen3_moe": {}, "qwen3_next": LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}, "rwkv": {},
    "smollm3": {}, "stablelm": {}, "starcoder2": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "init_std": 0.2},
    "zamba2": {
        "layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "mamba_d_state": 8, "n_mamba_heads": 4,
        "mamba_headdim": 16, "mamba_ngroups": 1,
    },
}  # fmt: skip


def build(kind: str, **more: Any):
    """A tiny random causal model of a kind, and a tokenizer that fits it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    options = SHAPE | {"vocab_size": 320} | special | KINDS[kind] | more
    given = {name: value for name, value in options.items() if value is not None or name in special}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval(), tokenizer


def measure(kind: str, folder: Path, data: dict[str, str]) -> dict[str, str]:
    """A row of the table: what each program said of the kind. The folder is left with the runs."""
    from rlhf.engines.hf import cache_is_exact
    from rlhf.runs.tracking import read_metrics

    model, tokenizer = build(kind)
    cells = {"kind": kind, "attention": model.config._attn_implementation}
    cells["sampling"] = "cached" if cache_is_exact(model) else "without cache"
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    small = ["--per_device_train_batch_size", "4", "--max_steps", "2", "--lora_r", "4"]
    ppo = [
        "--reward",
        "[{rule: length, low: 2, high: 9}]",
        "--rollout_batch_size",
        "8",
        "--total_episodes",
        "8",
    ]
    # hardly a response of these models ends, and equal scores would stop PPO
    ppo += ["--missing_eos_score", "none"]
    runs = {
        "sft": ("base", data["instructions"], [*small, "--learning_rate", "1e-2"]),
        "reward": ("sft", data["pairs"], small),
        "dpo": ("sft", data["pairs"], small),
        "ppo": ("sft", data["pairs"], [*ppo, "--per_device_train_batch_size", "4"]),
    }
    first = {}
    for name, (start, rows, flags) in runs.items():
        if name == "ppo" and cells["reward"] == "runs":  # the reward model as a role
            flags = [*flags, "--reward", f"[{{model: {folder / 'reward'}}}]"]
        refusal = run(name, folder / start, rows, folder / name, flags)
        cells[name] = refusal or "runs"
        if not refusal:
            first[name] = {}
            for line in reversed(read_metrics(folder / name / "metrics.jsonl")):
                first[name] |= line
    if "dpo" in first:
        router = getattr(model.config, "router_aux_loss_coef", 0.0) * first["dpo"].get(
            "loss/router", 0.0
        )
        cells["dpo"] = f"{first['dpo']['loss/total'] - router:.6f}"
    if "ppo" in first:
        cells["ppo"] = f"{first['ppo']['kl/sequence']:g}"
        cells["gap"] = f"{first['ppo']['rollout/logprob_gap']:.1e}"
    return cells


def run(name: str, model: Path, data: str, output: Path, flags: list[str]) -> str:
    """Run a program here; returns nothing, or the line with which it refused."""
    from tests.launch.conftest import door, flags_of

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            door(name)([*flags_of(name, model, data, output), *flags])
    except SystemExit as stop:
        return (
            said.getvalue().strip().splitlines()[-1].replace(str(output.parent), "")
            if stop.code
            else ""
        )
    return ""


HEAD = """# Kinds of models, {date}

What the four programs say of {count} kinds of transformers {version}, each a random model of about 40,000 parameters
with a LoRA adapter of rank 4, in float32 on one CPU thread ({seconds:.0f} s of CPU): `python -m tests.kinds PAGE`,
asserted by `make test-slow`. SFT from the base (2 steps and its evaluation by sampling), then from its adapter the
reward model, DPO (2 steps) and PPO (one step, with the reward model as a role where there is one).

- sampling: whether the engine uses the model's cache, or samples without it where cached steps give other logits
- DPO: the first loss less the router's, which is ln 2 = 0.693147
- PPO: the KL before the first update, nats a response, which is exactly 0
- gap: mean |log-probability of the engine - of the learner|, below 1e-5

| kind | attention | sampling | SFT | reward model | DPO | PPO | gap |
|---|---|---|---|---|---|---|---|
"""
COLUMNS = ("kind", "attention", "sampling", "sft", "reward", "dpo", "ppo", "gap")


def page(rows: list[dict[str, str]], seconds: float) -> str:
    """The table as Markdown."""
    import transformers

    head = HEAD.format(
        date=datetime.date.today(),
        count=len(rows),
        version=transformers.__version__,
        seconds=seconds,
    )
    lines = ["| " + " | ".join(row.get(name, "-") for name in COLUMNS) + " |" for row in rows]
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from tests.launch.conftest import write_data

    with tempfile.TemporaryDirectory() as scratch:
        found = [
            measure(kind, Path(scratch) / kind, write_data(Path(scratch))) for kind in sorted(KINDS)
        ]
    Path(sys.argv[1]).write_text(page(found, time.process_time()))
