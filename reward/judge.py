"""A scorer that asks a language model behind OpenAI's chat protocol for a grade of each response.

    {openai: http://localhost:8000/v1, model: judge, guide: configs/voices/shop.yaml, highest: 10}

rlhf/judge has the client, the prompt and how an answer is read.
"""

import math

from reward.specs import JudgeSpec
from rlhf.data.records import Samples, Scorer, Scores
from rlhf.judge.client import Client
from rlhf.judge.judges import score_answers


def judge_scorer(spec: JudgeSpec) -> Scorer:
    """Return a scorer that gives each sample the judge's grade, 1 to `highest`.

    The part `unreadable` is 1 where the judge gave no grade: the score is then `spec.unreadable`,
    or nan, which BadScore reports. Raises UserError when the endpoint refuses or does not respond.
    """
    client = Client(spec, f"scorer '{spec.name}'")
    replacement = math.nan if spec.unreadable is None else spec.unreadable

    def score(samples: Samples) -> Scores:
        grades = score_answers(client, samples.prompts, samples.responses)
        total, unreadable = [], []
        for grade in grades:
            total.append(replacement if grade is None else grade)
            unreadable.append(float(grade is None))
        return Scores(total, {"unreadable": unreadable})

    return score
