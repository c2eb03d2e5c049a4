"""The GPU benchmark: its sizes and FLOPs by hand, and the whole program on tiny shapes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import bench_gpu, gpu
from benchmarks.speed.gpu_shapes import SHAPES, TINY_SHAPE, QwenShape
from benchmarks.speed.required_flops import Products


def test_the_shapes_have_as_many_weights_as_the_models():
    # as their safetensors files say, less the norms
    for shape, weights in zip(SHAPES, (596_049_920, 1_720_574_976), strict=True):
        model = shape.model(torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == weights
        norms = shape.layers * (2 * shape.width + 2 * shape.head_width) + shape.width
        assert shape.parameters == weights - norms


def test_a_pass_makes_as_many_products_as_the_formula_says():
    from peft import get_peft_model

    from rlhf.model.adapters import lora_config

    model = TINY_SHAPE.model(torch.device("cpu"))
    model.set_attn_implementation("eager")
    # PEFT's own layers: the counter does not see products that are written in place
    causal = get_peft_model(model, lora_config(r=4)).base_model.model
    ids = torch.randint(0, 256, (1, 9))
    with FlopCounterMode(display=False) as counter:
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state
        causal.lm_head(hidden[:, -5:]).sum().backward()
    products = Products.of(TINY_SHAPE, 4)
    # `eager` computes masked pairs too
    sizes = (9, 81, 5)
    needed = products.forward(*sizes, adapted=True) + products.backward_lora(*sizes)
    assert counter.get_total_flops() == needed


def test_what_sampling_has_to_read_by_hand():
    # 10 x 8 of embeddings; q 8 x 4, k and v 8 x 2, o 4 x 8, and the MLP 3 x 8 x 3: 248 weights
    shape = QwenShape("hand", 8, 1, 3, heads=2, kv_heads=1, head_width=2, vocabulary=10)
    assert shape.parameters == 80 + 32 + 16 + 16 + 32 + 72
    # two steps read all weights, and of each of 3 rows 5, then 6 tokens of 2 x 1 x 2 numbers
    assert gpu.generation_bytes(shape, 3, 5, 2) == 2 * (2 * 248 + 3 * (5 + 6) * 4)


def test_shares_are_of_the_measured_and_of_the_nominal_rate():
    about = {"matmul_flops": 8e12, "nominal_flops": 10e12}
    assert gpu.shares("a_", 2e12, about) == {"a_matmul_share": 0.25, "a_mfu": 0.2}
    assert gpu.shares("", 2e12, about | {"nominal_flops": None})["mfu"] is None


def test_what_does_not_fit_is_measured_with_checkpointing():
    tried = []

    def measure(checkpointing: bool) -> dict:
        tried.append(checkpointing)
        if not checkpointing:
            raise torch.OutOfMemoryError("no memory")
        return {"seconds": 1}

    found = gpu.where_it_fits(torch.device("cpu"), measure)
    assert tried == [False, True] and found == {"seconds": 1, "checkpointing": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main([])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: no CUDA device") and "--tiny" in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        bench_gpu.main(["--device", "cpu"])


def test_the_whole_program_on_tiny_shapes(tmp_path, monkeypatch, capsys, device):
    arguments = ["--device", device.type, "--tiny", "--results", str(tmp_path)]
    bench_gpu.main([*arguments, "--minutes", "0"])
    assert "not measured in 0 minutes: generation/tiny/3, learn/tiny/64" in capsys.readouterr().out
    bench_gpu.main(arguments)
    cells = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert list(cells) == [
        "generation/tiny/3", "learn/tiny/64", "update/tiny/reward", "update/tiny/adapter",
    ]  # fmt: skip
    assert not any("error" in cell for cell in cells.values()), cells
    assert cells["generation/tiny/3"]["engine_tokens_per_second"] > 0
    assert 0 < cells["learn/tiny/64"]["matmul_share"] < 1
    assert abs(cells["update/tiny/adapter"]["ratio_first"] - 1) < 2**-8
    [page] = tmp_path.glob("*-gpu.md")
    assert "| tiny | on the reward model's states | no | " in page.read_text()

    # a second call keeps them, and measures again what had failed
    cells["learn/tiny/64"] = {"error": "once"} | cells["learn/tiny/64"]
    content = json.loads((tmp_path / "gpu.json").read_text()) | {"cells": cells}
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    monkeypatch.setattr(gpu, "learning_cell", lambda *_: {"tokens_per_second": 7})
    monkeypatch.setattr(bench_gpu, "learning_row", lambda model, cell: "| again |")
    capsys.readouterr()
    bench_gpu.main(arguments)
    said = capsys.readouterr().out
    assert said.count("measured before") == 3 and "learn/tiny/64: tokens_per_second 7" in said


def test_a_cell_that_fails_leaves_the_others_and_says_why(tmp_path, monkeypatch, capsys):
    def fails(about):
        raise RuntimeError("kernel\nmore")

    cells = [bench_gpu.Cell("learn/a/1", 1, fails)]
    monkeypatch.setattr(bench_gpu, "cells_of", lambda *_: cells)
    bench_gpu.main(["--device", "cpu", "--tiny", "--results", str(tmp_path)])
    assert "learn/a/1: error RuntimeError: kernel\n" in capsys.readouterr().out
    [page] = tmp_path.glob("*-gpu.md")
    assert "- learn/a/1: RuntimeError: kernel" in page.read_text()
