"""Parts of a brand voice about form, worked by hand; languages, channels and tone."""

import math
import re

import pytest

from reward.compose import build_scorer
from reward.specs import parse_specs
from reward.voice.form import EMOJI, count_syllables
from reward.voice.phrases import Text
from reward.voice.scorer import Voice, load_voice, voice_scorer
from rlhf.data.records import Samples, Scores
from rlhf.errors import UserError


def voice(**sections):
    return Voice.model_validate({"name": "X", **sections})


def mark(name, text, **keys):
    return getattr(voice(**{name: keys}), name).mark(Text(text), {}, exact=False)


def write(tmp_path, text):
    path = tmp_path / "brand.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def samples(*texts, metadata=None):
    n = len(texts)
    prompts, ids = [[{"role": "user", "content": "?"}]] * n, [[1]] * n
    return Samples(prompts, list(texts), ids, ids, [True] * n, metadata or [{}] * n)


@pytest.mark.parametrize(
    ("word", "count"),
    [("cat", 1), ("apple", 2), ("mile", 1), ("walked", 1), ("wanted", 2), ("reading", 2), ("the", 1),
     ("banana", 3), ("tent's", 1), ("rhythms", 1)],
)  # fmt: skip
def test_syllables(word, count):
    assert count_syllables(word) == count


def test_flesch_kincaid_grade_by_hand():
    # 6 words, 1 sentence, 6 syllables: 0.39 * 6 + 11.8 * 1 - 15.59 = -1.45, which counts as 0
    part = voice(reading={"max_level": 4}).reading
    assert part.level(Text("The cat sat on the mat.")) == pytest.approx(-1.45)
    # 8 words, 2 sentences, 15 syllables (twice ba-na-na 3, a-bout, ap-ples and wan-ted 2):
    # 0.39 * 4 + 11.8 * 15 / 8 - 15.59 = 8.095; (4 / 8.095)^3
    text = "A banana about apples. We wanted a banana."
    assert part.level(Text(text)) == pytest.approx(8.095)
    assert mark("reading", text, max_level=4).score == pytest.approx((4 / 8.095) ** 3)
    assert mark("reading", text, max_level=9).score == 1.0


def test_lix_by_hand():
    # 8 words, 2 sentences, "flicken" and "wasserdicht" of more than six letters: 4 + 25
    part = voice(reading={"formula": "lix", "max_level": 30}, language="de").reading
    assert part.level(Text("Wir flicken das Zelt. Es ist bald wasserdicht.")) == pytest.approx(29)


def test_each_wrong_pronoun_leaves_half():
    assert mark("person", "We mend our tents", speaks_as="we").score == 1.0
    assert mark("person", "I think my tents are yours", speaks_as="we").score == 0.25
    assert mark("person", "We mend tents", speaks_as="nobody").score == 0.5
    # nobody speaks in "i.e." and "the US", but somebody does in "us"
    assert mark("person", "Tents, i.e. shelters, of the US", speaks_as="nobody").score == 1.0
    assert mark("person", "They sell us tents", speaks_as="nobody").score == 0.5


def test_a_phrase_that_denies_a_claim_may_be_asked_for():
    rules = {"closing": {"forms": ["no promises"]}, "claims": {"forbidden": ["promise"]}}
    assert voice(**rules).score("It is dry. No promises")["total"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'closing' asks for 'no promises', which 'claims'"):
        voice(**rules, credit="exact")


def test_rules_are_said_in_words():
    rules = {"exclamation_marks": 1, "ellipses": 1, "dashes": 2, "capitals": 0}
    said = "at most 1 exclamation mark, at most 2 dashes, at most 1 ellipsis, no words in capitals"
    assert voice(punctuation=rules).punctuation.explain() == f"the text has {said}"


def test_the_reader_is_addressed_or_not():
    assert mark("person", "Bring your tent", addresses_reader=True).score == 1.0
    assert mark("person", "Bring the tent", addresses_reader=True).score == 0.5
    assert mark("person", "You bring your tent", addresses_reader=False).score == 0.25


def test_contractions_by_their_share():
    # contracted: we'll, don't; whole: it is, cannot
    text = "We'll mend it and don't ask. It is torn, and cannot wait"
    assert mark("contractions", text, style="use").score == 0.5
    assert mark("contractions", text + ", I am sure", style="avoid").score == pytest.approx(3 / 5)
    assert mark("contractions", "Bring Ann's tent", style="avoid").score == 1.0


def test_emoji_are_counted_as_people_see_them():
    family, flag, thumb = (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea",
        "👍🏽",
    )
    assert len(EMOJI.findall(f"a {family} b {flag} c {thumb} d ☀️ e")) == 4
    assert mark("emoji", "no emoji (tm) 1 2 3 ©", max=0).score == 1.0
    assert mark("emoji", f"{thumb}{thumb} hm {family}", max=1).score == 0.25
    assert mark("emoji", f"{thumb} hm", min=2).score == 0.5
    # a skin tone does not make it another one; the flag is not allowed
    assert mark("emoji", f"{thumb} hm {flag}", allowed=["👍"]).score == 0.5


def test_each_sign_too_many_leaves_half():
    rules = {"exclamation_marks": 1, "ellipses": 0, "dashes": 0, "capitals": 0}
    assert mark("punctuation", "Dry! well-made, ok", **rules).score == 1.0
    assert mark("punctuation", "Dry! Light!! Warm", **rules).score == 0.25
    assert mark("punctuation", "Dry… light", **rules).score == 0.5
    assert mark("punctuation", "Dry — light – warm - and -- cheap", **rules).score == 0.0625
    assert mark("punctuation", "WOW NOW SALE EVER", **rules).score == 0.25
    assert mark("punctuation", "A!!!???", question_marks=3).score == 1.0


GERMAN = """
name: Lärche
language: de
greeting: {forms: [guten tag, "grüß dich {name}"]}
closing: {forms: [bis bald]}
use: {words: [wandern, hütte], at_least: 1}
avoid: {words: [billig]}
claims: {forbidden: [unzerstörbar], negations: [nicht]}
sentences: {max_words: 12}
reading: {formula: lix, max_level: 45}
emoji: {max: 0}
"""


def test_another_language_is_scored_by_what_needs_no_english(tmp_path):
    german = load_voice(write(tmp_path, GERMAN))
    scores = german.score(
        "Grüß dich Jörg! Die Hütte ist nicht unzerstörbar. Bis bald", {"name": "Jörg"}
    )
    assert scores == dict.fromkeys(scores, pytest.approx(1.0))
    # nothing is inflected: "billiger" is not "billig", as "Wandern" is "wandern"
    assert german.score("billiger, billigs", {})["avoid"] == 1.0
    assert german.score("Das Wandern ist heute schön", {})["use"] == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("language: de\nperson: {speaks_as: we}", "'person' needs English, and the language is 'de'"),
        ("language: fr\ncontractions: {style: use}", "'contractions' needs English"),
        ("language: de\nreading: {max_level: 8}", "use formula: lix"),
        ("language: de\nuse: {words: [a], inflect: true}", "knows the inflections of English"),
        ("language: de\ntask: {facts: {x: {inflect: true}}}", "'task.facts.x': inflect"),
        ("language: ja\nuse: {words: [a]}", "language: 'ja' is written without blanks"),
        ("language: German\nuse: {words: [a]}", "expected a code such as en, de"),
        ("credit: exakt\nuse: {words: [a]}", "Did you mean 'exact'?"),
        ("reading: {max_levle: 3}", "reading: unknown key 'max_levle'. Did you mean 'max_level'?"),
        ("person: {}", "give speaks_as (we, i or nobody), addresses_reader, or both"),
        ("person: {speaks_as: us}", "person.speaks_as: found 'us', expected 'we', 'i' or 'nobody'"),
        ("punctuation: {}", "limits no sign"),
        ("punctuation: {exclamations: 1}", "Did you mean 'exclamation_marks'?"),
        ("emoji: {min: 2, max: 1}", "'emoji': min 2 is above max 1"),
        ("tone: {sliders: {warm: 2}}", "sliders.warm: found 2, expected a number from 0 to 1"),
        ("tone: {warm: 0.5}", "tone: unknown key 'warm'"),
        ("use: {words: [a]}\nexamples: [{dos: x}]", "examples, item 1: unknown key 'dos'. Did you mean 'do'?"),
        ("use: {words: [a]}\nexamples: [{why: x}]", "has no text; give 'do', 'dont' or both"),
        ("use: {words: [a]}\nexamples: [{do: x, channel: mial}]\nchannels: {mail: {}}", "Did you mean 'mail'?"),
        ("use: {words: [a]}\nchannels: {mail: {lenght: {}}}", "channels.mail: unknown key 'lenght'"),
        ("use: {words: [a]}\nchannels: {mail: {credit: exact}}", "belongs to the whole file"),
        ("use: {words: [a]}\nchannels: {mail: {use: {at_least: 2}}}", "channels.mail: 'use': at_least 2"),
        ("greeting:\nuse: {words: [a]}", "greeting: found None, expected a mapping"),
        # what one part asks for and another punishes
        ("greeting: {forms: [hi there!]}\npunctuation: {exclamation_marks: 0}", "'punctuation' punishes"),
        ("greeting: {forms: [we're here]}\ncontractions: {style: avoid}", "'contractions' punishes"),
        ("closing: {forms: [I remain yours]}\nperson: {speaks_as: we}", "'person' punishes"),
        ("closing: {forms: ['bye 👋']}\nemoji: {max: 0}", "'emoji' punishes"),
        ("use: {words: [cheap]}\navoid: {words: [cheap]}", "'use' asks for 'cheap', which 'avoid' punishes"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_refused(tmp_path, text, said):
    path = write(tmp_path, f"name: X\n{text}")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        load_voice(path)
    assert str(path) in str(caught.value)


CHANNELS = """
name: X
greeting: {forms: [hello]}
length: {min_words: 4, max_words: 8, weight: 2}
channels:
  email: {length: {max_words: 100}, truncated: 0.5}
  chat: {greeting: , variety: }
"""


def test_a_channel_changes_keys_of_sections_and_leaves_out_others(tmp_path):
    voice = load_voice(write(tmp_path, CHANNELS))
    email = voice.channels["email"]
    assert (email.length.min_words, email.length.max_words, email.length.weight) == (4, 100, 2)
    text = "hello " + "a b c d e f g h i j".strip()
    assert voice.score(text, {})["length"] == pytest.approx((8 / 11) ** 3)
    assert voice.score(text, {"channel": "email"})["length"] == 1.0
    assert set(voice.score(text, {"channel": "chat"})) == {"length", "variety", "total"}
    # chat without a greeting: variety has no weight; an unknown channel is the voice itself
    assert voice.score("no greeting here ok", {"channel": "chat"})["total"] == pytest.approx(1.0)
    assert voice.score(text, {"channel": "letter"}) == voice.score(text, {})
    assert voice.score(text, {"channel": "email"}, ended=False)["total"] == pytest.approx(
        voice.score(text, {"channel": "email"})["total"] / 2
    )


def test_a_scorer_has_a_channel_for_prompts_that_name_none(tmp_path):
    path = write(tmp_path, CHANNELS)
    texts = samples(
        "no greeting here ok", "no greeting here ok", metadata=[{}, {"channel": "email"}]
    )
    scores = build_scorer([{"voice": str(path), "channel": "chat"}])(texts)
    assert scores.total[0] == pytest.approx(1.0) and scores.total[1] < 0.5
    with pytest.raises(UserError, match=r"no channel 'mail'\. Did you mean 'email'\?"):
        build_scorer([{"voice": str(path), "channel": "mail"}])


TONE = """
name: X
length: {min_words: 1, weight: 1}
variety: {weight: 0}
tone: {weight: 1, sliders: {warm: 1.0, formal: 0.5}}
"""


def test_tone_is_what_a_judge_measures_and_left_out_without_one(tmp_path, capsys):
    path = write(tmp_path, TONE)
    asked = []

    def judge(samples):
        asked.append(samples.metadata)
        return Scores([0.0, 0.0], {"judge/warm": [0.6, math.nan], "judge/formal": [1.0, 0.5]})

    scores = voice_scorer(path, judge=judge)(samples("hi", "ho"))
    assert asked == [[{"tone": ["warm", "formal"]}] * 2]
    # 1 - |0.6 - 1| = 0.6 and 1 - |1 - 0.5| = 0.5; each has half the weight of tone: 0.25 of all
    assert scores.breakdown["voice/tone/warm"][0] == pytest.approx(0.6)
    assert scores.breakdown["voice/tone/formal"] == pytest.approx([0.5, 1.0])
    assert math.isnan(scores.breakdown["voice/tone/warm"][1])
    assert scores.total[0] == pytest.approx((0.604 * 0.505) ** 0.25)
    assert scores.total[1] == pytest.approx(1.0)

    alone = voice_scorer(path)(samples("hi", "ho"))
    assert alone.total == pytest.approx([1.0, 1.0]) and set(alone.breakdown) == {
        "voice/length",
        "voice/variety",
    }
    assert "'tone' is left out of the score, because no judge is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("breakdown", "said"),
    [
        ({"warm": [1.0]}, "gave warm, and not the slider 'formal'"),
        ({"warm": [1.5], "formal": [0.5]}, "gave 1.5 for the slider 'warm'"),
        ({}, "gave no parts"),
    ],
)
def test_a_judge_that_measures_something_else_is_refused(tmp_path, breakdown, said):
    scorer = voice_scorer(write(tmp_path, TONE), judge=lambda samples: Scores([0.0], breakdown))
    with pytest.raises(UserError, match=re.escape(said)):
        scorer(samples("hi"))


def test_a_judge_without_a_tone_to_measure_is_refused(tmp_path):
    path = write(tmp_path, "name: Plain\nlength: {max_words: 9}")
    with pytest.raises(UserError, match="has no 'tone' for the judge to measure"):
        voice_scorer(path, judge=lambda samples: Scores([0.0]))


def test_the_judge_of_a_voice_is_a_scorer_with_parts(tmp_path, monkeypatch):
    (tmp_path / "my_tone.py").write_text(
        "from rlhf.data.records import Scores\n"
        "def tone(samples):\n"
        "    n = len(samples.responses)\n"
        "    return Scores([0.0] * n, {name: [0.5] * n for name in samples.metadata[0]['tone']})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = {
        "voice": str(write(tmp_path, TONE)),
        "judge": {"function": "my_tone:tone"},
        "name": "brand",
    }
    scores = build_scorer([spec])(samples("hi"))
    assert scores.breakdown["brand/tone/warm"] == [0.5]
    for wrong in ({"model": "runs/reward"}, {"rule": "length"}, {"voice": "x.yaml"}):
        with pytest.raises(UserError, match="tone needs one for each slider"):
            parse_specs([spec | {"judge": wrong}])
    with pytest.raises(UserError, match="judge, entry 1: found htpp"):
        parse_specs([spec | {"judge": {"htpp": "x"}}])
