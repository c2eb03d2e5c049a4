"""Faults that people make, over the programs and the command line: what is wrong, and the words that
its message must have, of its place and its remedy.
"""

import re
import shlex
import sys
from typing import NamedTuple

from tests.conftest import ROOT

# a start that is whole: each fault's own flags come after it and win
START = "--max_prompt_length 64 --max_response_length 16 --eval_prompts 0 --max_steps 1 --lora_r 2"
WHOLE = {
    "sft": f"--model_name_or_path model --data rows.jsonl --output_dir out {START}",
    "reward": f"--model_name_or_path sft --data pairs.jsonl --output_dir out {START}".replace(
        "--eval_prompts 0 ", ""
    ),
    "dpo": f"--model_name_or_path sft --data pairs.jsonl --output_dir out {START}",
    "ppo": "--model_name_or_path sft --data pairs.jsonl --output_dir out --reward '[{model: reward}]' "
    "--max_prompt_length 64 --max_response_length 16 --eval_prompts 0 --total_episodes 4 "
    "--rollout_batch_size 4 --per_device_train_batch_size 4",
}


class Fault(NamedTuple):
    """One fault: the program or `rlhf` command, the flags that are wrong, words of its message.

    `environment` is set around it. `loads` says that torch is needed to see it.
    """

    program: str
    flags: str
    words: tuple[str, ...]
    environment: dict[str, str]
    loads: bool

    @property
    def name(self) -> str:
        given = " ".join(f"{k}={v}" for k, v in self.environment.items())
        return f"{given} {self.program} {self.flags}".strip()[:90]


def fault(program: str, flags: str, *words: str, loads: bool = False, **environment: str) -> Fault:
    return Fault(program, flags, words, environment, loads)


CLOSED = "http://127.0.0.1:9"
DATA = [
    fault("sft", "--data row.jsonl", "row.jsonl: no such file", "Did you mean rows.jsonl"),
    fault("dpo", "--data nowhere.jsonl", "nowhere.jsonl: is a symbolic link to", "leads to no file"),
    fault("reward", "--data model", "model: is a folder; give a file in it"),
    fault("ppo", "--data pipe.jsonl", "pipe.jsonl: is a pipe or a device", "write it into a file"),
    fault("sft", "--data empty.jsonl", "empty.jsonl: no row to read"),
    fault("sft", "--data cut.jsonl", "cut.jsonl line 41 column", "--on_error skip"),
    fault("sft", "--data list.jsonl", "list.jsonl", "found list, expected an object"),
    fault("sft", "--data one.json", "one.json: found dict, expected a list of rows"),
    fault("sft", "--data deep.json", "deep.json: not valid JSON: nested too deep"),
    fault("sft", "--data wide.csv", "wide.csv row 1: found 2 cells more", "--on_error skip"),
    fault("sft", "--data garbage.parquet", "garbage.parquet: cannot be read as Parquet"),
    fault("sft", "--data table.xlsx", "table.xlsx: cannot read '.xlsx' files; expected one of .jsonl"),
    fault("sft", "--data utf16.jsonl", "utf16.jsonl: is not UTF-8 text", "save it as UTF-8"),
    fault("dpo", "--data latin.jsonl", "latin.jsonl: is not UTF-8 text", "save it as UTF-8"),
    fault("sft", "--data cut.jsonl.gz", "cut.jsonl.gz: is not a whole .gz", "compress it again"),
    fault("sft", "--data twice.jsonl.gz", "twice.jsonl.gz: is compressed twice; unpack it once"),
    fault("sft", "--data packed.jsonl", "packed.jsonl: is compressed; name it packed.jsonl.gz"),
    fault("reward", "--data rows.jsonl", "rows.jsonl: found columns prompt, response", "look like Instruction"),
    fault("dpo", "--data rows.jsonl", "rows.jsonl: found columns prompt, response", "expected for Preference"),
    fault("reward", "--data same.jsonl", "same.jsonl row 41: 'chosen' and 'rejected' are the same", "--on_error skip"),
    fault("sft", "--data nocolumn.jsonl", "nocolumn.jsonl: found columns question, reply; expected"),
    fault("sft", "--data number.jsonl", "number.jsonl row 1", "expected"),
    fault("sft", "--data twosplits.jsonl", "twosplits.jsonl", "group", "split"),
    fault("dpo", "--data empty.db", "empty.db", "preference store"),
    fault("reward", "--data garbage.db", "garbage.db: cannot be opened as a preference store"),
    fault("dpo", "--data votes.db", "votes.db: no such"),
    fault("dpo", "--data pairs.jsonl,nope/none", "nope/none: neither a file here nor a data set"),
    fault("sft", "--eval_prompts 2 --eval_data nope.jsonl", "nope.jsonl: no such file"),
    fault("reward", "--reference_data nope.jsonl", "nope.jsonl: no such file"),
    fault("ppo", "--ptx_coef 1 --ptx_data nope.jsonl", "nope.jsonl: no such file"),
    fault("sft", "--data earlier/rows.jsonl --output_dir earlier", "inside output_dir earlier", "another --output_dir"),
    fault("sft", "--max_response_length 1", "rows.jsonl: 29 of 29", "raise the limits", loads=True),
]  # fmt: skip
OPTIONS = [
    fault("sft", "--config nope.yaml", "nope.yaml: no such file"),
    fault("sft", "--config bad.yaml", "bad.yaml line 2: not valid YAML"),
    fault("dpo", "--config twice.yaml", "twice.yaml line 2: not valid YAML: 'seed' is given twice"),
    fault("reward", "--config list.yaml", "list.yaml: expected 'option: value' lines, found list"),
    fault("ppo", "--config latin.yaml", "latin.yaml: not UTF-8 text (byte 11)", "save it as UTF-8"),
    fault("sft", "--config deep.yaml", "deep.yaml: not usable YAML: nested too deeply"),
    fault("sft", "--config typo.yaml", "typo.yaml: unknown option 'learning_rat'", "Did you mean 'learning_rate'"),
    fault("sft", "--config type.yaml", "type.yaml: option 'logging_steps': expected a whole number, found 'often'"),
    fault("sft", "--learning_rate -1", "--learning_rate: 'learning_rate' is -1.0, expected more than 0"),
    fault("dpo", "--beta nan", "--beta: 'beta' is nan"),
    fault("dpo", "--betta 0.1", "unknown option 'betta'", "Did you mean 'beta'", "--help"),
    fault("dpo", "--beta", "option '--beta' needs a value"),
    fault("sft", "stray", "found 'stray' where an option was expected"),
    fault("sft", "--max_steps 0", "'max_steps' is 0, expected -1 (by epochs) or at least 1"),
    fault("sft", "--lr_scheduler_type cosin", "found 'cosin', expected one of linear", "Did you mean 'cosine'"),
    fault("sft", "--attn_implementation spda", "'attn_implementation' is 'spda'", "Did you mean 'sdpa'"),
    fault("ppo", "--attn_implementation flash_attention_2", "package flash_attn is not installed",
          "--attn_implementation sdpa"),
    fault("sft", "--lora_target_modules q_prj", "no layer is called 'q_prj'", "Did you mean 'q_proj'", loads=True),
    fault("sft", "--lora_dropout 1", "'lora_dropout' is 1.0, expected at least 0 and less than 1"),
    fault("sft", "--merge true --use_peft false", "'merge' is true but 'use_peft' is false"),
    fault("sft", "--load_in_4bit true --load_in_8bit true", "'load_in_4bit' and 'load_in_8bit' are both true"),
    fault("sft", "--guards {divergense: off}", "unknown guard 'divergense'", "Did you mean 'divergence'"),
    fault("dpo", "--guards {divergence: rollback}", "guards.divergence", "cannot be rollback", "off, warn, stop"),
    fault("ppo", "--guards {max_kl: {treshold: 3}}", "guards.max_kl: unknown key 'treshold'",
          "Did you mean 'threshold'"),
    fault("sft", "--max_response_length 4000", "= 4064 tokens, but model has positions for 512", "Lower one"),
    fault("dpo", "--loss_type hinge --label_smoothing 0.1", "'label_smoothing' has no effect on loss_type hinge"),
    fault("sft", "--validation_fraction 0.6 --test_fraction 0.6", "leave nothing to train on", "sum must be below 1"),
    fault("ppo", "--num_mini_batches 8", "'num_mini_batches' is 8, more than the 4 responses", "Lower it"),
    fault("reward", "--early_stopping_patience 2", "'early_stopping_patience' needs evaluations", "--eval_steps 50"),
    fault("ppo", "--reward [{model: reward, wieght: 1}]", "unknown key 'wieght'", "Did you mean 'weight'"),
    fault("ppo", "--reward [{rule: lenght}]", "unknown rule 'lenght'. Did you mean 'length'"),
    fault("ppo", "--reward [{function: nomodule:f}]", "there is no module 'nomodule'"),
    fault("ppo", "--reward [{voice: nope.yaml}]", "nope.yaml: no such file", "Did you mean type.yaml"),
    fault("dpo", "--eval_scorers [{voice: voice.yaml}]", "voice.yaml", "rules"),
    fault("ppo", "--guards {hacking: {watch: gold}}", "'gold' is not a score of this run", "Scorers: reward"),
    fault("sft", "--trl {packin: true}", "trl: 'packin' is no option of SFTConfig", "Did you mean 'packing'"),
    fault("sft", "--trl {seed: 1}", "trl: 'seed' is an option of this program: --seed 1"),
    fault("sft", "--trl {push_to_hub: true}", "'push_to_hub' is not handed on", "rlhf export RUN"),
    fault("dpo", "--trl {save_strategy: epoch}", "'save_strategy' is not handed on", "save_steps"),
    fault("reward", "--trl {fsdp: full_shard}", "'fsdp' is not handed on", "--deepspeed"),
    fault("sft", "--trl {use_liger_kernel: true}", "use_liger_kernel", "pip install liger-kernel"),
    fault("sft", "--trl {loss_type: nope}", "(trl: loss_type)", "Supported values are 'nll'", loads=True),
    fault("sft", "--trl {dataloader_persistent_workers: true}", "needs num_workers > 0", "--debug", loads=True),
    fault("dpo", "--trl {f_divergence_type: nope}", "f_divergence_type", loads=True),
    fault("sft", "--optim nope", "'optim' is 'nope', expected one of adamw, ", "adafactor"),
]  # fmt: skip
MODELS = [
    fault("sft", "--model_name_or_path ./modl", "./modl: no such folder", "Did you mean model"),
    fault("ppo", "--model_name_or_path runs/sft", "runs/sft: no such folder"),
    fault("dpo", "--model_name_or_path org/nope", "org/nope: neither a folder here", "HF_HUB_OFFLINE is set",
          "hf download org/nope"),
    fault("sft", "--model_name_or_path afile", "afile: is a file; a model is a folder, or a .gguf file"),
    fault("reward", "--model_name_or_path m-empty", "m-empty: no tokenizer files"),
    fault("sft", "--model_name_or_path m-cut", "m-cut/model.safetensors: the weights cannot be read",
          "Copy or save them again"),
    fault("dpo", "--model_name_or_path m-zero", "m-zero/model.safetensors: the weights cannot be read"),
    fault("sft", "--model_name_or_path m-noweights", "model.safetensors is not. Copy it again"),
    fault("sft", "--model_name_or_path m-shard", "names model-00001-of-00002.safetensors, which is not there"),
    fault("sft", "--model_name_or_path m-config", "m-config/config.json: cannot be read as JSON",
          "Save or copy it again"),
    fault("sft", "--model_name_or_path m-type", "m-type/config.json: names no 'model_type'", "Save the model again"),
    fault("sft", "--model_name_or_path m-unknown", "'model_type' is nope", "pip install --upgrade transformers"),
    fault("sft", "--model_name_or_path m-size", "m-size: its tensors do not fit", "of another shape", loads=True),
    fault("sft", "--model_name_or_path m-quantized", "quantised already (gptq)", "load_in_4bit"),
    fault("ppo", "--model_name_or_path m-notokenizer", "no tokenizer files; save the tokenizer beside the weights"),
    fault("sft", "--model_name_or_path m-tokenizer", "tokenizer.json: cannot be read as JSON"),
    fault("sft", "--model_name_or_path m-template", "m-template: no chat template could be loaded"),
    fault("sft", "--model_name_or_path m-nan", "not finite (NaN or infinity)", "Take an earlier checkpoint",
          loads=True),
    fault("sft", "--model_name_or_path m-tensor", "2 missing", "belong to another config.json", loads=True),
    fault("dpo", "--model_name_or_path m-prefix", "saved through a wrapper (torch.compile, DDP)"),
    fault("sft", "--model_name_or_path m-pickle", "could run code; save the weights as safetensors", loads=True),
    fault("sft", "--model_name_or_path nope.gguf", "nope.gguf: no such file"),
    fault("sft", "--model_name_or_path two.gguf/a.gguf", "a.gguf: no GGUF file could be loaded", "Fetch or convert it"),
    fault("sft", "--model_name_or_path garbage.gguf", "garbage.gguf: no GGUF file could be loaded"),
]  # fmt: skip
ADAPTERS = [
    fault("dpo", "--model_name_or_path a-config", "a-config/adapter_config.json: cannot be read as JSON",
          "copy it again"),
    fault("sft", "--model_name_or_path a-cut", "a-cut/adapter_model.safetensors: the weights cannot be read"),
    fault("ppo", "--model_name_or_path a-noweights", "a-noweights: adapter_config.json is there", "Copy it again"),
    fault("dpo", "--model_name_or_path a-nan", "not finite (NaN or infinity)", "Take an earlier checkpoint"),
    fault("dpo", "--model_name_or_path a-tensor", "a-tensor: its weights do not fit", "Copy it again"),
    fault("dpo", "--model_name_or_path a-identity", "a-identity/rlhf.json: cannot be read as JSON"),
    fault("dpo", "--model_name_or_path a-otherbase", "trained on a base with fingerprint 0000",
          "Point 'base_model_name_or_path'", loads=True),
    fault("dpo", "--model_name_or_path a-nobase", "./gone: no such folder", "'base_model_name_or_path' of a-nobase"),
    fault("dpo", "--model_name_or_path a-prefix_tuning", "'peft_type' is PREFIX_TUNING",
          "Train a LoRA adapter instead"),
    fault("sft", "--model_name_or_path a-prompt_tuning", "'peft_type' is PROMPT_TUNING", "LoRA"),
    fault("ppo", "--model_name_or_path a-p_tuning", "'peft_type' is P_TUNING", "LoRA"),
    fault("dpo", "--model_name_or_path a-xlora", "'peft_type' is XLORA", "LoRA"),
    fault("dpo", "--model_name_or_path a-nope", "'peft_type' is NOPE", "pip install --upgrade peft"),
    fault("sft", "--model_name_or_path reward", "reward: a reward model, not a policy", "Start from a base model"),
    fault("dpo", "--model_name_or_path a-critic", "the critic of a PPO run"),
    fault("dpo", "--use_peft false", "use_peft is false, but sft is an adapter", "--merge true"),
    fault("ppo", "--reward [{model: sft}]", "sft: this adapter has no score head", "deepspeed launch/reward.py"),
    fault("ppo", "--reward [{model: model}]", "LlamaForCausalLM is not a reward model", "deepspeed launch/reward.py"),
    fault("ppo", "--reward [{model: rewrd}]", "rewrd: neither a folder here", "Did you mean reward?"),
    fault("ppo", "--reward [{model: r-settings}]", "r-settings/reward.json: cannot be read as JSON"),
    fault("ppo", "--reward [{model: r-scale}]", "reward.json: scale 0"),
]  # fmt: skip
PLACES = [
    fault("sft", "", "WORLD_SIZE is 'abc', expected a whole number", "deepspeed", RANK="0", WORLD_SIZE="abc"),
    fault("dpo", "", "WORLD_SIZE is 2, but MASTER_ADDR", "torchrun", RANK="0", WORLD_SIZE="2"),
    fault("ppo", "", "RANK is 5, but WORLD_SIZE is 1", "ranks count from 0", RANK="5", WORLD_SIZE="1"),
    fault("sft", "--output_dir afile", "afile is not a folder. Choose another --output_dir"),
    fault("reward", "--output_dir afile/out", "afile is not a folder. Choose another --output_dir"),
    fault("dpo", "--output_dir /proc/out", "/proc/out: nothing can be written there", "Choose another place"),
    fault("sft", "--resume earlier/checkpoints/checkpoint-8", "no checkpoint to resume from",
          "Did you mean earlier/checkpoints/checkpoint-1"),
    fault("sft", "--output_dir earlier --learning_rate 3e-3", "learning_rate: was", "--overwrite_output_dir true"),
    fault("dpo", "--resume earlier/checkpoints/checkpoint-1", "is a checkpoint of 'sft', not of 'dpo'",
          "another --output_dir or --resume"),
    fault("sft", "--vllm_url " + CLOSED, "vllm_url (http://127.0.0.1:9/v1/models) did not respond",
          "Check that the service runs"),
    fault("sft", "--vllm_url 127.0.0.1:9", "'vllm_url'", "http"),
    fault("ppo", "--reward [{http: 'http://127.0.0.1:9/?api_key=x'}]", "api_key", "${"),
    fault("ppo", "--reward [{http: 'http://127.0.0.1:9', token_env: NO_TOKEN}]", "NO_TOKEN is not set", "Set it:"),
]  # fmt: skip
COMMANDS = [
    fault("rlhf", "comprae a b", "unknown command 'comprae a'", "Did you mean", "rlhf --help"),
    fault("rlhf", "data show nope.jsonl", "nope.jsonl: no such file", "Did you mean pipe.jsonl"),
    fault("rlhf", "data show garbage.db", "garbage.db: cannot be opened as a preference store"),
    fault("rlhf", "data prepare cut.jsonl.gz --output new.jsonl", "cut.jsonl.gz: is not a whole .gz"),
    fault("rlhf", "data export pairs.jsonl --form nope --output new.jsonl", "found 'nope', expected one of rows"),
    fault("rlhf", "data export pairs.jsonl --output none/new.jsonl", "its folder none does not exist; make it first"),
    fault("rlhf", "data export pairs.jsonl --output /proc/new.jsonl", "/proc/new.jsonl: cannot be written"),
    fault("rlhf", "collect status nope.db", "nope.db: no such"),
    fault("rlhf", "collect serve garbage.db", "garbage.db: cannot be opened as a preference store"),
    fault("rlhf", "collect sample --model_name_or_path m-cut --data rows.jsonl --store new.db",
          "m-cut/model.safetensors: the weights cannot be read"),
    fault("rlhf", "collect sample --data rows.jsonl --store new.db", "give either 'model_name_or_path'"),
    fault("rlhf", "collect sample --model_name_or_path reward --data rows.jsonl --store new.db",
          "reward: a reward model, not a policy"),
    fault("rlhf", "collect links nope.db --annotators ann", "nope.db: no such"),
    fault("rlhf", "collect import nope.csv --store new.db", "nope.csv: no such file"),
    fault("rlhf", "reward card nope --output_dir card", "nope: neither a folder here nor a model"),
    fault("rlhf", "reward card sft", "sft: this adapter has no score head", "deepspeed launch/reward.py"),
    fault("rlhf", "reward learning-curve reward", "reward: has no config.yaml, so it is not the folder of a run"),
    fault("rlhf", "reward cross-validate nope.yaml", "nope.yaml: no such file"),
    fault("rlhf", "compare sft --prompts pairs.jsonl", "needs at least two runs"),
    fault("rlhf", "compare sft ./nope --prompts pairs.jsonl", "nope: no such run"),
    fault("rlhf", "compare sft a-cut --prompts pairs.jsonl",
          "a-cut/adapter_model.safetensors: the weights cannot be read"),
    fault("rlhf", "export a-prefix_tuning --to merged", "'peft_type' is PREFIX_TUNING"),
    fault("rlhf", "export sft --to guff", "found 'guff'", "Did you mean 'gguf'"),
    fault("rlhf", "export sft --to merged --out model", "model: exists already", "another --out"),
    fault("rlhf", "chat ./nope", "./nope: no such folder"),
    fault("rlhf", "serve m-config", "m-config/config.json: cannot be read as JSON"),
    fault("rlhf", "serve sft --host 0.0.0.0", "'host' is 0.0.0.0", "--api_key_env"),
    fault("rlhf", "voice check voice.yaml", "voice.yaml, voice: unknown key 'rules'", "Did you mean"),
    fault("rlhf", "voice check voice.yaml --model_name_or_path ./modl --data rows.jsonl", "./modl: no such folder",
          "Did you mean model"),
    fault("rlhf", "voice score hello --voice nope.yaml", "nope.yaml: no such file"),
    fault("rlhf", "brand run brand.yaml", "brand.yaml: 'model_name_or_path'", "rlhf brand run --help"),
    fault("rlhf", "experiment run nope.yaml", "nope.yaml: no such file"),
    fault("rlhf", "experiment run experiment.yaml", "experiment.yaml", "nope"),
    fault("rlhf", "experiment report model", "model: no experiment here", "rlhf experiment run FILE"),
    fault("rlhf", "judge pairs pairs.jsonl --judge {openai: nope, model: x}",
          "judge: the URL is 'nope', expected http://HOST"),
    fault("rlhf", "sandbox build --output_dir afile", "afile: nothing can be written there", "Choose another"),
    fault("rlhf", "sandbox annotate --store nope.db", "nope.db"),
]  # fmt: skip
FAULTS = [*DATA, *OPTIONS, *MODELS, *ADAPTERS, *PLACES, *COMMANDS]


def arguments(given: Fault) -> list[str]:
    """Return the words of the command line; those in braces and brackets are one."""
    start = shlex.split(WHOLE.get(given.program, ""))
    # blanks outside of brackets part the words
    return [*start, *re.findall(r"(?:\[.*\]|\{.*\}|\S)+", given.flags)]


def command(given: Fault) -> list[str]:
    """Return the command that a person gives."""
    start = ["-m", "rlhf.cli"]
    if given.program != "rlhf":
        start = [str(ROOT / "launch" / f"{given.program}.py")]
    return [sys.executable, *start, *arguments(given)]
