"""Two adapters of one base behind a server on a free port of this machine."""

import threading
import time

import pytest

from rlhf.http_server import listen
from tests.conftest import random_adapter

QUESTION = [{"role": "user", "content": "where is my parcel?"}]


@pytest.fixture(scope="session")
def runs(base_path, tmp_path_factory) -> list[str]:
    """Two policies that differ, as two runs leave them."""
    folder = tmp_path_factory.mktemp("runs")
    sft = random_adapter(base_path, folder / "sft", seed=1)
    return [sft, random_adapter(base_path, folder / "ppo", seed=7)]


@pytest.fixture(scope="session")
def sampler(runs, base_path):
    """What the project's plain sampler answers: (run, messages, tokens, ...) -> text, ids, logprobs."""
    from rlhf.data.encode import decode_response, encode_prompt
    from rlhf.engines import hf
    from rlhf.engines.sampling import Sampling
    from rlhf.model.loading import load_model, trainable_policy
    from rlhf.model.tokenizer import stop_ids

    made = {}

    def answer(run, messages, tokens, key=0, **sampling):
        if run not in made:
            initial = load_model(run)
            adapted = trainable_policy(initial, None) if initial.adapter_path else initial.model
            made[run] = adapted.eval(), initial.tokenizer
        model, tokenizer = made[run]
        prompt = encode_prompt(tokenizer, messages)
        how = Sampling(tokens, **{"temperature": 0.0, **sampling})
        stops = stop_ids(tokenizer, model)
        done = hf.generate(model, [prompt], [key], how, stops, tokenizer.pad_token_id)
        return (
            decode_response(tokenizer, done.response_ids[0]),
            done.response_ids[0],
            done.logprobs[0],
        )

    return answer


@pytest.fixture(scope="session")
def policies(runs):
    from rlhf.serve.policies import load

    return {policy.name: policy for policy in load(runs, with_bases=True)}


@pytest.fixture(scope="module")
def service(policies):
    from rlhf.serve.app import Service
    from rlhf.serve.worker import Worker

    service = Service(policies, Worker(), max_response_length=6)
    yield service
    if not service.worker.is_closed:
        service.worker.close()


@pytest.fixture(scope="module")
def url(service):
    """The address of a server with `service`."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra 'collect' is not installed")
    from rlhf.serve.app import create_app

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    listener.close()
