from ramify.grow.schedule import Dynamic
from ramify.grow.segments import Segments
from ramify.learn.advantage import GroupMean
from ramify.learn.estimator import Estimator
from ramify.learn.mask import Clip
from ramify.learn.mix import Mix, Term, TokenMean
from ramify.learn.model import Scratch
from ramify.learn.reference import Behavior
from ramify.run.recipe import AdamW, Local, Run
from ramify.tasks.chain import ChainSum
from recipe_run_recipe import Digits

run = Run(
    name='rl',
    model=Scratch(alphabet='0123456789+-=?\n', hidden=16, layers=1, heads=2, kv_heads=1),
    tasks=ChainSum(count=40, terms=(2, 3)),
    evals=ChainSum(count=4, split='test', terms=(2, 3)),
    prompt_limit=16,
    branching=Segments(width=4, depth=3, length=4),
    response_limit=12,
    schedule=Dynamic(prompts=4),
    rewards=Digits(),
    mix=Mix(
        terms=(
            Term(
                estimator=Estimator(mask=Clip(), reference=Behavior(), advantage=GroupMean()),
                normaliser=TokenMean(),
            ),
        ),
        leash=0.01,
        entropy_bonus=0.001,
    ),
    steps=2,
    minibatches=2,
    tokens_per_batch=256,
    optimizer=AdamW(lr=0.01, decay='linear'),
    engine=Local(slots=8),
    threads=1,
    eval_every=3,
    eval_samples=2,
    save_every=2,
    out='OUT',
    tensorboard=False,
)
