"""The client of a vLLM server, held against the plain engine through a local server of the same
protocol (`tests/engines/vllm_server.py`).
"""

import itertools
import json
import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rlhf.http_client
from rlhf.engines import hf
from rlhf.engines.sampling import Sampling, restrict
from rlhf.engines.vllm import VllmEngine, logprob_gap
from rlhf.errors import UserError
from rlhf.model.adapters import load_adapter, use_adapter
from rlhf.model.loading import load_model
from rlhf.options.ppo import PPOConfig
from rlhf.ranks.distributed import DistributedContext
from tests.conftest import random_adapter
from tests.engines.test_contract import PROMPTS, STOPS, assert_same, sample
from tests.engines.vllm_server import Server
from tests.launch.conftest import SMALL, door, flags_of, write_data
from tests.ppo.test_trainer import config as ppo_config
from tests.ppo.test_trainer import trainer

GREEDY = Sampling(max_new_tokens=10, temperature=0.0)


@pytest.fixture
def server(base_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(rlhf.http_client, "FIRST_WAIT", 0.01)
    server = Server(base_path)
    # what engines want to be called when the program ends
    server.at_exit = []
    at_exit = SimpleNamespace(register=server.at_exit.append)
    monkeypatch.setattr("rlhf.engines.vllm.atexit", at_exit)
    yield server
    server.stop()


@pytest.fixture
def engine(server, base_path, tmp_path):
    return VllmEngine(server.url, tmp_path / "vllm", base_path)


@pytest.fixture
def files(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def model(sft_path, base_path, tmp_path):
    """Two adapters on the base, "policy" and "other"."""
    other = random_adapter(base_path, tmp_path / "other", seed=5)
    model = load_adapter(load_model(base_path).model, sft_path, name="policy")
    return load_adapter(model, other, name="other").eval()


def negate(model):
    """Turn the policy's adapter into another one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.policy" in name:
                parameter.mul_(-1)


def refused(engine, model, **more):
    with pytest.raises(UserError) as caught:
        sample(engine, model, **more)
    return str(caught.value)


# the contract of all engines, where a server can keep it


def test_the_active_adapter_is_the_one_that_samples(engine, model, server):
    answers = []
    for name in ("policy", "other", None, "policy"):
        with use_adapter(model, name):
            expected = sample(hf.generate, model, sampling=GREEDY)
            assert_same(sample(engine, model, sampling=GREEDY), expected)
            answers.append(expected.response_ids)
    assert answers[0] == answers[3]
    assert answers[0] != answers[1] and answers[1] != answers[2] and answers[0] != answers[2]
    models = [body["model"] for body in server.bodies("/v1/completions")]
    assert len(dict.fromkeys(models)) == 4 and server.base in models


def test_a_changed_adapter_is_handed_over_under_a_new_name_and_the_old_one_removed(
    engine, model, server
):
    first = sample(engine, model, sampling=GREEDY)
    sample(engine, model, sampling=GREEDY)
    (old,) = server.adapters
    assert [p.name for p in engine.folder.iterdir()] == [old]
    negate(model)
    second = sample(engine, model, sampling=GREEDY)
    assert second.response_ids != first.response_ids
    assert_same(second, sample(hf.generate, model, sampling=GREEDY))
    # twice the same weights are handed over once
    loaded = [body["lora_name"] for body in server.bodies("/v1/load_lora_adapter")]
    assert len(loaded) == 2 and loaded[0] == old and list(server.adapters) == loaded[1:]
    assert [p.name for p in engine.folder.iterdir()] == loaded[1:]
    (close,) = server.at_exit
    close()
    assert not server.adapters and not engine.folder.exists()


def test_two_runs_share_a_server(engine, model, server, base_path, tmp_path):
    other = VllmEngine(server.url, tmp_path / "second", base_path)
    sample(engine, model)
    sample(other, model)
    assert len(server.adapters) == 2
    other.close()
    assert len(server.adapters) == 1
    sample(engine, model)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_of_the_distribution_that_was_sampled(engine, model, temperature):
    done = sample(engine, model, sampling=Sampling(10, temperature))
    rows = list(zip(PROMPTS, done.response_ids, done.logprobs, strict=True))
    assert logprob_gap(model, rows, temperature) < 1e-5
    # by hand for the first token
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature
    own = logits.log_softmax(-1)[done.response_ids[0][0]]
    assert done.logprobs[0][0] == pytest.approx(float(own), abs=1e-5)


def test_top_k_and_top_p_are_kept(engine, model):
    done = sample(engine, model, sampling=Sampling(1, 0.7, top_k=5, top_p=0.8))
    for prompt, ids, logprobs in zip(PROMPTS, done.response_ids, done.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[:, -1] / 0.7
        own = restrict(logits, 5, 0.8).log_softmax(-1)[0, ids[0]]
        assert logprobs[0] == pytest.approx(float(own), abs=1e-5) and math.isfinite(own)


def test_a_response_depends_on_its_key_alone(engine, model):
    expected = sample(engine, model).response_ids
    assert sample(engine, model, batch_size=2).response_ids == expected
    assert sample(engine, model, rows=[4, 2]).response_ids == [expected[4], expected[2]]
    # the same prompt under another key
    assert expected[0] != expected[4]


def test_responses_end_with_any_of_the_stop_ids_or_at_the_limit(engine, model):
    done = sample(engine, model)
    assert any(done.ended) and not all(done.ended)
    for row, ended in zip(done.response_ids, done.ended, strict=True):
        assert ended == (row[-1] in STOPS) and (ended or len(row) == 10)
    free = sample(engine, model, stops=[])
    assert [len(row) for row in free.response_ids] == [10] * 6 and not any(free.ended)
    none = sample(engine, model, sampling=Sampling(max_new_tokens=0))
    assert none.response_ids == [[]] * 6 and none.logprobs == [[]] * 6 and not any(none.ended)
    assert sample(engine, model, rows=[]).response_ids == []


def test_progress_is_counted_and_requests_in_flight_are_bounded(engine, model, server):
    counted = []
    sample(engine, model.train(), batch_size=2, progress=counted.append)
    assert counted == [1] * 6 and server.most_in_flight == 2
    assert model.training


# the protocol


def test_a_request_says_all_that_a_servers_defaults_could_change(engine, model, server):
    sample(engine, model, rows=[0], sampling=Sampling(7, 0.9, top_k=3, top_p=0.5), stops=[9, 2])
    (name,) = server.adapters
    assert server.bodies("/v1/completions") == [
        {
            "model": name,
            "prompt": [5, 6, 7],
            "max_tokens": 7,
            "temperature": 0.9,
            "top_k": 3,
            "top_p": 0.5,
            "seed": 1,
            "stop_token_ids": [2, 9],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "add_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_p": 0.0,
        }
    ]
    (loaded,) = server.bodies("/v1/load_lora_adapter")
    folder = engine.folder.resolve() / name
    assert loaded == {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
    assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"]


def test_the_key_of_the_server_is_sent_and_never_printed(
    server, model, base_path, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    engine = VllmEngine(server.url + "/v1/", tmp_path / "vllm", base_path)
    server.faults["/v1/completions"] = [lambda *right: (401, "s3cret is wrong")] * 6
    message = refused(engine, model)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}
    assert "HTTP 401: *** is wrong" in message and "s3cret" not in message


def test_the_base_is_known_by_name_or_folder(server, base_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base_path)
    VllmEngine(server.url, tmp_path, "link").check_base()
    with pytest.raises(
        UserError, match=r"it serves .*, and this run's base is Qwen/Other"
    ) as caught:
        VllmEngine(server.url, tmp_path, "Qwen/Other").check_base()
    assert "--served-model-name Qwen/Other" in str(caught.value)
    # an adapter of that name is no base
    server.adapters["Qwen/Other"] = str(tmp_path)
    with pytest.raises(UserError, match="base is Qwen/Other"):
        VllmEngine(server.url, tmp_path, "Qwen/Other").check_base()


class OneOfTwo(DistributedContext):
    """A rank in a thread; `meeting` holds what both have brought to a gathering."""

    def join(self, barrier, meeting):
        self.barrier, self.meeting = barrier, meeting
        return self

    def gather(self, items):
        self.meeting[self.rank] = items
        self.barrier.wait(30)
        found = [*self.meeting[0], *self.meeting[1]]
        self.barrier.wait(30)
        return found


def on_two_ranks(work):
    """Return what `work(world)` gives on each of two ranks, or the UserErrors."""
    barrier, meeting, results = threading.Barrier(2), {}, [None, None]

    def run(rank):
        try:
            results[rank] = work(OneOfTwo(rank=rank, size=2).join(barrier, meeting))
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_the_main_rank_hands_over_and_each_rank_asks_for_its_rows(
    server, model, base_path, tmp_path
):
    expected = sample(hf.generate, model, sampling=GREEDY).response_ids
    shares = [[0, 1, 2, 3, 4, 5], []]

    def work(world):
        engine = VllmEngine(server.url, tmp_path / "vllm", base_path, world)
        done = sample(engine, model, rows=shares[world.rank], sampling=GREEDY)
        again = sample(engine, model, rows=shares[1 - world.rank], sampling=GREEDY)
        return done.response_ids, again.response_ids

    assert on_two_ranks(work) == [(expected, []), ([], expected)]
    assert len(server.bodies("/v1/load_lora_adapter")) == 1
    # what the main rank cannot do ends both
    server.allows_updates = False
    negate(model)
    errors = on_two_ranks(work)
    assert all("--enable-lora" in str(error) for error in errors)


# what can go wrong


def test_a_failure_that_passes_is_tried_again(engine, model, server, capfd):
    expected = sample(hf.generate, model, sampling=GREEDY)
    for path in ("models", "load_lora_adapter", "completions"):
        server.faults[f"/v1/{path}"] = [lambda *right: (503, "busy")] * 2
    assert_same(sample(engine, model, sampling=GREEDY), expected)
    assert capfd.readouterr().err.count("HTTP 503: busy; retry") == 6


def test_an_adapter_that_cannot_be_unloaded_is_mentioned_and_left(engine, model, server, capfd):
    sample(engine, model)
    server.adapters.clear()
    negate(model)
    expected = sample(hf.generate, model, sampling=GREEDY)
    assert_same(sample(engine, model, sampling=GREEDY), expected)
    assert "cannot be found" in capfd.readouterr().err
    # at the end of a run no more is said of a server that is not there
    server.stop()
    engine.close()
    assert not capfd.readouterr().err and not engine.folder.exists()


def choice_with(**changes):
    """A fault: the right answer, of whose only choice something is changed (None: left out)."""

    def fault(status, content):
        choice = content["choices"][0] | changes
        choices = [{name: value for name, value in choice.items() if value is not None}]
        return status, content | {"choices": choices}

    return fault


def without_the_last_logprob(status, content):
    content["choices"][0]["logprobs"]["token_logprobs"].pop()
    return status, content


def not_stopping(status, content):
    choice = content["choices"][0]
    choice["token_ids"] = [STOPS[0]] * len(choice["token_ids"])
    return status, content


def slowly(status, content):
    time.sleep(0.4)
    return status, content


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda *right: (500, "out of memory"), "did not respond after 4 attempts"),
        (
            lambda *right: (400, {"error": "no seed"}),
            'refused the request. HTTP 400: {"error": "no',
        ),
        (slowly, "no whole answer within 0.2 s"),
        (lambda *right: (200, "<html>"), "expected JSON with a list 'choices', found <html>"),
        (lambda *right: (200, {"choices": []}), "expected choices[0] with token_ids"),
        (choice_with(token_ids=None), "expected choices[0] with token_ids"),
        (choice_with(logprobs=None), "expected choices[0] with token_ids"),
        (choice_with(prompt_token_ids=[1, 2, 3, 4]), "another prompt than was given: 4 tokens"),
        (without_the_last_logprob, "tokens and 9 log-probabilities, expected as many"),
        (not_stopping, "none after a stop token"),
    ],
)
def test_an_answer_that_cannot_be_used_ends_with_one_message(engine, model, server, fault, message):
    if fault is slowly:
        engine.service = replace(engine.service, timeout=0.2)
    server.faults["/v1/completions"] = [fault] * 4
    stops = STOPS if "after a stop" in message else []
    found = refused(engine, model, rows=[0], stops=stops)
    assert message in found and "vllm_url (http://127.0.0.1:" in found


def test_a_context_that_is_too_short_is_not_taken_for_an_end(engine, model, server):
    server.max_model_len = 8
    message = refused(engine, model, rows=[0], stops=[])
    assert "cut off after 5 of 10 tokens: raise --max-model-len" in message


def test_an_adapter_that_the_server_does_not_take_says_how_to_start_it(engine, model, server):
    server.max_lora_rank = 2
    message = refused(engine, model)
    assert "LoRA rank 4 is greater than max_lora_rank" in message
    server.allows_updates = False
    message = refused(engine, model)
    assert "HTTP 404" in message and str(engine.folder) in message
    for words in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve", "--max-lora-rank 8"):
        assert words in message


@pytest.mark.parametrize("name", ["trainable_token_indices", "rank_pattern"])
def test_an_adapter_that_vllm_would_load_wrongly_is_not_handed_over(
    engine, server, base_path, tmp_path, name
):
    given = {"trainable_token_indices": [2], "rank_pattern": {"q_proj": 2}}[name]
    adapter = random_adapter(base_path, tmp_path / "odd", seed=1, **{name: given})
    model = load_adapter(load_model(base_path).model, adapter)
    message = refused(engine, model)
    assert f"'{name}: " in message and "merged model" in message
    assert not server.bodies("/v1/load_lora_adapter")


def test_a_model_without_an_adapter_cannot_be_handed_over(engine, base_path):
    assert "this model has none" in refused(engine, load_model(base_path).model)


def test_responses_of_another_distribution_end_the_run(engine, model, server):
    def other_weights(status, content):
        for name in server.adapters:
            server.model.set_adapter(name)
        negate_all(server.model)
        return status, content

    server.faults["/v1/load_lora_adapter"] = [other_weights]
    message = refused(engine, model)
    assert "nats a token from those of the model here" in message
    assert "--logprobs-mode processed_logprobs" in message


def test_log_probabilities_that_are_a_little_off_are_mentioned_once(engine, model, server, capfd):
    def off(status, content):
        logprobs = content["choices"][0]["logprobs"]
        logprobs["token_logprobs"] = [value - 0.3 for value in logprobs["token_logprobs"]]
        return status, content

    server.faults["/v1/completions"] = [off] * 12
    sample(engine, model)
    sample(engine, model)
    assert capfd.readouterr().err.count("more than 0.1 nats a token from those of the model") == 1


def negate_all(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)


# PPO


def test_ppo_learns_from_the_servers_samples_and_measures_by_itself(
    server, sft_path, base_path, tmp_path
):
    options = ppo_config(vllm_url=server.url)
    learner = trainer(sft_path, options)
    engine = VllmEngine(server.url, tmp_path / "vllm", base_path)
    learner.collector.generate = engine
    seen = []
    for step in range(2):
        metrics, rollout = learner.step(step)
        # the two agree, and still it is the learner's pass that the ratio is made with
        assert 0 < rollout.logprob_gap < 1e-5
        assert not learner.collector.trusts_engine
        assert metrics["rollout/logprob_gap"] == rollout.logprob_gap
        assert abs(metrics["ppo/ratio_first"] - 1) < 1e-6
        seen.append({body["model"] for body in server.bodies("/v1/completions")})
    assert len(seen[0]) == 1 and len(seen[1]) == 2
    built_in = trainer(sft_path)
    built_in.step(0)
    assert built_in.collector.trusts_engine


def ppo(server, sft_path, reward_path, tmp_path, **more):
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"where is my lamp {n}?"}) for n in range(60))
    )
    flags = flags_of("ppo", sft_path, str(tmp_path / "p.jsonl"), tmp_path / "ppo")
    options = {
        "reward": f"[{{model: {reward_path}}}]",
        "total_episodes": 16,
        "rollout_batch_size": 8,
        "learning_rate": 1e-2,
        "guards": "{no_signal: off, truncation: off}",
        "vllm_url": server.url,
        **more,
    }
    given = itertools.chain.from_iterable((f"--{name}", str(v)) for name, v in options.items())
    door("ppo")([*flags, *given])
    return tmp_path / "ppo"


def test_the_program_samples_and_evaluates_through_the_server(
    server, sft_path, reward_path, tmp_path, capsys
):
    folder = ppo(server, sft_path, reward_path, tmp_path)
    assert (folder / "result.json").is_file()
    assert "sampling from the vLLM server at http://127.0.0.1" in capsys.readouterr().out
    # evaluation and rollout share the first adapter; each update makes another
    models = [body["model"] for body in server.bodies("/v1/completions")]
    counts = [len(list(group)) for _, group in itertools.groupby(models)]
    assert counts == [4 + 8, 8, 4] and len(set(models)) == 3
    for close in server.at_exit:
        close()
    assert not server.adapters and not (folder / "vllm").exists()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rollout/logprob_gap"] < 1e-5 for row in metrics if "ppo/ratio" in row)


def test_the_other_programs_evaluate_through_the_server(server, base_path, files, tmp_path):
    flags = flags_of("sft", base_path, files["instructions"], tmp_path / "sft")
    # a trained row of the output head cannot be handed over
    more = ["--train_eos", "never", "--learning_rate", "1e-2", "--vllm_url", server.url]
    door("sft")([*flags, *SMALL, *more])
    models = [body["model"] for body in server.bodies("/v1/completions")]
    before, after = (len(list(group)) for _, group in itertools.groupby(models))
    assert before == after > 1


def test_a_server_that_is_not_there_ends_the_program_with_code_2(
    server, sft_path, reward_path, tmp_path, capsys
):
    server.stop()
    with pytest.raises(SystemExit) as caught:
        ppo(server, sft_path, reward_path, tmp_path)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "error: vllm_url (http://127.0.0.1:" in message and "no connection" in message
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_options_that_cannot_work_are_refused():
    common = {
        "model_name_or_path": "x",
        "data": ["x"],
        "output_dir": "x",
        "reward": [{"model": "x"}],
    }
    with pytest.raises(UserError, match="'vllm_url': the URL is 'localhost:8000'"):
        PPOConfig(**common, vllm_url="localhost:8000").validate()
    from rlhf.options.offline import SFTRunConfig

    del common["reward"]
    with pytest.raises(UserError, match="'vllm_url': adapters are handed over"):
        SFTRunConfig(**common, vllm_url="http://localhost:8000", use_peft=False).validate()
