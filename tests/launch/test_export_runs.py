"""Exports of the runs of the programs, with their cards."""

import pytest

from rlhf.export.run import ExportConfig, export


@pytest.mark.parametrize("program", ["sft", "dpo", "ppo"])
def test_the_policy_of_every_program_is_exported_with_a_card(program, runs, tmp_path):
    run = str(runs / program)
    facts = export(ExportConfig(run=run, to="merged", out=str(tmp_path / "out"), check=4))
    assert facts["check"]["answers_equal"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (f"# {program}: {program} of base", "library_name: transformers", "vllm serve ."):
        assert text in card
    assert "## Result of the run" in card and "## Data" in card and "kl_per_token" in card
    assert "eval/kl/sequence" in card and f"launch/{program}.py" in card


def test_a_reward_model_is_no_policy(runs, tmp_path):
    from rlhf.errors import UserError

    with pytest.raises(UserError, match="a reward model, not a policy"):
        export(ExportConfig(run=str(runs / "reward"), to="merged", out=str(tmp_path / "out")))
