"""What every metric means, said once: the viewer shows it beside the curves, docs/metrics.md is written from it (`python docs/metrics.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Metric:
    """One metric of a run or of an evaluation; `*` in its name stands for anything, as in mean@*."""

    name: str
    group: str  # under which the viewer draws it and the page lists it
    text: str
    good: str = ""  # "up" or "down" where one direction is better by itself
    grain: float = 0.0  # differences of values below it are noise of floating point: nothing is drawn of them


def _group(name: str, *metrics: tuple[str, str] | tuple[str, str, str] | tuple[str, str, str, float]) -> tuple[Metric, ...]:
    """The metrics of a group, in the order in which they are drawn."""
    return tuple(Metric(first, name, *rest) for first, *rest in metrics)  # type: ignore[arg-type]


METRICS: tuple[Metric, ...] = (
    *_group(
        "Learning",
        ("reward", "Mean reward of the policy's graded paths, over all trees that were grown, dropped ones included.", "up"),
        ("mixed", "Share of the trees whose graded paths did not all earn the same: only they teach where credit is within a tree."),
        ("pass_rate", "Share of the policy's graded paths that the verifier calls correct.", "up"),
        ("answered", "Share of responses in which the reward found an answer to read; only of rewards that tell the answer.", "up"),
        ("length", "Mean length of the policy's paths, tokens; a shared token counts in each of its paths."),
        ("length_max", "Tokens of the longest path."),
        (
            "truncated",
            "Share of paths that ended at the limit of tokens, without an end of their own. Near 1: raise `response_limit`.",
            "down",
        ),
        (
            "entropy",
            "Mean entropy of the policy where it sampled, nats a token, untempered. It falls as the policy becomes sure; near 0 "
            "all paths of a group are alike and nothing is left to compare.",
        ),
        (
            "loss",
            "The textbook loss of the method, summed over the rows of an update. With one update a step the ratio is 1 and its value "
            "stays near 0 whatever is learned: its gradient teaches, its value says little. Left out for methods without a textbook loss; "
            "of SFT it is the negative log-likelihood.",
            "",
            1e-6,
        ),
        ("grad_norm", "Norm of the gradient before clipping, the greatest of the step's updates."),
        (
            "kl_sampler",
            "How far the policy that is updated is from the one that sampled: mean of r - 1 - log r over sampled tokens, nats. Near 0 at "
            "the first update of a step; it grows with several updates a step, with `ahead=1`, and where sampler and learner disagree.",
            "",
            1e-9,
        ),
        ("clip_high", "Share of the positive credit on tokens whose ratio lies above the clip: it teaches nothing."),
        ("clip_low", "Share of the negative credit on tokens whose ratio lies below the clip: it teaches nothing."),
        ("ratio_max", "Greatest ratio of a token's probability, policy to sampler, before clipping."),
        ("ratio_min", "Least ratio of a token's probability, policy to sampler, before clipping."),
        (
            "mismatch",
            "Mean difference of the learner's and the sampler's log-probability of a token under the same weights, without its sign, before the "
            "first update, nats. About 1e-6 in float32, some hundredths where both compute in bfloat16.",
            "down",
        ),
        ("mismatch_kl", "Of the same tokens, the mean of r - 1 - log r: the divergence that arithmetic alone makes.", "down", 1e-9),
        ("mismatch_share", "Of the same tokens, the share on which the two differ by more than 0.1 nats.", "down"),
        (
            "mismatch_max",
            "Greatest difference of the learner's and the sampler's log-probability of a token under the same weights, before the first "
            "update. About 1e-6 in float32; of bfloat16 models up to some hundredths. More means that the two compute different things.",
            "down",
        ),
        ("explained_variance", "With a value head: share of the targets' variance that its values explain. 1 is perfect, 0 a constant.", "up"),
        ("gate_policy", "Behind a gate (HPT, LUFFY, SRFT): mean weight of the rollouts, over the step's questions."),
        ("gate_expert", "Behind a gate: mean weight of the demonstrations, over the step's questions."),
        ("lr", "Learning rate of the step."),
        ("updates", "Steps of the optimizer in this step."),
        ("skipped", "Updates that were left out, for want of any signal or for a gradient that was not finite.", "down"),
        ("not_finite", "Updates that were left out since their gradient was not finite.", "down"),
    ),
    *_group(
        "Evaluation",
        ("eval/mean", "On the held-out problems: share of correct answers over `eval_samples` samples at temperature 1.", "up"),
        ("eval/reward", "On the held-out problems: mean reward over the samples; chooses the best checkpoint where nothing is called correct.", "up"),
        ("eval/greedy_reward", "On the held-out problems: mean reward without sampling, where it is more than right or wrong.", "up"),
        ("eval/greedy", "On the held-out problems: share of correct answers without sampling.", "up"),
        ("eval/length", "On the held-out problems: mean length of the answers, tokens."),
        ("eval_sampled", "Tokens sampled by the evaluation after the step."),
        ("mean@*", "Share of correct answers over k independent samples (avg@k).", "up"),
        ("greedy", "Share of correct answers without sampling.", "up"),
        ("pass@*", "Probability that at least one of k samples is correct, the unbiased estimate.", "up"),
        ("maj@*", "Probability that the majority of k answers is correct; ties are drawn.", "up"),
        ("ties@*", "Share of problems, or of draws of k answers, whose vote is tied at the top."),
        ("unanswered", "Share of answers in which the grader found nothing to grade.", "down"),
        ("tokens", "Mean tokens sampled for the tree of a problem."),
        ("attempts", "Independent attempts that cost as much as the problem's tree, mean."),
        ("short", "Share of problems with fewer independent attempts than their tree would have paid for."),
        ("mean", "Share of correct answers at the price of the tree.", "up"),
        ("pass", "Probability that one of the attempts that the tree's price pays for is correct.", "up"),
        ("maj", "Probability that the majority of the attempts that the tree's price pays for is correct.", "up"),
    ),
    *_group(
        "Tokens and trees",
        ("trees", "Trees that were grown in the step, over all draws."),
        ("dropped", "Of these, trees that nothing is learned from: all right, all wrong, or more than were wanted."),
        ("draws", "Times that the schedule drew problems until it had enough trees to learn from."),
        ("wanted", "Trees to learn from that the schedule asks for."),
        ("paths", "Paths of the policy, one a leaf."),
        ("graded", "Paths that a verifier calls right or wrong."),
        ("correct", "Graded paths that solve their task.", "up"),
        ("sampled", "Tokens of the policy in the step's trees, each once."),
        ("trajectory", "Tokens of all the policy's paths, a shared token once for each."),
        ("reused", "trajectory - sampled: what independent paths would have sampled once more.", "up"),
        ("reuse_ratio", "trajectory / sampled: 1 where nothing is shared.", "up"),
        ("engine_sampled", "Tokens that the engine sampled while the trees grew."),
        ("sampled_before", "With `ahead=1`: tokens of this step's trees that were sampled in the step before."),
        ("sampled_ahead", "With `ahead=1`: tokens of the next step's trees that were sampled in this step."),
        ("thrown_away", "Tokens that the engine sampled and no tree holds.", "down"),
        ("trained_policy", "Sampled tokens on a path that the update went through."),
        ("idle_tokens", "Sampled tokens on paths without any credit only: they count in every mean, and pull at nothing."),
        ("excluded", "Sampled tokens on paths that no term learns from: ungraded, filtered, closed by the gate."),
        ("pruned", "Sampled tokens on pruned paths only."),
        ("dropped_tokens", "Sampled tokens of trees that the schedule dropped."),
        ("expert", "Tokens of demonstrations in the trees."),
        ("trained_expert", "Tokens of demonstrations that the update went through."),
        ("trained", "Trained tokens in the rows of the update, of all authors."),
        ("repeated", "Of these, tokens that stand in a row once more since a tree was cut to fit `tokens_per_batch`.", "down"),
        ("zero_credit", "Of these, tokens whose credit is 0 in every term."),
        ("packed", "All tokens of the update's rows, prompts included."),
        ("flattened", "What the same paths would take if each stood alone; flattened / packed is what sharing saves the update."),
        ("prefilled", "Tokens of prompts and prefixes that the engine computed."),
        ("prefix_reused", "Tokens of prefixes that the engine found in its memory.", "up"),
        ("prefilled_again", "Of the prefilled, tokens that had been computed and dropped to make room.", "down"),
        ("rows", "Mean rows that decode together."),
        ("grades_cut", "Grades that a limit of time or memory ended.", "down"),
        ("grades_refused", "Grades that the step's `grading_seconds` had no time left for.", "down"),
        ("graders_lost", "Grades whose process died.", "down"),
    ),
    *_group(
        "Seconds",
        ("seconds/step", "The whole step without evaluation; the parts below add up to it."),
        ("seconds/grow", "Growing the trees: sampling, and whatever goes on beside it."),
        ("seconds/grade", "Grading while no request was in flight; grading beside sampling is in grow."),
        ("seconds/score", "Log-probabilities that the recipe reads: of the policy before the update, of a reference model, values."),
        ("seconds/credit", "Advantages and gates."),
        ("seconds/pack", "Laying trees out in rows."),
        ("seconds/update", "Forward and backward passes, optimizer."),
        ("seconds/gauges", "Clip fractions, KL and the like."),
        ("seconds/write", "Writing the trees, with their credit."),
        ("seconds/load", "New weights into the engine."),
        ("seconds/ledger", "Counting tokens."),
        ("seconds/log", "Writing the metrics of the step before."),
        ("seconds/save", "The checkpoint of the step before, as far as the run waited for it."),
        ("seconds/idle", "The rest."),
        ("seconds/eval", "The evaluation after the step."),
        ("seconds/mean", "Mean of a step with its evaluation, over the run so far."),
        ("cpu_seconds", "Seconds of all the process's threads."),
    ),
    *_group(
        "Machine",
        ("memory/peak_rss", "Most resident memory of the process so far, bytes."),
        ("memory/peak_gpu", "Most memory that torch has allocated on the GPU so far, bytes."),
        ("gpu/busy", "Share of the time since the step before in which the GPU was at work.", "up"),
    ),
)
_BY_NAME = {metric.name: metric for metric in METRICS}


def metric_of(name: str) -> Metric | None:
    """The entry of a metric, of a row flattened with slashes; None where there is none."""
    exact = _BY_NAME.get(name)
    return exact or next((metric for metric in METRICS if "*" in metric.name and fnmatchcase(name, metric.name)), None)


def unexplained(names: Iterable[str]) -> list[str]:
    """The names that have no entry."""
    return [name for name in names if name != "step" and metric_of(name) is None]


def page() -> str:
    """The text of docs/metrics.md: a table of metrics for each group."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run writes to `metrics.jsonl` and to its trackers, one row a step, and those of an evaluation.",
        "The viewer tells the same on hover. `seconds/grow` is `grow` inside the object `seconds` of a row.",
        "How the counts of tokens add up is in [the ledger](ledger.md).",
        "An arrow says which way is better where one way is better by itself.",
        "",
        "<!-- Written by `python docs/metrics.py` from src/ramulus/look/glossary.py: change it there. -->",
    ]
    for group in dict.fromkeys(metric.group for metric in METRICS):
        lines += ["", f"## {group}", "", "| metric | meaning |", "|---|---|"]
        lines += [f"| `{one.name}`{_ARROWS[one.good]} | {one.text} |" for one in METRICS if one.group == group]
    return "\n".join(lines) + "\n"


_ARROWS = {"": "", "up": " ↑", "down": " ↓"}
