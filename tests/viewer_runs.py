"""Run folders for the viewer, written as a run writes them: metrics, run.json, trees, evaluations, a tokenizer of single bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ramulus.core import store
from ramulus.core.task import Task
from ramulus.core.tree import Author, Node, Tree, column

EOS = 256
NASTY = '</script><script>document.title="bad"</script><img src=x onerror=alert(1)>&amp;'


def alphabet() -> dict[str, int]:
    """Each byte's stand-in letter, by GPT-2's table, and the byte as its id."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def tokenizer() -> Tokenizer:
    """One token a byte, so that most characters beyond ASCII are split; 256 ends a text."""
    made = Tokenizer(models.BPE(vocab=alphabet(), merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    return made


def tokens(text: str) -> list[int]:
    return list(text.encode())


def write(tree: Tree, above: Node, text: str | bytes, **fields: object) -> Node:
    """Hang a text that the policy wrote under a node, every column filled."""
    said = list(text.encode() if isinstance(text, str) else text)
    ended = [EOS] if fields.get("finish") == "eos" else []
    node = tree.add(above, said + ended, Author.POLICY, **fields)
    count = len(node.tokens)
    node.logprobs, node.kept = column(-0.5 - i / 100 for i in range(count)), column([0.0] * count)
    node.entropy, node.temperature = [0.25 * (i % 3) for i in range(count)], [1.0] * count
    return node


def small_tree(step: int = 5, problem: str = "1+1?") -> Tree:
    """root - "a=" - ("2" right, "3" wrong); a fallback inside "a="; a pruned path; a demonstration."""
    tree = Tree.plant(Task(f"task-{problem}", tuple(tokens(problem)), problem, "2"), seed=7, step=step, visit=1)
    tree.rounds = 3
    trunk = write(tree, tree.root, "abc=", why="first", version=step - 1)
    credit = "credit/SubgroupMean"
    right = {"correct": 1.0, "answer": "2", credit: 0.5}
    wrong = {"correct": 0.0, "answer": "3", credit: -1.5}
    write(tree, trunk, "2", why="branch", finish="eos", reward=1.0, verdict=right, version=step - 1)
    write(tree, trunk, "3", why="branch", finish="eos", reward=0.0, verdict=wrong, version=step - 1)
    bud = tree.graft(trunk, 2, why="fallback")
    bud.tokens, bud.finish, bud.reward, bud.verdict = column(tokens("xyz"), "i"), "length", 0.0, {"correct": 0.0, credit: -1.0}
    write(tree, tree.root, "dead", why="first", finish="pruned")
    tree.add(tree.root, [*tokens("abc=2"), EOS], Author.EXPERT, finish="eos", reward=1.0, why="demonstration", levels=0)
    return tree


def large_tree(nodes: int = 2000, total: int = 100_000, seed: int = 3) -> Tree:
    """About so many nodes and tokens: a random tree of ASCII text."""
    rng = random.Random(seed)
    tree = Tree.plant(Task("large", tuple(tokens("a large one?")), "a large one?", "7"))
    made: list[Node] = [tree.root]
    each = total // nodes
    while len(made) < nodes:
        above = made[rng.randrange(max(len(made) - 40, 0), len(made))]
        text = "".join(rng.choices("abcdefgh =\n", k=rng.randint(1, 2 * each - 1)))
        made.append(write(tree, above, text, why="branch"))
    for leaf in tree.leaves():
        leaf.finish, leaf.reward = "eos", float(rng.random() < 0.4)
        leaf.verdict = {"correct": leaf.reward, "credit/GroupMean": leaf.reward - 0.4}
    return tree


def row(step: int, **more: object) -> dict[str, object]:
    return {"step": step, "reward": step / 10, "seconds": {"grow": 0.5, "step": 1.0, "mean": 1.0}, **more}


def add_rows(folder: Path, steps: range, mode: str = "a") -> None:
    with open(folder / "metrics.jsonl", mode) as file:
        file.writelines(json.dumps(row(step)) + "\n" for step in steps)


def run_folder(folder: Path, steps: int = 10, trees: tuple[int, ...] = (5, 10), name: str = "treepo") -> Path:
    """A run of one stage."""
    (folder / "evals").mkdir(parents=True)
    add_rows(folder, range(1, steps + 1))
    stage = {"class": "ramulus.run.config.recipe.Run", "name": name, "steps": 20, "seed": 3}
    stage["model"] = {"class": "ramulus.Pretrained", "path": "/models/Qwen2.5-0.5B", "dtype": "float32"}
    stage["branching"] = {"class": "ramulus.grow.segments.Segments", "width": 8, "seeds": None, "sizes": [3, 6]}
    stage["rewards"] = [{"class": "ramulus.tasks.rewards.Boxed", "weight": 2.0}]
    (folder / "run.json").write_text(json.dumps({"format": 1, "recipe": name, "overrides": [], "stages": [stage]}))
    for step in trees:
        forest = [small_tree(step), small_tree(step, f"what is ü at {step}?")]
        store.write(folder / "trees" / f"{step:06d}.jsonl", forest)
    answers = [{"id": "a", "problem": "1+1?", "answer": "2", "sampled": [{"text": NASTY, "correct": 0.0}]}]
    for step in (5, 10):
        content = {"problems": 1, "mean@4": step / 10, "intervals": {"mean@4": [0.1, 0.9]}, "answers": answers}
        (folder / "evals" / f"{step:06d}.json").write_text(json.dumps(content))
    (folder / "evaluation-after.json").write_text(json.dumps({"step": 10, "greedy": 0.75, "answers": []}))
    model = folder / "checkpoints" / "step-000010" / "model"
    model.mkdir(parents=True)
    tokenizer().save(str(model / "tokenizer.json"))
    return folder
