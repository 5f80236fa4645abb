"""The learner of rank 0: it shares rows over the ranks, has them work, and puts their answers together."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ramulus.learn.batch.score_row import Scored, ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.in_process import Thread, in_a_new_folder, random_tensors, restore_random_tensors
from ramulus.learn.policy.influence import Influence
from ramulus.learn.policy.learner import Called, Evaluated
from ramulus.learn.policy.torch_policy import TorchPolicy
from ramulus.learn.sharded.calls import RANK_CALLS, TOGETHER, build_here
from ramulus.learn.sharded.checking import check_batches, check_rows, learns
from ramulus.learn.sharded.checkpoints import LATE, check_files
from ramulus.learn.sharded.placing import Spread
from ramulus.learn.sharded.sharded_policy import ShardedPolicy, write_whole
from ramulus.learn.sharded.share import Piece, assembled, pieces, put_back, share_out
from ramulus.learn.sharded.world import STANDING, World
from ramulus.models.structure import copied, elsewhere
from ramulus.models.weights import Weights

RANDOM = "random.safetensors"


class ShardedLearner(Called):
    """A Learner over the ranks of a world, whose rank 0 this process is; engines take its weights from `weights`."""

    features: frozenset[str] = frozenset()

    def __init__(self, world: World, whole: TorchPolicy, skeleton: Any, spread: Spread) -> None:
        self.world, self.tokenizer, self.skeleton = world, whole.tokenizer, skeleton
        structure, numbers = ShardedPolicy.parts_of(whole)
        threads = max(1, torch.get_num_threads() // world.local)
        part = structure, spread, threads, torch.are_deterministic_algorithms_enabled()
        self.written, self.thread = False, Thread()
        try:
            with self._named():
                world.tell("build", [part] * world.size)
                self.policy = build_here(world, *copy.deepcopy(part), numbers)
                self._collected((True, None))
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """How many updates the weights have had."""
        return self.policy.version

    def _ask(self, name: str, *parts: Sequence[Any]) -> list[Any]:
        """Every rank's answer; `parts` are the arguments of each."""
        with self._named():
            self.world.tell(name, parts)
            try:
                answer = True, RANK_CALLS[name](self.policy, *parts[0])
            except Exception as error:
                if name not in TOGETHER or isinstance(error, torch.distributed.DistError):
                    raise
                answer = False, error
            return self._collected(answer)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Raise ChildProcessError, which says which rank is lost, for an error of the connection to it."""
        try:
            yield
        except RuntimeError as error:  # torch's own are among them
            if not isinstance(error, torch.distributed.DistError) and not of_the_network(error):
                raise
            raise ChildProcessError(f"{self.world.lost(error)}; go on from the last checkpoint with --resume") from error

    def _collected(self, answer: tuple[bool, Any]) -> list[Any]:
        """The answers of all ranks; this one's goes nowhere, it may be all weights."""
        answers = [answer, *self.world.collect((answer[0], None))[1:]]
        self.world.broken = False
        for good, content in answers:
            if not good:
                raise content
        return [content for _, content in answers]

    def _alike(self, name: str, *part: Any) -> Any:
        """What rank 0 answers to what all are told alike."""
        return self._ask(name, *[part] * self.world.size)[0]

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the ranks answer together."""
        return await self.thread.do(getattr(self, f"_{name}"), *arguments)

    def _score(self, rows: Sequence[ScoreRow], columns: Sequence[str], influence: Influence | None) -> list[Scored]:
        check_rows(self.policy, rows, columns)
        parts = pieces(rows, together=True)
        if not parts:
            return [{} for _ in rows]
        shared = share_out(parts, self.world.size, max(map(len, rows)))
        answers = self._ask("score", *[([assembled(rows, held) if held else None for held in mine], columns, influence) for mine in shared])
        per_row: list[Scored] = [{} for _ in rows]
        for mine, answer in zip(shared, answers, strict=True):
            for held, scores in zip(mine, answer, strict=True):
                for name, column in scores.items() if held else ():
                    for scored, whole in zip(per_row, rows, strict=True):
                        scored.setdefault(name, column.new_zeros(len(whole)))
                    put_back([scored[name] for scored in per_row], held, column)
        return per_row

    def _accumulate(self, mix: Mix, batches: Sequence[TreeBatch]) -> list[Evaluated]:
        check_batches(self.policy, mix, batches)
        parts = [part for part in pieces(batches) if learns(batches[part.row], part)]
        shared = share_out(parts, self.world.size, max(map(len, batches), default=0))
        answers: list[list[Evaluated]] = [[] for _ in shared]
        if parts:
            answers = self._ask("accumulate", *[(mix, [assembled(batches, held) if held else None for held in mine]) for mine in shared])
        return self._evaluated(batches, shared, answers)

    def _evaluated(
        self, batches: Sequence[TreeBatch], shared: Sequence[Sequence[Sequence[Piece]]], answers: Sequence[Sequence[Evaluated]]
    ) -> list[Evaluated]:
        """The ranks' columns, each where its tokens stand."""
        dtype = torch.float64 if self.policy.dtype == torch.float64 else torch.float32
        names = [name for name in Evaluated._fields if name != "value" or self.policy.critic is not None]
        per_batch = [{name: torch.zeros(len(batch), dtype=dtype) for name in names} for batch in batches]
        warm: set[int] = set()
        for mine, answer in zip(shared, answers, strict=True):
            for held, evaluated in zip(mine, answer, strict=True):
                warm |= {part.row for part in held if evaluated.tempered is not evaluated.plain}
                for name in names:
                    put_back([columns[name] for columns in per_batch], held, getattr(evaluated, name))
        return [Evaluated(**columns | ({} if i in warm else {"tempered": columns["plain"]})) for i, columns in enumerate(per_batch)]

    def _update(self, lr: float) -> dict[str, float]:
        return self._alike("update", lr)  # type: ignore[no-any-return]

    def _weights(self, folder: Path | None, live: bool) -> Weights:
        state: dict[str, Tensor] = self._alike("weights")
        if folder is None:
            return state
        return in_a_new_folder(folder, self.version, lambda part: self._write(part, state))

    def _write(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        write_whole(folder, self.skeleton, self.tokenizer, state, check=not self.written)
        self.written = True

    def _save(self, folder: Path) -> dict[str, Any]:
        self._write(folder / "model", self._alike("weights"))
        self._alike("save", folder.absolute())  # another rank may be in another folder
        check_files(folder, LATE)
        save_file(random_tensors(), folder / RANDOM)
        return self.policy.state()

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        random = load_file(folder / RANDOM if (folder / RANDOM).exists() else folder / "tensors.safetensors")
        self._alike("restore", folder.absolute(), state)
        restore_random_tensors(random)

    def close(self) -> None:
        """End the ranks that were started for it; those of torchrun wait for the next learner."""
        if self.world not in STANDING:
            self.world.leave()
        elif not self.world.broken:
            self.world.tell("drop", [None] * self.world.size)
        self.thread.close()


def of_the_network(error: RuntimeError) -> bool:
    """Whether an error is one of a connection that is gone."""
    words = ("Connection closed", "Connection reset", "Broken pipe", "[gloo", "gloo/transport", "Application timeout")
    return any(word in str(error) for word in words)


def sharded_learner(world: World, model: Any, tokenizer: Any, value: bool, options: Mapping[str, Any], spread: Spread) -> ShardedLearner:
    """A learner of a copy of `model`, which stays as it is."""
    from ramulus.learn.policy.torch_learner import policy_of

    own = copied(model, elsewhere(model, "cpu"))
    return ShardedLearner(world, policy_of(own, tokenizer, value, options), copied(model, elsewhere(model, "meta")), spread)
