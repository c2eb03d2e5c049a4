"""The vocabulary: every metric's name, formula, healthy range and remedy. docs/metrics.md is
generated from here.

    python -m rlhf.runs.metrics > docs/metrics.md

`Tracker.log` takes no other names, so that SFT, reward, DPO, PPO and their evaluations can be laid
over each other.
"""

import difflib
from typing import NamedTuple


class Metric(NamedTuple):
    """What a number is, where it should lie, and what to do when it does not."""

    formula: str
    healthy: str
    remedy: str


METRICS: dict[str, Metric] = {
    # distance to the reference
    "kl/sequence": Metric(
        "sum over a response's tokens of log p - log p_ref (k1), mean over responses, nats",
        "exactly 0 at step 0; 2-15 while learning",
        "above 30: raise kl_coef (DPO: beta) or lower learning_rate; stuck at 0: nothing is being learnt",
    ),
    "kl/sequence_se": Metric(
        "standard error of kl/sequence, clustered by the prompts' groups; missing with fewer than two of them",
        "0 at step 0; well below kl/sequence. With few prompts twice it holds less than 95 % (8 prompts: 91 %)",
        "more prompts in a rollout or an evaluation; more samples of the same prompts help little",
    ),
    "kl/token": Metric(
        "the same sum over all response tokens of the batch, divided by their number, nats",
        "0 at step 0; below 0.2",
        "above 0.5: as for kl/sequence; below 0 for long: the estimator's noise, take more samples",
    ),
    "kl/k3": Metric(
        "sum over a response's tokens of exp(-d) - 1 + d, d = log p - log p_ref, mean over responses; never negative",
        "near kl/sequence",
        "far above kl/sequence: single tokens the reference holds far likelier; look at the sample table",
    ),
    "kl/coef": Metric(
        "weight of the KL in each token's reward, as the controller has it now",
        "constant if fixed; settles within tens of steps if adaptive",
        "grows without end: the target KL is out of reach, lower learning_rate",
    ),
    "kl/penalty": Metric(
        "as kl/sequence, to the moving reference (reference_ema) that the penalty is measured to, nats a response",
        "below kl/sequence",
        "near 0 while kl/sequence grows: the reference follows so fast that it holds nothing, raise reference_ema",
    ),
    # scores
    "score/total": Metric(
        "mean over responses of the score that is optimised, before the KL; in PPO after normalisation, clipping, "
        "EOS rule and length penalty",
        "rises, then flattens; the gold or referee score must rise with it",
        "rises alone: the reward model is being exploited; stop earlier or raise kl_coef",
    ),
    "score/std": Metric(
        "standard deviation of score/total over the responses of the batch",
        "well above 0",
        "near 0: the scorer cannot tell the responses apart, or the policy says one thing only",
    ),
    "score/length_correlation": Metric(
        "Pearson's r of score/raw and length over the responses of the rollout; missing where one does not vary",
        "within 0.5 of 0",
        "above 0.7: the score is mostly length; see the reward report's length bias, set length_penalty",
    ),
    "score/raw": Metric(
        "mean over responses of the scorers' weighted sum, before normalisation, clipping, EOS rule and length penalty",
        "rises, then flattens",
        "rises while score/total does not: responses do not end, or the length penalty outweighs the gain",
    ),
    "score/mean_running": Metric(
        "mean of score/raw over all responses of the run so far (normalize_scores)",
        "follows score/raw slowly",
        "",
    ),
    "score/std_running": Metric(
        "standard deviation of the same; scores are divided by it",
        "steady after some steps",
        "grows on: single scores are far off, look at them and set score_clip",
    ),
    # responses
    "response/length": Metric(
        "response tokens of a response with its EOS, mean",
        "near the data's; no steady drift",
        "drifts up with the score: the scorer likes length; see the reward report's length bias",
    ),
    "response/ended": Metric(
        "share of responses that sampled EOS within the token limit",
        "above 0.95",
        "lower: raise max_response_length, train SFT on EOS, lower missing_eos_score",
    ),
    "response/eos_probability": Metric(
        "probability of the EOS token where given answers end, mean over up to 64 held-out answers (SFT)",
        "rises from near 0; above 0.5 at the end",
        "stays near 0: few responses will end; the EOS row is not trained (train_eos), or the data does not end in it",
    ),
    "response/entropy": Metric(
        "entropy of the policy's next-token distribution, mean over the sampled tokens, nats",
        "falls slowly; above a third of its first value",
        "collapses: raise kl_coef, lower learning_rate or num_ppo_epochs",
    ),
    "response/repetition": Metric(
        "share of a response's token 4-grams that occurred earlier in it, mean over responses",
        "below 0.05",
        "above 0.2: repetitive responses; look at the samples, raise kl_coef",
    ),
    # PPO
    "ppo/clip_fraction": Metric(
        "share of response tokens whose loss the clip changed (the clipped branch is the smaller)",
        "0.01-0.2",
        "above 0.3: lower learning_rate or num_ppo_epochs; 0 throughout: the steps are too small",
    ),
    "ppo/ratio": Metric(
        "p / p_old, mean over response tokens",
        "1 before the first update; 0.98-1.02 after",
        "not 1 before the first update: old log-probabilities come from another model, mask or temperature",
    ),
    "ppo/ratio_first": Metric(
        "the same over the first minibatch of a step, before any update",
        "1 within 1e-5 (fp32) or 1e-2 (bf16)",
        "further away: the engine's weights are stale or its sampling differs (rollout/logprob_gap)",
    ),
    "ppo/approx_kl": Metric(
        "mean over response tokens of r - 1 - log r, r = p / p_old: how far this step's updates went, nats",
        "below 0.02",
        "above 0.05: lower learning_rate or num_ppo_epochs",
    ),
    "ppo/advantage_mean": Metric(
        "mean advantage over the rollout's response tokens, before whitening",
        "near 0 once the critic follows",
        "far from 0 for long: use critic_trunk own, or raise value_learning_rate there",
    ),
    "ppo/advantage_std": Metric(
        "standard deviation of the same", "above 0", "near 0: no signal; see score/std"
    ),
    "ppo/reward": Metric(
        "sum of a response's token rewards (score minus KL penalty), mean over responses",
        "rises",
        "falls while score/total rises: the KL costs more than the score brings, lower kl_coef",
    ),
    "ppo/updates": Metric(
        "optimizer steps made in this rollout, those a guard skipped not counted",
        "num_ppo_epochs * num_mini_batches",
        "fewer: a guard skipped some or ended the rollout's updates; see guard/",
    ),
    # guards; counts are since the start of the run
    "guard/skipped_updates": Metric(
        "optimizer steps left out because a number was not finite or the ratio exploded",
        "0",
        "grows: lower learning_rate; the events in result.json say which number it was",
    ),
    "guard/skipped_rollouts": Metric(
        "rollouts that nothing was learnt from because a score was not finite",
        "0",
        "mend the scorer the event names",
    ),
    "guard/shortened_rollouts": Metric(
        "rollouts whose later updates were left out on target_kl",
        "0, or a small share of the steps",
        "grows at every step: lower learning_rate or num_ppo_epochs, or raise target_kl",
    ),
    "guard/warnings": Metric("warnings given", "0", "read them in the log or in result.json"),
    "guard/rollbacks": Metric("returns to an earlier checkpoint", "0", "lower learning_rate"),
    "guard/rate_scale": Metric(
        "factor on every learning rate, halved by each rollback",
        "1",
        "start again with a learning_rate this low",
    ),
    # critic
    "value/explained_variance": Metric(
        "1 - var(return - value) / var(return) over the rollout's response tokens",
        "rises to 0.1-0.3 (fitted critic) or 0.3-0.9 (critic_trunk own)",
        "below 0 after 20 steps: use critic_trunk own, or raise value_learning_rate there; near 1 from the start: "
        "suspect label leakage",
    ),
    "value/mean": Metric(
        "mean value over response tokens",
        "near value/return",
        "far away: use critic_trunk own, or raise value_learning_rate there",
    ),
    "value/return": Metric(
        "mean return over response tokens", "rises with the score", "see score/total"
    ),
    "value/clip_fraction": Metric(
        "share of response tokens where the clipped value loss is the larger one",
        "below 0.2",
        "above 0.5: raise value_clip_range or lower value_learning_rate",
    ),
    "value/learning_rate": Metric(
        "learning rate of the critic's adapter and head", "follows its schedule", ""
    ),
    # optimisation
    "loss/total": Metric(
        "what backward starts from, mean over the step",
        "SFT, reward, DPO: falls; PPO: says little",
        "not finite: PPO's guards skip the update; SFT evaluation loss rises: fewer epochs",
    ),
    "loss/policy": Metric(
        "-mean of min(r A, clip(r) A) over response tokens",
        "near 0, slightly negative",
        "read ppo/ and kl/ instead",
    ),
    "loss/value": Metric(
        "half the squared error of the value, clipped as in PPO, mean over response tokens",
        "falls, then follows the score's spread",
        "grows: lower value_learning_rate",
    ),
    "loss/kl": Metric(
        "kl_coef times the KL estimate, mean over response tokens, where it is a term of the loss (kl_in: loss)",
        "above 0 and small beside 1; k1 may be negative",
        "grows: see kl/sequence",
    ),
    "loss/entropy": Metric(
        "-entropy_coef times the entropy, mean over response tokens",
        "below 0, steady",
        "falls and falls: the bonus is all that is learnt, lower entropy_coef",
    ),
    "loss/ptx": Metric(
        "ptx_coef times -log p of given answers, mean over their response tokens",
        "near its first value",
        "rises: the policy forgets SFT, raise ptx_coef or lower learning_rate",
    ),
    "grad/norm": Metric(
        "joint L2 norm of all gradients before clipping",
        "steady, 0.1-10",
        "spikes above 100 or not finite: lower learning_rate, look at the batch; exactly 0: nothing is trainable",
    ),
    "grad/norm_policy": Metric(
        "L2 norm of the policy's gradients before clipping", "as grad/norm", "as grad/norm"
    ),
    "grad/norm_value": Metric(
        "L2 norm of the critic's gradients before clipping; grad/norm^2 is the sum of both squares",
        "as grad/norm",
        "much above the policy's: clipping to the joint norm shrinks the policy's gradient too, lower vf_coef",
    ),
    "learning_rate": Metric(
        "learning rate of the (policy's) parameters", "follows its schedule", ""
    ),
    "epoch": Metric("passes over the training data", "", ""),
    # SFT and DPO on given text
    "token/accuracy": Metric(
        "share of the data's response tokens that are the model's likeliest token",
        "rises to 0.5-0.8",
        "near 1: the data is memorised or trivially repetitive",
    ),
    "token/entropy": Metric(
        "entropy of the next-token distribution, mean over the data's response tokens, nats",
        "falls, then flattens",
        "near 0: memorised, fewer epochs",
    ),
    # reward model
    "reward/accuracy": Metric(
        "share of pairs with r(chosen) > r(rejected); a tie counts as half",
        "0.6-0.9 on held-out pairs",
        "0.5: labels or templates are broken; above 0.95: look for a shortcut such as length",
    ),
    "reward/margin": Metric(
        "r(chosen) - r(rejected), mean over pairs",
        "0.5-3",
        "grows while accuracy does not: over-confident, fewer epochs or label smoothing",
    ),
    "reward/log_loss": Metric(
        "-log of the probability of the labels, mean over pairs, nats: the loss without margin, weights, smoothing "
        "and centring; of three outcomes with ties: davidson, of score and length with length_correction",
        "falls below 0.693; on held-out pairs it falls, then rises",
        "rises on held-out pairs: set early_stopping_patience; above 0.693 there: over-confident, or wrong labels",
    ),
    "reward/tie_parameter": Metric(
        "v of Davidson's model: equal scores tie with probability v / (2 + v) (ties: davidson)",
        "settles within some tens of steps",
        "grows on: the scores fit the training pairs ever more surely; fewer epochs",
    ),
    "reward/mean": Metric(
        "score of all responses of the pairs, mean",
        "near 0 with centring",
        "drifts: raise the centring weight",
    ),
    "reward/min": Metric(
        "smallest score of a batch, mean over batches", "above -10", "outliers: look at them"
    ),
    "reward/max": Metric(
        "largest score of a batch, mean over batches", "below 10", "outliers: look at them"
    ),
    # DPO
    "dpo/reward_accuracy": Metric(
        "share of pairs with implicit reward of chosen > rejected; a tie counts as wrong, so 0 at step 0",
        "0.6-0.9 on held-out pairs",
        "1.0 in training and flat in evaluation: over-fitted, fewer epochs",
    ),
    "dpo/reward_margin": Metric(
        "dpo/reward_chosen - dpo/reward_rejected",
        "0 at step 0; rises",
        "not 0 at step 0: the reference is not the model training starts from",
    ),
    "dpo/reward_chosen": Metric(
        "beta (log p - log p_ref) of the chosen response, mean over pairs",
        "around 0",
        "falls far below 0: the policy leaves its own data; raise beta or lower learning_rate",
    ),
    "dpo/reward_rejected": Metric(
        "the same of the rejected response", "falls", "falls together with chosen: see there"
    ),
    "dpo/logprob_chosen": Metric(
        "log p of the whole chosen response, mean, nats", "steady", "falls: see dpo/reward_chosen"
    ),
    "dpo/logprob_rejected": Metric(
        "log p of the whole rejected response, mean, nats",
        "falls slowly",
        "see dpo/reward_rejected",
    ),
    "dpo/logit_chosen": Metric(
        "mean logit over chosen tokens and vocabulary", "steady", "drift means nothing by itself"
    ),
    "dpo/logit_rejected": Metric(
        "mean logit over rejected tokens and vocabulary", "steady", "drift means nothing by itself"
    ),
    # machinery
    "rollout/logprob_gap": Metric(
        "|log-probability by the engine - by the learner|, mean over response tokens, nats; over those of "
        "the first update where the engine's stand for the learner's",
        "below 1e-5 in fp32, 1e-2 in bf16",
        "larger: the engine runs stale weights, another temperature or another template",
    ),
    "time/tokens_per_second": Metric(
        "response tokens of the step / its seconds, all ranks",
        "steady",
        "falls: see the other time/ names",
    ),
    "time/generate": Metric(
        "seconds of a step spent sampling",
        "half of a PPO step or more",
        "a faster engine, larger batches",
    ),
    "time/score": Metric("seconds spent scoring", "small", "batch the scorer"),
    "time/learn": Metric(
        "seconds spent in forward, backward and optimizer", "", "larger micro-batches"
    ),
    "time/step": Metric("seconds of the whole step", "steady", ""),
    "time/evaluate": Metric(
        "seconds of an evaluation", "a tenth of the run", "raise eval_steps or take fewer prompts"
    ),
    "time/train": Metric("seconds of the whole training, once at its end", "", ""),
    "memory/peak": Metric(
        "largest memory held so far, GiB (accelerator; on CPU resident memory)",
        "below 90 % of what there is",
        "smaller micro-batches",
    ),
    # cost, counted in the same words by every program
    "budget/episodes": Metric(
        "responses sampled for training since the start, all ranks; 0 where nothing is sampled",
        "",
        "",
    ),
    "budget/tokens_generated": Metric("tokens sampled since the start, all ranks", "", ""),
    "budget/tokens_trained": Metric(
        "tokens, prompt included and padding not, through forward and backward since the start, all ranks",
        "",
        "",
    ),
    "budget/flops": Metric(
        "floating-point operations of the matrix products computed since the start, padding, recomputation and "
        "attention included, evaluation not; all ranks",
        "",
        "",
    ),
    "budget/seconds": Metric(
        "wall-clock seconds since the start, and those of reference log-probabilities that an earlier run computed",
        "",
        "",
    ),
    "budget/reference_flops": Metric(
        "of budget/flops, those of DPO's reference log-probabilities, computed or found in RLHF_CACHE; all ranks",
        "",
        "",
    ),
    "budget/reference_seconds": Metric(
        "of budget/seconds, those of DPO's reference log-probabilities, computed or found in RLHF_CACHE",
        "",
        "",
    ),
}

PATTERNS: dict[str, Metric] = {
    "score/": Metric(
        "score/<name>: mean over responses of one named score or part of one", "see score/total", ""
    ),
    "loss/": Metric("loss/<name>: a further term of loss/total, as it enters it", "", ""),
    "time/": Metric("time/<name>: seconds spent in one part of a step", "", ""),
    "memory/": Metric("memory/<name>: GiB", "", ""),
    "budget/": Metric("budget/<name>: a further cost counted since the start", "", ""),
    "trl/": Metric("trl/<name>: a number of TRL's trainer that has no name here", "", ""),
    "eval/": Metric(
        "eval/<name>: any name of this page, measured on the validation prompts or rows",
        "as <name>",
        "as <name>",
    ),
}


def is_known(name: str) -> bool:
    """Return whether `name` is in METRICS, follows a pattern, or is `eval/` before such a name."""
    if name.startswith("eval/"):
        name = name[len("eval/") :]
        if name.startswith("eval/"):
            return False
    if name in METRICS:
        return True
    return any(name.startswith(p) and len(name) > len(p) for p in PATTERNS if p != "eval/")


def check_names(names) -> None:
    """Raises KeyError with the nearest known name for the first of `names` that is not in the
    vocabulary.
    """
    for name in names:
        if is_known(name):
            continue
        prefix = "eval/" if name.startswith("eval/") else ""
        near = difflib.get_close_matches(name.removeprefix("eval/"), METRICS, 1, 0.4)
        hint = f" Did you mean '{prefix}{near[0]}'?" if near else ""
        raise KeyError(
            f"metric '{name}' is not in the vocabulary.{hint} All names: docs/metrics.md (rlhf/runs/metrics.py)"
        )


SECTIONS = {
    "Distance to the reference": ("kl/",),
    "Scores": ("score/",),
    "Responses": ("response/",),
    "PPO": ("ppo/",),
    "Guards": ("guard/",),
    "Critic": ("value/",),
    "Optimisation": ("loss/", "grad/", "learning_rate", "epoch"),
    "Given text (SFT, DPO)": ("token/",),
    "Reward model": ("reward/",),
    "DPO": ("dpo/",),
    "Machinery": ("rollout/", "time/", "memory/"),
    "Cost": ("budget/",),
}


def metrics_page() -> str:
    """Return docs/metrics.md: a table for each section, then the patterns."""
    lines = [
        "# Metrics",
        "",
        "<!-- generated: python -m rlhf.runs.metrics > docs/metrics.md -->",
        "",
        "SFT, reward model, DPO and PPO share these names. Each line of `metrics.jsonl` holds `step`, `time` (seconds",
        "since 1970) and any of the names below; other names are refused. Numbers that are not finite are written as",
        'the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, so that each line is valid JSON;',
        "`rlhf.runs.tracking.read_metrics` turns them back. The ranges are rules of thumb for LoRA on small and",
        "middle-sized models.",
    ]
    for title, prefixes in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| name | formula | healthy range | what to do otherwise |",
            "|---|---|---|---|",
        ]
        lines += [_row(f"`{n}`", m) for n, m in METRICS.items() if n.startswith(prefixes)]
    lines += [
        "",
        "## Patterns",
        "",
        "| pattern | meaning | healthy range | what to do otherwise |",
        "|---|---|---|---|",
    ]
    for metric in PATTERNS.values():
        name, _, meaning = metric.formula.partition(": ")
        lines.append(_row(f"`{name}`", metric._replace(formula=meaning)))
    return "\n".join(lines) + "\n"


def _row(name: str, metric: Metric) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (name, *metric)) + " |"


if __name__ == "__main__":
    print(metrics_page(), end="")
