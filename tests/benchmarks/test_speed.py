"""The speed benchmark: its FLOPs by hand and by torch's counter, and its smallest cell whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import bench, cells, peer
from benchmarks.speed.cells import Task, exponents, full_tasks, quick_tasks
from benchmarks.speed.required_flops import Products, causal_pairs, update_flops
from benchmarks.speed.results import Results
from benchmarks.speed.run import BEST, CACHE, PEER, Cell, measure, summary
from benchmarks.speed.shapes import ModelShape, Workload, stop_probability, write_models

TINY = ModelShape("tiny", width=64, layers=2, vocabulary=160, head_width=32)
HAS_PEER = (CACHE / f"trl-{peer.VERSION}").is_dir()


def test_the_needs_of_an_update_by_hand():
    # width 4, MLP 16: q, k, v, o 4 x 16 + 3 x 64 = 256; rank 1: 4 x 8 + 3 x 20 = 92;
    # q, k, v of the first layer 48, their first factors 12; head 8 x 4 = 32; a pair 2 x 4 = 8
    shape = ModelShape("hand", width=4, layers=1, vocabulary=8, head_width=2)
    assert Products.of(shape, 1) == Products(256, 92, 48, 12, 32, 8)

    # 2 + 1 tokens: 2 are read (3 pairs), 1 is predicted; the reward reads 3 (6 pairs)
    found = update_flops(shape, 1, 4, prompts=[2], responses=[1], critic="reward")
    assert found["generate"] == 2 * (2 * 256 + 3 * 8 + 32)
    assert found["score"] == 2 * (3 * (256 + 92) + 6 * 8)
    assert found["measure"] == found["generate"] + 2 * 4
    forward = 2 * (2 * (256 + 92) + 3 * 8 + 32)
    backward = 2 * (2 * (256 - 48 + 2 * 92 - 12) + 2 * 3 * 8 + 32)
    assert found["learn"] == 4 * (forward + backward + 3 * 2 * 4)

    # a critic of its own: the same passes without the output head
    own = update_flops(shape, 1, 4, prompts=[2], responses=[1], critic="adapter")
    assert own["measure"] - found["measure"] == forward - 2 * 32
    assert own["learn"] - found["learn"] == 4 * (forward + backward - 2 * 2 * 32)

    # a critic trained whole: two products backward for each of its weights
    whole = update_flops(shape, 1, 4, prompts=[2], responses=[1], critic="whole")
    assert whole["measure"] - found["measure"] == 2 * (2 * 256 + 3 * 8)
    assert whole["learn"] - found["learn"] == 4 * 2 * (3 * 2 * 256 + 3 * 3 * 8)


def test_pairs_are_those_that_a_causal_mask_leaves():
    assert causal_pairs([1, 3]) == 1 + (1 + 2 + 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    write_models(TINY, folder / TINY.name, rank=4)
    return folder


@pytest.mark.parametrize("trained", ["adapter", "whole"])
def test_passes_make_as_many_products_as_the_formula_says(models, trained):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        models / TINY.name / "base", attn_implementation="eager"
    )
    if trained == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).base_model.model
    ids = torch.randint(0, TINY.vocabulary, (1, 9))

    def step() -> None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # the whole model here is a critic, which has no output head
        predicted = model.lm_head(hidden[:, -5:]) if trained == "adapter" else hidden
        predicted.sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()

    products = Products.of(TINY, 4)
    # `eager` computes masked pairs too
    pairs = 9 * 9
    if trained == "adapter":
        needed = products.forward(9, pairs, 5, adapted=True) + products.backward_lora(9, pairs, 5)
    else:
        needed = products.forward(9, pairs, 0, adapted=False) + products.backward_whole(9, pairs)
    assert counter.get_total_flops() == needed


def test_responses_end_after_the_share_that_was_asked_for():
    p = stop_probability(0.4, 64)
    alive, mean = 1.0, 0.0
    for _ in range(64):
        # the next token is sampled where no stop came before
        mean += alive
        alive *= 1 - p
    assert mean == pytest.approx(0.4 * 64, abs=1e-6)
    stops = Workload(mean_share=0.4).stop_ids(2048)
    assert len(stops) / 2048 == pytest.approx(p, abs=1e-3)


def test_growth_is_the_exponent_of_the_last_two_points():
    points = [{"value": v, "memory_gib": 1, "learn": float(v**2), "total": 5.0 * v} for v in (1, 8)]
    assert exponents(points) == {"learn": 2.0, "total": 1.0}


def test_the_smallest_cell_runs_through(models, tmp_path):
    workload = Workload(batch=8, shortest_prompt=3, longest_prompt=5, response=6, mean_share=0.4)
    workload = replace(workload, epochs=2, lora_rank=4)
    # without the peer's package, which `make bench` fetches, our side runs alone
    sides = (PEER, BEST) if HAS_PEER else (BEST,)
    cell = Cell(TINY, workload, sides, rounds=1)
    found = list(measure(cell, models))
    numbers = summary(cell, found)
    best = numbers["best"]
    assert [side.name for side, _ in found] == [side.name for side in sides]
    assert 1 <= best["mean_response"] <= 6 and best["cpu_seconds"][0] > 0
    assert set(best["phases"]) == {"generate", "score", "measure", "learn"}
    assert sum(best["phases"].values()) <= best["cpu_seconds"][0] + 0.01
    assert 0 < best["machine_share"] < 1

    results = Results.load(tmp_path)
    task = Task("ppo/tiny/fixed", 1, lambda _: {})
    entry = best | {"trl": numbers.get("trl", best)}
    if not HAS_PEER:
        entry |= {"ratio_median": 1.0, "spread": [1, 1], "memory_ratio": 1.0}
        entry |= {"wall_ratio_median": 1.0, "wall_spread": [1, 1]}
    results.add(task, {"ppo/tiny/fixed": entry, "ppo/tiny/fixed_own_critic": entry})
    results.add(task, {"ppo/tiny/memory_ratio": entry["memory_ratio"]})
    assert json.loads((tmp_path / "bench.json").read_text())["ppo"]["tiny"]["fixed"]["rounds"] == 1

    # a rerun keeps what was measured on this code, unless it is to be measured more often
    again = Results.load(tmp_path)
    assert again.has(task) and not again.has(replace(task, rounds=2))
    assert "| tiny | fixed | best |" in again.write_page().read_text()


def test_each_cell_is_written_as_it_ends_and_kept_by_a_rerun(tmp_path, monkeypatch, capsys):
    entry = {"ratio_median": 2.0, "spread": [1.5, 2.5]}
    measured = []

    def task(name: str, error: Exception | None = None) -> Task:
        def measure(models: Path) -> dict:
            measured.append(name)
            if error is not None:
                raise error
            return {name: entry}

        return Task(name, 1, measure)

    monkeypatch.setattr(peer, "fetch", lambda cache: cache)
    monkeypatch.setattr(Results, "page_lines", lambda self: iter(["a page"]))
    given = [task("generation/a/ragged"), task("generation/b/ragged", RuntimeError("no memory"))]
    monkeypatch.setattr(bench, "quick_tasks", lambda: given)

    with pytest.raises(RuntimeError, match="no memory"):
        bench.main(["--results", str(tmp_path)])
    assert "generation/a/ragged: 2.0 times (1.5 to 2.5)" in capsys.readouterr().out
    given[1] = task("generation/b/ragged")
    bench.main(["--results", str(tmp_path)])
    assert measured == ["generation/a/ragged", "generation/b/ragged", "generation/b/ragged"]
    assert "1 of 2 cells" in capsys.readouterr().out

    bench.main(["--results", str(tmp_path), "--again", "--only", "/a/"])
    assert measured[3:] == ["generation/a/ragged"]


def test_every_cell_has_its_place_and_its_row(tmp_path, monkeypatch):
    # what processes would have found: the peer, transformers and TRL take twice as long
    def found(cell: Cell, models: Path):
        for _ in range(cell.rounds):
            for side in cell.sides:
                cpu = 10.0 if side.name in ("trl", "hf") else 5.0
                phases = ["generate", "score", "measure", "learn"]
                if side is PEER:
                    phases = ["generate", "score and measure", "learn"]
                yield (
                    side,
                    {
                        "cpu": [cpu],
                        "wall": [2 * cpu],
                        "phases": {phase: [cpu / 5] for phase in phases},
                        "lengths": [[cell.workload.response] * cell.workload.batch],
                        "memory": cpu,
                        "matmul_rates": [1e11, 1e11],
                    },
                )

    monkeypatch.setattr(cells, "measure", found)
    results = Results.load(tmp_path)
    for task in {task.name: task for task in quick_tasks() + full_tasks()}.values():
        results.add(task, task.measure(tmp_path))
        assert results.has(task), task.name

    content = json.loads((tmp_path / "bench.json").read_text())
    for model in ("4M", "42M"):
        for workload in ("fixed", "ragged", "fixed_own_critic", "ragged_own_critic"):
            entry = content["ppo"][model][workload]
            assert (entry["ratio_median"], entry["spread"]) == (2.0, [2.0, 2.0])
        assert content["ppo"][model]["memory_ratio"] == 0.5
    assert content["generation"]["42M"]["ragged"]["ratio_median"] == 2.0
    assert content["offline"]["4M"]["dpo"]["ratio_median"] == 2.0
    # 34 (4 x 1024^2 + 3 x 1024 x 2736) + 151936 x 1024 weights of 28 bytes, and 5 GiB
    assert content["memory"]["0.6B"]["four_models_gib"] == 15.23
    assert content["memory"]["0.6B"]["memory_ratio"] == 0.328
    # seconds that do not grow
    assert content["scaling"]["width"]["exponents"]["learn"] == 0.0

    page = results.write_page().read_text()
    assert "| 42M | ragged | best | 5.0 | 10.0 | 2.00 (2.00 to 2.00) | – |" in page
    assert "| 4M | dpo | 5.0 | 10.0 | 2.00 (2.00 to 2.00) | 0.50 |" in page
