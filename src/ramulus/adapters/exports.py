"""A run's trees as files that other trainers read: verl's cache of rollouts (0.9), prime-rl's batches (0.5 and later)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ramulus.adapters.flat import FlatPath, credit_name, flat_paths, graded_leaves
from ramulus.core import store
from ramulus.core.new_folder import new_folder
from ramulus.core.run_folder import stage_folders
from ramulus.core.tree import Tree
from ramulus.look.stages import step_files
from ramulus.look.viewer.page import step_numbers


def export_trees(run: Path, out: Path, kind: str, steps: str = "", credit: str | None = None) -> str:
    """Write the trees of a run's steps (its last stage that has any), or of a file of trees, for another trainer; says how many paths they were.

    `steps` are numbers with commas, all by default; of one in which nothing was trained all rows have credit 0.
    ValueError, FileNotFoundError or ImportError says what is missing; then nothing is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a new folder")
    numbers = list(dict.fromkeys(step_numbers(steps)))
    name = credit_name((leaf for _, trees in _steps_of(run, numbers) for leaf in graded_leaves(trees)), credit)
    if name is None and kind == "prime-rl":
        raise ValueError("these trees have no credit, and prime-rl's trainer computes none: export those of a run that trained on them")
    write, total, written = WRITERS[kind], 0, 0
    with new_folder(out) as part:
        for step, trees in _steps_of(run, numbers):
            rows = flat_paths(trees, name=name, settled=True)
            if rows:
                write(part, step, trees, rows)
                total, written = total + len(rows), written + 1
        if not total:
            raise ValueError(f"the trees of {run} have no graded path of the policy: there is nothing to train on")
    return f"{total} paths of {written} step{'s' * (written > 1)} are now in {out}, for {kind}"


def _steps_of(run: Path, steps: Sequence[int]) -> Iterator[tuple[int, list[Tree]]]:
    """The trees of each step, one step at a time."""
    if run.is_file():
        by_step: dict[int, list[Tree]] = {}
        for tree in store.read(run):
            by_step.setdefault(tree.step, []).append(tree)
        known: dict[int, Any] = dict(sorted(by_step.items()))
    else:
        if not run.is_dir():
            raise FileNotFoundError(f"there is no run at {run}: give the folder that `ramulus train` wrote, or a file of trees")
        folders = [folder for folder in (run, *stage_folders(run)) if step_files(folder)]
        if not folders:
            raise FileNotFoundError(f"there are no trees in {run}: train with trees_every above 0")
        known = dict(step_files(folders[-1]))
    if absent := [step for step in steps if step not in known]:
        raise ValueError(f"{run} has no trees of step {absent[0]}: it has those of {', '.join(map(str, known))}")
    for step in steps or known:
        yield step, known[step] if run.is_file() else list(store.read(known[step]))


def verl_rows(trees: Sequence[Tree], rows: Sequence[FlatPath]) -> tuple[list[str], dict[str, list[Any]], dict[str, list[Any]]]:
    """Keys, columns of numbers and other columns of verl's trainer, a value a row; rows of a tree have one `uid` and stand together."""
    uids = [f"ramulus-{trees[row.tree].task.id}-{row.tree}".replace("_", "-") for row in rows]
    places = [sum(other.tree == row.tree for other in rows[:i]) for i, row in enumerate(rows)]
    numbers: dict[str, list[Any]] = {
        "prompts": [row.prompt for row in rows],
        "responses": [row.tokens for row in rows],
        "input_ids": [row.prompt + row.tokens for row in rows],
        "position_ids": [list(range(len(row.prompt) + len(row.tokens))) for row in rows],
        "response_mask": [list(map(int, row.learned)) for row in rows],
        "loss_mask": [list(map(int, row.learned)) for row in rows],
        "rollout_log_probs": [row.logprobs for row in rows],
        "rm_scores": [[0.0] * (len(row.tokens) - 1) + [float(row.leaf.reward or 0.0)] for row in rows],
    }
    if rows[0].advantages is not None:
        numbers["advantages"] = numbers["returns"] = [row.advantages for row in rows]
    text = [trees[row.tree].task.text for row in rows]
    others: dict[str, list[Any]] = {
        "uid": uids,
        "raw_prompt": [[{"role": "user", "content": words}] for words in text],
        "data_source": ["ramulus"] * len(rows),
        "reward_model": [{"style": "rule", "ground_truth": trees[row.tree].task.answer} for row in rows],
        "num_turns": [2] * len(rows),
        "multi_modal_inputs": [{} for _ in rows],
        "extra_fields": [{"tree": row.tree, "leaf": row.leaf.id} for row in rows],
    }
    return [f"{uid}_{place}_0" for uid, place in zip(uids, places, strict=True)], numbers, others


def _verl(out: Path, step: int, trees: Sequence[Tree], rows: Sequence[FlatPath]) -> None:
    """OUT/STEP/0/tq_batch.pt and meta.json, which verl's `skip.rollout_tq` reads in place of sampling."""
    import torch

    try:
        from tensordict import NonTensorStack, TensorDict
    except ImportError as error:
        raise ImportError("tensordict is not installed: pip install 'ramulus[exports]'") from error
    keys, numbers, others = verl_rows(trees, rows)
    floats = {"rollout_log_probs", "rm_scores", "advantages", "returns"}
    columns: dict[str, Any] = {name: NonTensorStack(*values) for name, values in others.items()}
    for name, lines in numbers.items():
        kind = torch.float32 if name in floats else torch.int64
        columns[name] = torch.nested.as_nested_tensor([torch.tensor(line, dtype=kind) for line in lines], layout=torch.jagged)
    sizes = [(len(row.prompt), len(row.tokens)) for row in rows]
    tags = [
        {
            "status": "success", "prompt_len": prompt, "response_len": response, "seq_len": prompt + response, "global_steps": step,
            "min_global_steps": step, "max_global_steps": step,
        }
        for prompt, response in sizes
    ]  # fmt: skip
    folder = out / str(step) / "0"
    folder.mkdir(parents=True)
    payload = {"tensordict": TensorDict(columns, batch_size=[len(rows)]), "tags": tags, "keys": keys, "global_steps": step}
    torch.save(payload, folder / "tq_batch.pt")
    (folder / "meta.json").write_text(json.dumps({"global_steps": step, "num_trajectories": len(rows)}))


def _prime_rl(out: Path, step: int, trees: Sequence[Tree], rows: Sequence[FlatPath]) -> None:
    """OUT/step_N/rank_0.bin: prime-rl's list of MicroBatch, a path each, by the nine fields that every one has, in order."""
    try:
        import msgspec
    except ImportError as error:
        raise ImportError("msgspec is not installed: pip install 'ramulus[exports]'") from error
    batches = []
    for row in rows:
        assert row.advantages is not None  # `export_trees` has seen to it
        before, size = len(row.prompt), len(row.prompt) + len(row.tokens)
        batches.append([
            row.prompt + row.tokens, [False] * before + row.learned, [0.0] * before + row.advantages, [0.0] * before + row.logprobs,
            list(range(size)), [size], row.temperatures[:1] * before + row.temperatures, ["ramulus"] * size, [size],
        ])  # fmt: skip
    folder = out / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "rank_0.bin").write_bytes(msgspec.msgpack.encode(batches))


WRITERS: dict[str, Callable[[Path, int, Sequence[Tree], Sequence[FlatPath]], None]] = {"verl": _verl, "prime-rl": _prime_rl}
