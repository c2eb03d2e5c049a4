"""Start `rlhf serve` on runs of one base and hold its answers against the project's plain sampler.

    python -m benchmarks.serving.served RUN RUN ...     # prints a session in Markdown; needs the openai client

Greedy answers to ten questions of each model by name, one by one, streamed, and all at once from
twelve threads; and the CPU seconds that the server takes for sampled answers in each of the two ways.
"""

import concurrent.futures
import itertools
import sys
from pathlib import Path

import openai
import psutil
import torch

from benchmarks.programs import serving
from rlhf.compare.runs import load_policies
from rlhf.data.encode import decode_response, encode_prompt
from rlhf.engines import hf
from rlhf.engines.sampling import Sampling
from rlhf.export.check import NEW_TOKENS, PROMPTS
from rlhf.model.tokenizer import load_tokenizer, stop_ids
from rlhf.program import program
from rlhf.serve.policies import load
from rlhf.startup import silence_libraries

THREADS, ROUNDS = 12, 3


def asked_of(model: str, question: str, **more) -> dict:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": NEW_TOKENS, **more}


def plain_answers(runs: list[str]) -> dict[tuple[str, str], str]:
    """Return what the plain sampler answers greedily: (name, question) -> text."""
    answers = {}
    policies = load_policies(runs, torch.device("cpu"), 1, 1)
    for run, (model, context) in zip(runs, policies, strict=True):
        tokenizer = load_tokenizer(run)
        for question in PROMPTS:
            prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}])
            greedy = Sampling(NEW_TOKENS, 0.0)
            with context():
                stops = stop_ids(tokenizer, model)
                done = hf.generate(model, [prompt], [0], greedy, stops, tokenizer.pad_token_id)
            answers[Path(run).name, question] = decode_response(tokenizer, done.response_ids[0])
    return answers


def text_of(client: openai.OpenAI, asked: dict) -> str:
    return client.chat.completions.create(**asked).choices[0].message.content


def streamed(client: openai.OpenAI, asked: dict) -> str:
    chunks = client.chat.completions.create(**asked, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def at_once(client: openai.OpenAI, requests: list[dict]) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda asked: text_of(client, asked), requests))


def one_by_one(client: openai.OpenAI, requests: list[dict]) -> list[str]:
    return [text_of(client, asked) for asked in requests]


def cpu_ratios(client: openai.OpenAI, server: psutil.Process, names: list[str]) -> list[float]:
    """Return the server's CPU seconds for requests one by one over those for the same at once."""
    pairs = itertools.product(names, PROMPTS)
    requests = [asked_of(name, question, seed=1) for name, question in pairs]

    def seconds(way) -> tuple[float, list[str]]:
        before = sum(server.cpu_times()[:2])
        texts = way(client, requests)
        return sum(server.cpu_times()[:2]) - before, texts

    ratios = []
    for _ in range(ROUNDS):
        alone, texts = seconds(one_by_one)
        together, same = seconds(at_once)
        assert texts == same, "an answer depended on its batch"
        ratios.append(alone / together)
    return ratios


@program
def main() -> None:
    silence_libraries()
    runs = sys.argv[1:]
    base = next(policy for policy in load(runs[:1], with_bases=True) if policy.base is None)
    expected = plain_answers(runs)
    with serving(runs) as (client, process):
        names = [card.id for card in client.models.list()]
        print("models:", ", ".join(names))

        keys = list(expected)
        requests = [asked_of(name, question, temperature=0) for name, question in keys]
        ways = {
            "one by one": one_by_one(client, requests),
            "streamed": [streamed(client, asked) for asked in requests],
            f"at once, {THREADS} threads": at_once(client, requests),
        }
        for way, texts in ways.items():
            equal = sum(text == expected[key] for text, key in zip(texts, keys, strict=True))
            print(f"{way}: {equal} of {len(keys)} greedy answers are the plain sampler's")
        different = 0
        for question in PROMPTS:
            answers = {expected[Path(run).name, question] for run in runs}
            answers.add(text_of(client, asked_of(base.name, question, temperature=0)))
            different += len(answers) == len(names)
        print(f"{different} of {len(PROMPTS)} questions get another answer of each model")

        ratios = cpu_ratios(client, psutil.Process(process), names)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"server's CPU time, one by one over at once: {spread} in {ROUNDS} rounds")

        question = PROMPTS[2]
        print(f"\n> {question}\n")
        for name in names:
            print(f"[{name}] {text_of(client, asked_of(name, question, temperature=0))}\n")
        try:
            client.chat.completions.create(**asked_of("policy", question))
        except openai.NotFoundError as error:
            print(error.body)


if __name__ == "__main__":
    main()
