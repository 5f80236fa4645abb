"""`ramulus export`: the model of a run, or its trees for another trainer. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ramulus.look.terminal import new_console

_RunFolder = Annotated[Positional[Path], arg(metavar="RUN")]
_OutFolder = Annotated[Positional[Path], arg(metavar="OUT")]


def export(
    folder: _RunFolder,
    out: _OutFolder,
    which: Literal["last", "best"] = "last",
    trees: Literal["verl", "prime-rl"] | None = None,
    steps: str = "",
    credit: str | None = None,
) -> int:
    """Write the model of a run as a plain Hugging Face folder that AutoModelForCausalLM.from_pretrained loads; or its trees for another trainer.

    Example: `ramulus export runs/mine out --trees verl --steps 10,20` (docs/adapters.md).

    Args:
        folder: the folder of a run; of a run of several stages, its last finished stage is taken. With --trees, a file of trees does too.
        out: the new folder.
        which: the last checkpoint, or the one with the best evaluation.
        trees: write every path of the trees as a row for this trainer, instead of the model.
        steps: which steps' trees, as in 5,10,15; by default all.
        credit: the advantage whose credit is written, where paths have that of several.
    """
    console = new_console()
    if trees is None and (steps or credit is not None):
        raise ValueError("--steps and --credit are of trees: name a trainer with --trees, or leave them out")
    if trees is not None and which != "last":
        raise ValueError("--which is of a model, and --trees writes none: leave one of them out")
    if trees is not None:
        from ramulus.adapters.exports import export_trees

        summary = export_trees(folder, out, trees, steps, credit)
    else:
        from ramulus.run.evaluation.loaded_model import export_model

        summary = f"step {export_model(folder, out, which, console)} of {folder} is now in {out}"
    console.out(summary, highlight=False)
    return 0
