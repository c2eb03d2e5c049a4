"""The analysis of benchmarks/experiments/best_of_n.py on curves worked by hand."""

import numpy as np
import pytest

from benchmarks.experiments import best_of_n, best_of_n_page


def curve(d, gold):
    return best_of_n.Curve(np.array(d), np.array(gold), np.array(gold) / 2)


def result(kl, gains):
    """What `rlhf reward best-of-n` writes, as far as it is read."""
    rows = []
    for place, gain in zip([0.0, 0.25, 1.0, 4.0], gains, strict=True):
        scores = {
            name: {"gain": {"estimate": gain * factor}}
            for name, factor in (("gold", 1), ("proxy", 3))
        }
        rows.append({"kl": place, "scores": scores})
    turning = {
        "kl": {"estimate": kl},
        "n": {"estimate": 6},
        "outcome": "turns down",
        "gain": max(gains),
    }
    return {
        "curve": rows,
        "turning": {"gold": turning},
        "laws": {"gold": {"peak": {"estimate": 1.5}}},
    }


def test_gold_is_read_where_the_run_first_comes_to_a_kl():
    run = curve([0.0, 1.0, 3.0, 2.0], [0.0, 0.4, 0.2, 0.0])
    # half the way from 1 to 3: (0.4 + 0.2) / 2
    assert run.gold_at(2.0) == pytest.approx(0.3)
    assert run.gold_at(0.0) == 0 and run.gold_at(9.0) == 0.0
    assert run.peak == 1


def test_the_peaks_of_a_seed_by_hand():
    given = result(1.0, [0.0, 0.2, 0.3, 0.1])
    chosen = best_of_n.curve_of_best_of_n(given)
    assert chosen.d.tolist() == [0, 0.5, 1, 2] and chosen.proxy[2] == pytest.approx(0.9)
    # R(d) = d (0.6 - 0.2 log d) at d = 1, e, e^2: highest at exp(3 - 1) = e^2
    d = np.array([0.0, 1.0, np.e, np.e**2])
    run = curve(d, d * (0.6 - 0.2 * np.log(np.maximum(d, 1))))
    seed = best_of_n.measure_seed(chosen, given, {"ppo": run}, {"ppo": [run, run]})
    assert seed["best_of_n"]["d"] == 1 and seed["best_of_n"]["proxy"] == pytest.approx(0.9)
    own = seed["ppo"]
    assert own["d"] == pytest.approx(np.e**2) and own["law_d"] == pytest.approx(np.e**2)
    assert own["peak_is_last"] and own["rmse"]["rl"] == pytest.approx(0, abs=1e-9)
    # stopped at d = 1 gold is 0.6 of 0.2 e^2
    assert own["lost"] == pytest.approx(0.6 - 0.2 * np.e**2)


def test_what_is_lost_is_measured_on_the_half_that_did_not_choose():
    first = curve([0.0, 1.0, 2.0], [0.0, 0.5, 0.4])
    second = curve([0.0, 1.0, 2.0], [0.0, 0.1, 0.3])
    # the first half at the second's peak, d = 2, and the second at the first's, d = 1; stopped at 1
    lost = [0.5 - 0.4, 0.1 - 0.1]
    assert best_of_n.lost_at(1.0, [first, second]) == pytest.approx(sum(lost) / 2)


def seeds_and_curves():
    given = result(1.0, [0.0, 0.2, 0.3, 0.1])
    curves = {name: [] for name in ("best_of_n", "ppo", "dpo")}
    seeds = []
    for shift in (0.0, 1.0):
        chosen = best_of_n.curve_of_best_of_n(given)
        own = {
            "ppo": curve([0.0, 2.0 + shift, 4.0 + shift], [0.0, 0.4, 0.1]),
            "dpo": curve([0.0, 1.0, 2.0], [0.0, 0.3, 0.2]),
        }
        by_half = {name: [run, run] for name, run in own.items()}
        seeds.append(best_of_n.measure_seed(chosen, given, own, by_half))
        for name, one in {"best_of_n": chosen, **own}.items():
            curves[name].append(one)
    return seeds, curves


def test_peaks_are_compared_seed_by_seed():
    seeds, _ = seeds_and_curves()
    found = best_of_n.compare_peaks(seeds)
    # √KL of 2 and 3 less 1; their squares less 1; t(1) = 12.706, half the distance is the error
    assert found["ppo"]["d"]["mean"] == pytest.approx(1.5)
    assert found["ppo"]["d"]["high"] == pytest.approx(1.5 + 12.706204736 * 0.5)
    assert found["ppo"]["kl"]["mean"] == pytest.approx((3 + 8) / 2)
    # gold at √KL 1 is half the way to 0.4 at 2, and a third of it at 3
    assert found["ppo"]["lost"]["mean"] == pytest.approx((0.2 + 0.4 / 3) / 2 - 0.4)
    ratio = found["dpo"]["ratio"]
    assert (ratio["mean"], ratio["low"], ratio["high"]) == pytest.approx((1, 1, 1))


def test_a_seed_without_a_value_leaves_no_mean():
    assert best_of_n.over_seeds([1.0, np.inf])["mean"] is None
    assert best_of_n.over_seeds([1.0, None])["mean"] is None


def test_the_page_says_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(best_of_n_page, "RESULTS", tmp_path)
    monkeypatch.setattr(best_of_n_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(best_of_n_page, "FIGURE", tmp_path / "figure.png")
    seeds, curves = seeds_and_curves()
    found = {
        "seeds": seeds,
        "peaks": best_of_n.compare_peaks(seeds),
        "falls": {name: {"mean": -0.3, "low": -0.4, "high": -0.2} for name in ("ppo", "dpo")},
        "laws": best_of_n.fit_laws(curves, seeds),
        "repeated": 0.02,
    }
    best_of_n_page.write_all(found, curves)
    page = tmp_path / "page.md"
    page.write_text(page.read_text() + "\n## What follows\n\nBy hand.\n")
    best_of_n_page.write_all(found, curves)
    text = page.read_text()
    assert text.count("By hand.") == 1 and "+1.500 [-4.853, +7.853]" in text
    rows = {row["id"]: row for row in best_of_n_page.rows_of(found)}
    assert rows["best-of-n/ppo-distance"]["value"] == pytest.approx(1.5)
    assert rows["best-of-n/dpo-distance"]["value"] == pytest.approx(0)
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "reward.json").is_file()
