"""The sandbox's own base model: a byte-level BPE tokenizer with a chat template, and a small
pretrained Qwen3.

It is saved as any Hub model is, so that every stage reads it by its folder.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAD, START, END, DOCUMENT_END = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
# '\n' is written inside {{ }}: a literal one after a {% tag %} would be dropped (trim_blocks)
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{ m['content'] + '<|im_end|>' }}{%- endif %}{{ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class BaseConfig:
    """Shape of the base and its pretraining; part of its fingerprint."""

    vocab_size: int = 1024
    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 256
    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 4e-3
    muon_learning_rate: float = 0.02
    # what customers say is drawn at random: little to learn, much noise in the gradient
    prompt_weight: float = 0.1
    seed: int = 0


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`; pad, end of turn and end of document are
    tokens of their own.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenizer_texts(documents: list) -> list[str]:
    """Return the first 5,000 documents as texts; a list of messages is one of its contents."""
    texts = []
    for document in documents[:5000]:
        if not isinstance(document, str):
            document = "\n".join(message["content"] for message in document)
        texts.append(document)
    return texts


def make_model(tokenizer, config: BaseConfig):
    """A Qwen3 with tied embeddings and random weights drawn from `config.seed`, float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = Qwen3Config(
        vocab_size=config.vocab_size,  # also where the corpus fills fewer
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Qwen3ForCausalLM(shape)


@dataclass(frozen=True)
class Row:
    """A document's token ids; the first `prompt` of them are the customer's and count
    `prompt_weight` in the loss.
    """

    ids: list[int]
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer, documents: list) -> list[Row]:
    """Each document's row: a list of messages goes through the chat template, a string ends the
    document.
    """
    rows = []
    for document in documents:
        if isinstance(document, str):
            rows.append(Row(tokenizer(document + DOCUMENT_END, add_special_tokens=False).input_ids))
            continue
        text = tokenizer.apply_chat_template(document, tokenize=False)
        head = tokenizer.apply_chat_template(
            document[:-1], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(head, add_special_tokens=False).input_ids
        # tokenized apart, as every later stage does it
        rows.append(
            Row(
                prompt + tokenizer(text[len(head) :], add_special_tokens=False).input_ids,
                len(prompt),
            )
        )
    return rows


def batches(rows: list[Row], batch_size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Batches of rows of nearly equal length, in random order, once through `rows`; a short last
    batch is left out.
    """
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool = 32 * batch_size
    for start in range(0, len(order), pool):
        chunk = sorted(order[start : start + pool], key=lambda i: len(rows[i]))
        cuts = list(range(0, len(chunk) - batch_size + 1, batch_size))
        rng.shuffle(cuts)
        for cut in cuts:
            yield [rows[i] for i in chunk[cut : cut + batch_size]]


def language_loss(model, batch: list[Row], pad_id: int, prompt_weight: float):
    """Weighted mean cross-entropy per token (nats) of a right-padded batch, and the sum of its
    weights.

    A prompt's tokens weigh `prompt_weight`, all others 1, padding 0.
    """
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([r.ids + [pad_id] * (width - len(r)) for r in batch])
    weights = torch.tensor(
        [
            [prompt_weight] * r.prompt + [1.0] * (len(r) - r.prompt) + [0.0] * (width - len(r))
            for r in batch
        ]
    )[:, 1:]
    # causal attention never looks right, so right padding needs no mask, and no mask is faster
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    total = weights.sum()
    return (losses.view_as(weights) * weights).sum() / total, total.item()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then cosine down to a fiftieth of `peak`."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(
    model, tokenizer, rows: list[Row], held_out: list[Row], config: BaseConfig
) -> dict[str, float]:
    """Train on `rows` for `config.steps` steps; returns the losses, tokens and seconds it took.

    Muon (Jordan et al. 2024) for the matrices inside, AdamW for embeddings and norms: measured
    here, AdamW alone takes twice the steps until the model copies what the customer names. Goes
    through `rows` again where they do not suffice. The same seed, settings and thread count give
    the same weights.
    """
    import torch
    from tqdm import tqdm

    if len(rows) < config.batch_size:
        raise ValueError(f"{len(rows)} rows do not fill one batch of {config.batch_size}")
    rng = random.Random(f"pretrain {config.seed}")
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = {
        "hidden": torch.optim.Muon(
            hidden, lr=config.muon_learning_rate, momentum=0.95, weight_decay=0.0
        ),
        "others": torch.optim.AdamW(
            others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        ),
    }
    peaks = {"hidden": config.muon_learning_rate, "others": config.learning_rate}
    started, tokens, loss = time.perf_counter(), 0, math.nan
    model.train()
    source: Iterator[list[Row]] = iter(())
    progress = tqdm(range(config.steps), desc="pretraining the base", unit="step", mininterval=5)
    for step in progress:
        batch = next(source, None)
        if batch is None:
            source = batches(rows, config.batch_size, rng)
            batch = next(source)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, peaks[name])
        value, _ = language_loss(model, batch, tokenizer.pad_token_id, config.prompt_weight)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += sum(map(len, batch))
        if step % 50 == 0 or step == config.steps - 1:
            loss = value.item()
            progress.set_postfix(loss=f"{loss:.3f}")
    seconds = time.perf_counter() - started
    return {
        "loss/train": loss,
        "loss/held_out": evaluate(model, tokenizer, held_out, config.batch_size),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "seconds": seconds,
    }


def evaluate(model, tokenizer, rows: list[Row], batch_size: int) -> float:
    """Mean cross-entropy per token (nats) of all answers and plain sentences; prompts do not count."""
    import torch

    was_training = model.training
    model.eval()
    total, count = 0.0, 0.0
    ordered = sorted(rows, key=len)
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            loss, n = language_loss(
                model, ordered[start : start + batch_size], tokenizer.pad_token_id, 0.0
            )
            total, count = total + loss.item() * n, count + n
    model.train(was_training)
    return total / max(1.0, count)


def train_base(
    documents: list, held_out: list, config: BaseConfig, folder: Path
) -> dict[str, float]:
    """Train tokenizer and model on `documents`, write both into `folder`, and return what
    `pretrain` measured.
    """
    tokenizer = train_tokenizer(tokenizer_texts(documents), config.vocab_size)
    model = make_model(tokenizer, config)
    measured = pretrain(
        model, tokenizer, encode(tokenizer, documents), encode(tokenizer, held_out), config
    )
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return measured
