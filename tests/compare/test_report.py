"""The files and the terminal's table of a report, of an experiment and of single runs."""

import json

import pytest

from rlhf.report.files import print_report, read_report, write_files
from rlhf.report.format import amount, digits, interval, largest_difference, listed, mirrored
from rlhf.report.sentences import headline, report_sentences, verdict_sentence
from rlhf.report.tables import cost
from tests.compare.report_example import example
from tests.compare.test_runs import report_of, three


def number(estimate, low, high, p=0.001, seeds=5, groups=256):
    return {
        "estimate": estimate, "low": low, "high": high, "se": 0.1, "p": p, "seeds": seeds, "groups": groups,
    }  # fmt: skip


def verdict(kind="equal_kl", sign=1, difference=None, **fields):
    return {
        "kind": kind, "a": "ppo", "b": "dpo", "sign": sign, "difference": difference or number(0.12, 0.03, 0.21),
        "kl": 6.0, "p_adjusted": 0.02, "minimum_detectable_effect": 0.1, "reservation": None, "evidence": {},
    } | fields  # fmt: skip


def test_a_verdict_names_the_side_that_is_ahead_its_size_and_what_it_rests_on():
    ahead = verdict_sentence(verdict(), example())
    for part in (
        "PPO is ahead of DPO",
        "0.12 [0.03, 0.21]",
        "the gold score",
        "5 seeds x 256",
        "p 0.020",
        "KL 6",
    ):
        assert part in ahead
    behind = verdict_sentence(verdict(sign=-1, difference=number(-0.12, -0.21, -0.03)), example())
    assert "PPO is behind DPO by 0.12 [0.03, 0.21]" in behind


def test_what_is_not_shown_is_not_claimed_and_what_could_hide_is_named():
    line = verdict_sentence(verdict(sign=0, difference=number(0.01, -0.3, 0.2)), example())
    assert "No difference can be shown" in line and "0.30" in line and "ahead" not in line
    line = verdict_sentence(verdict(sign=None, p_adjusted=None), example())
    assert "+0.12 [0.03, 0.21]" in line and "too few seeds" in line and "ahead" not in line


@pytest.mark.parametrize(
    ("reservation", "part"),
    [("form", "form of the fitted curve"), ("contradicted", "contradict"), ("correction", "adjusted for all claims"),
     ("win_rate", "Mean and win rate disagree")],
)  # fmt: skip
def test_reservations_are_part_of_the_sentence(reservation, part):
    assert part in verdict_sentence(verdict(reservation=reservation), example())


def test_a_tuned_verdict_names_the_values_and_their_kl():
    line = verdict_sentence(verdict("tuned", kl=None), example())
    assert (
        "PPO (kl_coef 0.05, KL 9" in line
        and "DPO (beta 0.1, KL 9" in line
        and "other prompts" in line
    )


@pytest.mark.parametrize(
    ("swept", "place"),
    [
        ({"ppo": [0.1, 0.2], "dpo": [0.1, 0.3]}, "each at the swept value that did best"),
        ({"ppo": [0.1], "dpo": [0.1, 0.3]}, "DPO at the swept value that did best"),
        ({"ppo": [0.1, 0.2], "dpo": []}, "PPO at the swept value that did best"),
        ({"ppo": [0.1], "dpo": []}, "at the end of training"),
    ],
)
def test_a_tuned_verdict_says_which_side_had_values_to_choose_among(swept, place):
    report = example()
    for method, values in swept.items():
        report["methods"][method]["swept_values"] = values
    assert f", {place}" in verdict_sentence(verdict("tuned", kl=None), report)


def test_a_judge_that_is_highest_at_the_largest_kl_has_no_fall_to_tell_of():
    report = example()
    entry = report["overoptimisation"][0]
    of_curve = {"sign": 0, "difference": entry["judge"], "evidence": entry}
    line = verdict_sentence(verdict("over_optimisation", **of_curve), report)
    assert "From the peak of the gold score (KL 9.4) to the largest KL (21) it changes by" in line
    # half of the cells have their peak before the end: there is a change to tell
    entry["ends_at_peak"] = 0.5
    assert verdict_sentence(verdict("over_optimisation", **of_curve), report) == line
    # they are most of all
    entry["end"]["kl"] = entry["peak"]["kl"]
    assert (
        "Chosen on halves of the data, the gold score is highest most often at the largest KL (9.4); from the peak of "
        "each half to there it changes by"
        in verdict_sentence(verdict("over_optimisation", **of_curve), report)
    )
    entry["end"]["kl"] = 21.2
    entry["ends_at_peak"] = 1.0
    assert verdict_sentence(verdict("over_optimisation", **of_curve), report) == (
        "Over-optimisation of PPO: undecided. At the largest KL (21) the gold score is highest, so there is no fall "
        "from a peak to measure."
    )


def test_the_cost_table_leaves_out_what_is_a_part_of_another_counter():
    report = example()
    table = cost(report)
    for row in report["budget"]["rows"]:
        row["total"] |= {"reference_flops": 2e13, "reference_seconds": 4.0}
    # they are in flops and seconds already
    assert cost(report) == table


def test_notes_name_what_is_missing():
    report = example()
    report["notes"] += [
        {
            "kind": "outlier",
            "method": "ppo",
            "swept": 0.05,
            "seed": 3,
            "score": -1.0,
            "others": [0.5, 0.75],
        },
        {
            "kind": "no_overlap",
            "a": "ppo",
            "b": "dpo",
            "ranges": {"ppo": [5.0, 12.0], "dpo": [3.0, 2.5]},
        },
        {"kind": "missing_measurements", "names": [f"seed-{i}" for i in range(6)]},
        {"kind": "left_out", "method": "dpo", "swept_values": [0.1, 0.3]},
    ]
    text = " ".join(report_sentences(report))
    for part in (
        "which no method was trained on", "reward_model", "DPO (beta 0.05) seed 4", "Seed 3 of PPO (kl_coef 0.05)",
        "0.500 to 0.750", "PPO: 5 to 12 nats, DPO: none by all its seeds", "seed-3 and 2 more", "DPO at 0.1 and 0.3",
        "Budgets are not matched in flops within 10 %", "783 independent", "about 14 run seeds", "5 run seeds",
    ):  # fmt: skip
        assert part in text, part


def test_files_of_runs(tmp_path, capsys):
    report = report_of(three(ppo=0.9))
    figures = write_files(report, tmp_path)
    assert {"scores", "frontier"} <= set(figures) and "time" not in figures
    saved = json.loads(
        (tmp_path / "report.json").read_text(), parse_constant=lambda c: pytest.fail(c)
    )
    assert saved == json.loads(json.dumps(report))
    for name in ("frontier.png", "scores.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert (
        text.startswith("# DPO against PPO\n\n![Dot plot")
        and "(scores.svg)" in text.split("\n## ")[0]
    )
    assert "for these trained models" in text and "run seed" not in headline(report)
    assert "Budgets" not in text and "No KL" not in text  # these are an experiment's

    print_report(report, tmp_path)
    out = capsys.readouterr().out
    mean = report["points"][1]["scores"]["gold"]["mean"]
    for part in (interval(mean), "DPO (KL 4) is behind PPO (KL 4)", "report.html"):
        assert part in out


def test_annotators_stand_in_the_report_where_their_votes_are_given(tmp_path, capsys):
    from rlhf.data.agreement import agreement_summary
    from rlhf.data.votes import Vote

    votes = [Vote(i, i // 2, "ab"[i % 2], "ab"[i % 3 == 0], left="a") for i in range(40)]
    report = report_of(three()) | {"annotators": agreement_summary(votes)}
    write_files(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Annotators" in text and "Krippendorff's alpha" in text and "20 of 20 pairs" in text
    print_report(report, tmp_path)
    assert "Annotators: Krippendorff's alpha" in capsys.readouterr().out


def test_hostile_names_print_as_they_are(tmp_path, capsys):
    report = example()
    report["methods"]["ppo"]["swept"] = "[red]x[/red]"
    print_report(report, tmp_path)
    assert "[red]x[/red]" in capsys.readouterr().out


def test_intervals_have_the_decimals_that_their_width_calls_for():
    assert interval(number(0.1234, 0.03, 0.21), signed=True) == "+0.12 [0.03, 0.21]"
    assert interval(number(12.34, 2.0, 22.0)) == "12.3 [2.0, 22.0]"
    assert interval(number(0.5, None, None)) == "0.50"
    # a bound next to 0 is not 0.00
    assert interval(number(0.2, 0.004, 0.396)) == "0.200 [0.004, 0.396]"
    assert digits(-0.0001, number(0.0, -0.5, 0.5)) == "0.00"
    assert interval(mirrored(number(0.12, 0.03, 0.21))) == "-0.12 [-0.21, -0.03]"
    assert largest_difference(number(0.1, -0.3, 0.2)) == "0.30"
    assert interval(None) == "–"


def test_short_numbers_and_lists():
    shown = [amount(x) for x in (None, 0, 512, 4096, 1.25e6, 3.2e12, 3.2e15)]
    assert shown == ["–", "0", "512", "4.1k", "1.25M", "3.2T", "3.2P"]
    assert [listed(["a", "b", "c"][:n]) for n in (3, 2, 1, 0)] == [
        "a, b and c",
        "a and b",
        "a",
        "none",
    ]


def test_a_report_of_an_earlier_version_has_todays_names(tmp_path):
    (tmp_path / "report.json").write_text('{"foundation": {"method": "sft"}, "kind": "runs"}')
    found = read_report(tmp_path / "report.json")
    assert found == {"initial_policy": {"method": "sft"}, "kind": "runs"}
