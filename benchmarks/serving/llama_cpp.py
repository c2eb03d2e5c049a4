"""Run an exported policy in llama.cpp itself and compare it with its run.

    python -m benchmarks.serving.llama_cpp RUN [FILE.gguf ...]     # default: RUN/export/*/*.gguf

llama.cpp comes as the package xllamacpp, fetched by pip into benchmarks/.cache. On ten prompts: are
the prompt's ids those of the run (template and tokenizer), are the greedy tokens, and at how many of
the run's tokens would llama.cpp choose the same?
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.paths import CACHE
from rlhf.export.check import PROMPTS, greedy_answers
from rlhf.model.loading import load_model, trainable_policy
from rlhf.program import program
from rlhf.startup import silence_libraries

PACKAGE = "xllamacpp==2026.10.11549"
PLACE = CACHE / PACKAGE


def fetch() -> None:
    """Install llama.cpp beside the benchmarks, not among the project's packages."""
    if not PLACE.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(PLACE), PACKAGE], check=True)
    sys.path.insert(0, str(PLACE))


class LlamaCpp:
    """A model of a GGUF file behind llama.cpp's own HTTP server, on one thread."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 1024, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.use_jinja, options.warmup, options.port = True, False, 18123
        self.server = xllamacpp.Server(options)

    def ask(self, path: str, **body: object) -> dict:
        """Return the server's answer to a request."""
        url, data = f"{self.server.listening_address}{path}", json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids of a question by the file's own template and tokenizer."""
        question = [{"role": "user", "content": text}]
        prompt = self.ask("/apply-template", messages=question)["prompt"]
        return self.ids(prompt)

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are tokens."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Return up to `count` greedy tokens after these ids."""
        options = {"temperature": 0.0, "top_k": 1, "return_tokens": True, "cache_prompt": True}
        return self.ask("/completion", prompt=ids, n_predict=count, **options)["tokens"]


def measure(file: Path, answers: list) -> dict:
    """Return how llama.cpp answers beside the run."""
    model = LlamaCpp(file)
    same_ids, equal, same, total, gaps = 0, 0, 0, 0, []
    for text, answer in zip(PROMPTS, answers, strict=True):
        ids, tokens = answer.prompt, answer.tokens.tolist()
        same_ids += model.prompt_ids(text) == ids
        own = model.greedy(ids, len(tokens))
        equal += own == tokens
        places = [n for n, pair in enumerate(zip(own, tokens, strict=False)) if pair[0] != pair[1]]
        if places:
            row = answer.logits[places[0]]
            gaps.append(round(float(row[tokens[places[0]]] - row[own[places[0]]]), 4))
        for number in range(len(tokens)):
            chosen = model.greedy([*ids, *tokens[:number]], 1)
            same += chosen == tokens[number : number + 1]
        total += len(tokens)
    return {
        "file": file.name,
        "MiB": round(file.stat().st_size / 2**20, 1),
        "prompts": len(answers),
        "same_ids": same_ids,
        "answers_equal": equal,
        "tokens_equal": same / total,
        "tokens": total,
        "logit_gaps": gaps,
    }


def measured(run: str, files: list[Path]) -> Iterator[tuple[Path, dict]]:
    """Yield each file with how llama.cpp answers from it, beside the run that it was exported from."""
    fetch()
    initial = load_model(run)
    policy = trainable_policy(initial, None).eval()
    answers = greedy_answers(policy, initial.tokenizer, len(PROMPTS))
    del policy
    for file in files:
        yield file, measure(file, answers)


def exports(run: str | Path) -> list[Path]:
    """Return the GGUF files that a run was exported to."""
    return sorted(Path(run).glob("export/*/*.gguf"))


@program
def main() -> None:
    """Print one line of JSON for each file."""
    silence_libraries()
    run, *files = sys.argv[1:]
    for _, found in measured(run, list(map(Path, files)) or exports(run)):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
