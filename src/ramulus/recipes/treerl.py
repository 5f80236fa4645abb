"""TreeRL (arXiv 2506.11902): more paths from the least expected tokens of each path, credit against the whole tree and the parent."""

from dataclasses import replace

from ramulus.grow.forks import EntropyForks
from ramulus.grow.schedule import Fixed
from ramulus.learn.advantage.global_local import GlobalLocal
from ramulus.learn.objective.estimator import Estimator
from ramulus.learn.objective.mask import Clip
from ramulus.learn.objective.mix import Mix, SequenceMean, Term
from ramulus.learn.objective.reference import Behavior
from ramulus.learn.policy.model import Pretrained
from ramulus.recipes.quickstart import MANY, SMALL
from ramulus.run.config.recipe import AdamW, Run
from ramulus.run.signals import Concluded
from ramulus.tasks.files import File
from ramulus.tasks.math import Boxed


def recipe() -> Run:
    """Published settings: EPTree (6, 2, 1, 2), 16 of 30 paths trained, no KL; the released credit is GlobalLocal("released", trained=16)."""
    return Run(
        name="treerl", model=Pretrained("Qwen/Qwen2.5-14B", dtype="bfloat16"), tasks=File("problems.jsonl"), rewards=Boxed(),
        prompt_limit=1024, response_limit=8192, temperature=1.2, top_p=0.95, branching=EntropyForks(roots=6, points=2, rounds=1, branches=2),
        signals=(Concluded(),), schedule=Fixed(64),
        mix=Mix((Term(Estimator(Clip(0.2, 0.26), Behavior(), GlobalLocal(trained=16)), normaliser=SequenceMean()),)),
        steps=500, minibatches=4, tokens_per_batch=16384, optimizer=AdamW(lr=1.5e-6, decay="cosine"),
        autocast="auto", activation_checkpointing=True, engine=MANY,
    )  # fmt: skip


def small() -> Run:
    """TreeRL on the quickstart's task, from its supervised model, on a CPU."""
    forks = EntropyForks(roots=4, points=2, branches=1, closed=None)
    mix = Mix((Term(Estimator(Clip(0.2, 0.26), Behavior(), GlobalLocal()), normaliser=SequenceMean()),))
    return replace(
        recipe(),
        model=Pretrained("runs/quickstart/1-sft"),
        branching=forks,
        mix=mix,
        temperature=1.0,
        top_p=1.0,
        **SMALL,
    )
