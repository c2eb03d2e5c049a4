"""Tiny models made in memory; no network. Every test runs on two threads at most."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(TRANSFORMERS_VERBOSITY="error", WANDB_MODE="offline", DS_ACCELERATOR="cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [
    "where is my parcel? please help me, thank you for your order of a red lamp",
    "we are happy to help. your refund is on its way. kind regards, the team",
    "the blue chair arrived broken and I want to return it today",
]
TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{%- else %}"
    "{{ m['content'] + '<|im_end|>' }}{%- endif %}{{ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


def pytest_configure(config):
    """Hide GPUs from a suite whose numbers are those of a CPU, but with `-m gpu`."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="no CUDA device (make test-gpu)"))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device that a test runs on: it runs on each."""
    import torch

    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory):
    """Runs of fixtures that tests share keep nothing in the user's own cache."""
    os.environ["RLHF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads what another has kept."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", autouse=True)
def freeze():
    """Keep what is loaded out of every later garbage collection: accelerate asks for one at each
    start of a training, and over all of torch, transformers and TRL each took a third of a second.
    """
    gc.collect()
    gc.freeze()


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=512,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(
    vocabulary: int, pad: int, eos: int, seed: int = 0, hidden: int = 32, layers: int = 2
):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=pad,
        eos_token_id=eos,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_path(tokenizer, tmp_path_factory) -> str:
    """A folder with a tiny base model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_adapter(
    base_path: str, folder, seed: int, r: int = 4, alpha: int = 8, identity: bool = True, **settings
) -> str:
    """Write a LoRA adapter with random weights on the base, as a finished SFT run leaves it;
    `settings` are PEFT's.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from rlhf.model.loading import load_model, write_identity

    initial = load_model(base_path)
    torch.manual_seed(seed)
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **settings,
    }
    model = get_peft_model(initial.model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                start = 0.0 if ".lora_A" in name or ".lora_B" in name else parameter
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    initial.tokenizer.save_pretrained(folder)
    if identity:
        write_identity(folder, initial, program="sft")
    return str(folder)


@pytest.fixture(scope="session")
def sft_path(base_path, tmp_path_factory) -> str:
    return random_adapter(base_path, tmp_path_factory.mktemp("sft"), seed=1)


def random_reward(
    base_path: str, folder, seed: int, scale: float = 0.5, bias: float = -0.25, **settings
) -> str:
    """Write a reward model: adapter, score head and reward.json on the base, random weights."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    random_adapter(base_path, folder, seed=seed, **{"r": 2, "alpha": 4, **settings})
    file = Path(folder) / "adapter_model.safetensors"
    weights = load_file(file)
    torch.manual_seed(seed + 1)
    weights["base_model.model.score.weight"] = torch.randn(1, 32)
    save_file(weights, file)
    (Path(folder) / "reward.json").write_text(json.dumps({"scale": scale, "bias": bias}))
    return str(folder)


@pytest.fixture(scope="session")
def reward_path(base_path, tmp_path_factory) -> str:
    """A reward model on the base: scale 0.5, bias -0.25."""
    return random_reward(base_path, tmp_path_factory.mktemp("reward"), seed=2)


@pytest.fixture(scope="session")
def whole_reward_path(base_path, tmp_path_factory) -> str:
    """A reward model of whole weights, none of which are the base's: scale 0.5, bias -0.25."""
    import torch

    from reward.model import trainable_reward, write_reward
    from rlhf.model.loading import load_model

    folder, initial = str(tmp_path_factory.mktemp("whole")), load_model(base_path)
    torch.manual_seed(3)
    model = trainable_reward(initial, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    initial.tokenizer.save_pretrained(folder)
    write_reward(folder, -0.25, 0.5)
    return folder


@pytest.fixture(scope="session")
def member_paths(base_path, reward_path, tmp_path_factory) -> list[str]:
    """Three reward models on one base, of unlike ranks, scales and kinds of adapted weights."""
    folder = tmp_path_factory.mktemp("members")
    more = {"modules_to_save": ["norm"], "trainable_token_indices": [2]}
    second = random_reward(base_path, folder / "second", seed=4, scale=2.0, bias=1.0, **more)
    third = random_reward(base_path, folder / "third", seed=6, r=3, target_modules=["q_proj"])
    return [reward_path, second, third]


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    """Let each test see the notices that are printed once."""
    monkeypatch.setattr("rlhf.text._SAID", set())
