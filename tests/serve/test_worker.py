"""Requests in line: order, batches, policies that stay apart, the end of a job."""

import queue
import threading
import time

from rlhf.data.encode import encode_prompt
from rlhf.engines.sampling import Sampling
from rlhf.serve.worker import Job, Worker
from tests.serve.conftest import QUESTION


def job(policy, events, tokens=8, keys=(0,), temperature=1.0, **more):
    prompt = encode_prompt(policy.tokenizer, QUESTION)
    sampling = Sampling(tokens, temperature)
    return Job(policy, [prompt] * len(keys), list(keys), sampling, events.put, **more)


def answer_of(events):
    """Return the ids and the reasons of the end of a job with one answer."""
    ids = []
    while True:
        event = events.get(timeout=60)
        assert event.error is None, event.error
        ids += [token for token, _, _ in event.tokens]
        if event.finish:
            return ids, event.finish


def test_many_requests_at_once_get_their_own_policy_and_limit(policies, runs, base_path, sampler):
    worker = Worker()
    paths = dict(zip(policies, [*runs, base_path], strict=True))
    wanted, threads = [], []
    for number in range(24):
        name = list(policies)[number % 3]
        wanted.append((name, 3 + number % 5, number, queue.Queue()))
    for name, tokens, key, events in wanted:
        made = job(policies[name], events, tokens, [key], streams=key % 2 == 0)
        threads.append(threading.Thread(target=worker.submit, args=[made]))
    for thread in threads:
        thread.start()
    for name, tokens, key, events in wanted:
        expected = sampler(paths[name], QUESTION, tokens, key=key, temperature=1.0)[1]
        assert answer_of(events)[0] == expected, (name, key)
    worker.close()


class Held(Worker):
    """A worker that notes its batches, and begins when it is told."""

    def __init__(self, batch_size):
        self.go, self.batches = threading.Event(), []
        super().__init__(batch_size)

    def _sample(self, jobs):
        self.go.wait(60)
        self.batches.append([job.keys for job in jobs])
        super()._sample(jobs)


def test_waiting_requests_of_one_policy_and_sampling_share_a_batch(policies):
    worker, events = Held(batch_size=4), [queue.Queue() for _ in range(7)]
    sft, ppo = policies["sft"], policies["ppo"]
    jobs = [
        job(sft, events[0], keys=[0]),
        job(ppo, events[1], keys=[1]),
        job(sft, events[2], keys=[2, 3]),
        job(ppo, events[3], keys=[4], tokens=2),
        job(ppo, events[4], keys=[5], temperature=0.5),
        job(ppo, events[5], keys=[6, 7, 8]),
        job(sft, events[6], keys=[9]),
    ]
    worker.submit(jobs[0])
    # it is taken before the others come
    while not worker.running:
        time.sleep(0.01)
    for waiting in jobs[1:]:
        worker.submit(waiting)
    worker.go.set()
    for number, made in enumerate(jobs):
        for _ in made.keys:
            answer_of(events[number])
    worker.close()
    # [6, 7, 8] would be rows three to five beside [1] and [4]; the line moves on in its order
    expected = [[[0]], [[1], [4]], [[2, 3], [9]], [[5]], [[6, 7, 8]]]
    assert worker.batches == expected


def test_a_job_that_is_cancelled_ends(policies):
    worker, events = Held(batch_size=4), queue.Queue()
    left = job(policies["sft"], events, tokens=400)
    worker.submit(left)
    left.is_cancelled = True
    worker.go.set()
    after = queue.Queue()
    worker.submit(job(policies["sft"], after, tokens=3))
    assert len(answer_of(after)[0]) == 3
    worker.close()
    assert events.empty()


def test_a_failure_is_told_and_the_next_request_is_answered(policies, monkeypatch, capsys):
    policy, worker = policies["sft"], Worker()
    failing, events = queue.Queue(), queue.Queue()

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(policy), "generate", fails)
    worker.submit(job(policy, failing))
    assert "sampling failed" in failing.get(timeout=60).error
    monkeypatch.undo()
    worker.submit(job(policy, events, tokens=2))
    assert len(answer_of(events)[0]) == 2
    worker.close()
    assert "out of memory" in capsys.readouterr().err


def test_the_end_is_told_to_all_that_wait(policies):
    worker = Held(batch_size=1)
    running, waiting, late = queue.Queue(), queue.Queue(), queue.Queue()
    worker.submit(job(policies["sft"], running, tokens=400))
    while not worker.running:
        time.sleep(0.01)
    worker.submit(job(policies["sft"], waiting))
    closing = threading.Thread(target=worker.close)
    closing.start()
    for events in (running, waiting):
        assert events.get(timeout=60).error == "the server is shutting down"
    worker.go.set()
    closing.join()
    worker.submit(job(policies["sft"], late))
    assert late.get(timeout=60).error == "the server is shutting down"
