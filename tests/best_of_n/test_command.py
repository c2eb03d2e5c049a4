"""`rlhf reward best-of-n` on a tiny policy: what is made once, what is refused, what it writes."""

import json

import pytest
import yaml

import rlhf.best_of_n.samples as samples
from rlhf.best_of_n.command import BestOfNConfig, best_of_n
from rlhf.data.records import Scores, prompt_group
from rlhf.errors import UserError
from rlhf.row_file import add_rows, read_rows, start_rows

GOLD = [{"rule": "length", "low": 2, "high": 6}]


@pytest.fixture
def reward(sft_path, tmp_path):
    """The folder of a reward model's run, as far as the command looks at it."""
    folder = tmp_path / "reward"
    folder.mkdir()
    options = {"model_name_or_path": sft_path, "max_response_length": 6, "max_prompt_length": 64}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"where is parcel {i}?", "split": "test"} for i in range(12)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


class Scorers:
    """Stands in for reward/: the proxy is the sum of an answer's ids, gold the number of letters."""

    def __init__(self):
        self.scored = 0

    def build(self, specs, tokenizer):
        def score(given):
            self.scored += len(given)
            proxy = [float(sum(ids)) for ids in given.response_ids]
            gold = [float(len(text)) for text in given.responses]
            return Scores(proxy, {"proxy": proxy, "gold": gold})

        return score


def call(reward, prompts, scorers=None, **more):
    config = BestOfNConfig(
        run=str(reward),
        prompts=[str(prompts)],
        **({"gold": GOLD, "samples": 4, "batch_size": 4} | more),
    )
    return best_of_n(config, (scorers or Scorers()).build, lambda specs, where: None)


def test_what_it_writes(reward, prompts, sft_path, capsys):
    result = call(reward, prompts)
    folder = reward / "best-of-n"
    assert result["policy"] == sft_path and (result["prompts"], result["samples"]) == (12, 4)
    assert [row["n"] for row in result["curve"]] == [1, 2, 4]
    answers = read_all(folder / "answers.jsonl")
    assert len(answers) == 12 and all(len(row["responses"]) == 4 for row in answers)
    # n = 1 is the mean of all, n = 4 the answer with the highest proxy
    gold = [[len(text) for text in row["responses"]] for row in answers]
    mean = sum(map(sum, gold)) / 48
    scores = [row["scores"]["gold"]["mean"]["estimate"] for row in result["curve"]]
    assert scores[0] == pytest.approx(mean)
    best = []
    for row, own in zip(answers, gold, strict=True):
        sums = [sum(ids) for ids in row["ids"]]
        top = [g for g, value in zip(own, sums, strict=True) if value == max(sums)]
        best.append(sum(top) / len(top))
    assert scores[-1] == pytest.approx(sum(best) / 12)
    assert json.loads((folder / "best_of_n.json").read_text())["prompts"] == 12
    page = (folder / "best_of_n.md").read_text()
    assert "upper bound" in page and "best_of_n.png" in page
    # which scorer each name stands for
    assert f'proxy: `{{"model": "{reward}"}}`; gold: `{{"rule": "length", "low": 2' in page
    assert (folder / "best_of_n.png").is_file() and (folder / "best_of_n.svg").is_file()
    assert "gold:" in capsys.readouterr().out


def read_all(file):
    return [json.loads(line) for line in file.read_text().splitlines()][1:]


def test_a_call_that_was_cut_off_goes_on_and_gives_the_same(
    reward, prompts, monkeypatch, tmp_path, capsys
):
    whole, scorers = tmp_path / "whole", Scorers()
    call(reward, prompts, output_dir=str(whole))
    # 8 batches of 4 answers are 8 prompts: the first part is written, the second fails
    place, add = tmp_path / "cut", samples.add_rows
    written = []

    def add_once(file, rows):
        if written:
            raise KeyboardInterrupt
        add(file, rows)
        written.append(file)

    monkeypatch.setattr(samples, "add_rows", add_once)
    with pytest.raises(KeyboardInterrupt):
        call(reward, prompts, scorers, output_dir=str(place))
    assert len(read_all(place / "answers.jsonl")) == 8 and scorers.scored == 0
    monkeypatch.setattr(samples, "add_rows", add)
    with open(place / "answers.jsonl", "a") as file:
        file.write('{"prompt": [{"ro')
    call(reward, prompts, scorers, output_dir=str(place))
    for name in ("answers.jsonl", "scores.jsonl"):
        assert (place / name).read_text() == (whole / name).read_text()
    assert scorers.scored == 48
    # and nothing is made a third time
    call(reward, prompts, scorers, output_dir=str(place))
    assert scorers.scored == 48


def test_other_scorers_score_the_same_answers(reward, prompts, capsys, monkeypatch):
    scorers = Scorers()
    call(reward, prompts, scorers)
    monkeypatch.setattr(samples, "answering", None)
    other = [{"rule": "length", "low": 3, "high": 6}]
    call(reward, prompts, scorers, gold=other)
    assert scorers.scored == 96 and "scored again" in capsys.readouterr().out


def test_answers_drawn_otherwise_are_not_mixed_with_others(reward, prompts):
    call(reward, prompts)
    with pytest.raises(UserError, match=r"answers\.jsonl: holds answers .* Choose another"):
        call(reward, prompts, temperature=0.5)


def test_json_is_printed_alone(reward, prompts, capsys):
    learnt = prompt_group([{"role": "user", "content": "where is parcel 3?"}])
    (reward / "trained_on.txt").write_text(f"{learnt}\n")
    call(reward, prompts, json=True)
    assert json.loads(capsys.readouterr().out)["samples"] == 4


def test_prompts_that_the_reward_model_has_learnt_from_are_left_out(reward, prompts, capsys):
    learnt = prompt_group([{"role": "user", "content": "where is parcel 3?"}])
    (reward / "trained_on.txt").write_text(f"{learnt}\n")
    assert call(reward, prompts)["prompts"] == 11
    assert "1 of 12 test prompts left out" in capsys.readouterr().out


def test_the_reward_model_cannot_judge_itself(reward, prompts):
    with pytest.raises(UserError, match="is the reward model itself"):
        call(reward, prompts, gold=[{"model": str(reward)}])
    with pytest.raises(UserError, match="'proxy' is the name"):
        call(reward, prompts, gold=[{"rule": "length", "name": "proxy"}])
    with pytest.raises(UserError, match="'gold' is empty"):
        call(reward, prompts, gold=[])


def test_a_run_that_does_not_name_its_policy_needs_one(reward, prompts, sft_path):
    (reward / "config.yaml").write_text("max_response_length: 6\nmax_prompt_length: 64\n")
    with pytest.raises(UserError, match="--policy runs/sft"):
        call(reward, prompts)
    assert call(reward, prompts, policy=sft_path)["policy"] == sft_path


def test_rows_of_a_file_that_was_cut_off(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file, {"seed": 0}) is None
    start_rows(file, {"seed": 0})
    add_rows(file, [{"a": 1}, {"a": float("nan")}])
    with open(file, "a") as stream:
        stream.write('{"a": ')
    assert [str(row["a"]) for row in read_rows(file, {"seed": 0})] == ["1", "nan"]
    assert file.read_text().endswith("\n")
    assert read_rows(file, {"seed": 1}) is None
