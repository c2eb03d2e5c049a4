"""Brand voice: a specification in YAML that scores texts, explains itself and rewrites by rule.

`scorer` reads the file and scores; `parts` and `form` hold its rules, `phrases` and `nearness` how
words are found; `words` explains, `check` and `score` are the commands. The seam to the rest of the
project is `scorer.voice_scorer`, one scorer among others.
"""
