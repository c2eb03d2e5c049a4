"""The tutorial of docs/brand-voice.md, executed: from a voice to an adapter that ships."""

import json

import yaml

from rlhf.brand.gates import KINDS
from rlhf.brand.prompts import fill
from tests.brand import tutorial


def test_the_tutorial_ends_with_the_verdict_that_the_page_shows(tmp_path):
    commands, shown = tutorial.RUN.search(tutorial.PAGE.read_text(encoding="utf-8")).groups()
    found = tutorial.verdict_of(commands, tmp_path)
    # numbers differ a little between machines
    assert found.splitlines()[0] == shown.splitlines()[0]
    assert tutorial.gates_of(found) == tutorial.gates_of(shown)
    assert [name for _, name in tutorial.gates_of(shown)] == list(KINDS)
    assert shown.startswith("SHIP, by simulated votes: no person has judged these answers.")

    run = tmp_path / "runs/brand"
    verdict = json.loads((run / "verdict.json").read_text())
    assert verdict["ship"] and verdict["votes"]["source"] == "simulated"
    assert (run / "report.md").read_text().startswith(f"**{verdict['verdict']}**\n")
    assert (run / "export/merged/export.json").is_file()


def test_its_templates_give_each_prompt_once_with_its_facts():
    page = tutorial.PAGE.read_text(encoding="utf-8")
    block = page.partition("# brand.yaml\n")[2].partition("```")[0]
    rows = fill(yaml.safe_load(block)["templates"])
    # eight templates, twelve items, eight colours
    assert len(rows) == 8 * 12 * 8
    assert all({"item", "remedy"} <= row["metadata"].keys() for row in rows)
