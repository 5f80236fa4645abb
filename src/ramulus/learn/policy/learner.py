"""What trains: the protocol, and what crosses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ramulus.learn.batch.score_row import Scored, ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.objective.mix import Mix
from ramulus.learn.policy.influence import Influence
from ramulus.models.weights import Weights


class Evaluated(NamedTuple):
    """What the policy makes of the tokens of a row that some term weighs, each [T]; 0 elsewhere."""

    tempered: Tensor  # log-prob at the temperature of the sampler
    plain: Tensor  # log-prob; the same tensor as `tempered` where every temperature is 1
    entropy: Tensor  # nats
    value: Tensor | None = None  # of the state before each token; None without a value head

    def each(self, change: Callable[[Tensor], Tensor]) -> Evaluated:
        """Every column changed; where two are one tensor they stay so."""
        plain = change(self.plain)
        tempered = plain if self.tempered is self.plain else change(self.tempered)
        return Evaluated(tempered, plain, change(self.entropy), None if self.value is None else change(self.value))


class Learner(Protocol):
    """Whatever holds the weights that are trained, here or elsewhere. What goes in and comes out is plain: it can be pickled.

    Calls are awaited one after the other; no call blocks the event loop for as long as it takes. A learner whose call was cancelled is in the
    middle of something, and only `close` may follow.

    Example:
        >>> from ramulus import Learner, Scratch, Torch
        >>> model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
        >>> learner: Learner = Torch()(model, tokenizer, None, False, {}, 0)
        >>> learner.version, "in_place" in learner.features
        (0, True)
        >>> learner.close()
    """

    @property
    def version(self) -> int:
        """How many updates its weights have had."""
        ...

    @property
    def features(self) -> frozenset[str]:
        """"in_place": an engine of this process can read its parameters, which then need no `weights`. "live": these can be the parameters.
        "measured": it is a MeasuredLearner."""
        ...

    async def score(
        self, rows: Sequence[ScoreRow], columns: Sequence[str], influence: Influence | None = None
    ) -> list[Scored]:
        """Columns of each row: "recomputed" log-probs by these weights, "reference_model" by the first ones, both also "..._tempered"; the
        "value" of states; "influence"; the "entropy" that each token was drawn at, untempered.

        Raises ValueError for a column that this learner does not keep the model or the head of, OutOfMemory where memory does not hold a row.
        """
        ...

    async def accumulate(self, mix: Mix, batches: Sequence[TreeBatch]) -> list[Evaluated]:
        """Add the gradient of all rows of an optimizer step; what each row's update begins from.

        Raises OutOfMemory where memory does not hold a row: the step has no gradients then, and may begin anew with smaller rows.
        """
        ...

    async def update(self, lr: float) -> dict[str, float]:
        """One optimizer step with the gradients so far: `grad_norm`, and `skipped` is 1 where there was none or it was not finite."""
        ...

    async def weights(self, folder: Path | None = None, live: bool = False) -> Weights:
        """For an engine that cannot read them in place: a new folder of safetensors in `folder`, or without one tensors on the CPU.

        `live`, for a learner with that feature: the parameters themselves, on the device where they are; they are others once `version` is another.
        """
        ...

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write `model`, a Hugging Face folder, and `tensors.safetensors`, all else that resuming needs; answers plain JSON to keep beside them."""
        ...

    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what `save` wrote and answered, bit for bit."""
        ...

    def close(self) -> None:
        """Free threads and processes."""
        ...


class MeasuredLearner(Learner, Protocol):
    """A learner with the feature "measured", which `auto` asks before the first step: it computes in one process, on a CPU."""

    async def kept_bytes(self, tokens: int) -> int:
        """Bytes that the forward pass over a path of so many tokens keeps for the backward pass, whether a layer is computed again there or not.

        The model's own weights and its head are not counted.
        """
        ...


class Called:
    """What `Learner` asks, as calls by name: where and how they are done is what its learners differ in."""

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the method of that name answers."""
        raise NotImplementedError

    async def score(self, rows: Sequence[ScoreRow], columns: Sequence[str], influence: Influence | None = None) -> list[Scored]:
        """Columns of each row."""
        return await self.call("score", rows, columns, influence)  # type: ignore[no-any-return]

    async def accumulate(self, mix: Mix, batches: Sequence[TreeBatch]) -> list[Evaluated]:
        """Add the gradient of all rows."""
        return await self.call("accumulate", mix, batches)  # type: ignore[no-any-return]

    async def update(self, lr: float) -> dict[str, float]:
        """One optimizer step."""
        return await self.call("update", lr)  # type: ignore[no-any-return]

    async def weights(self, folder: Path | None = None, live: bool = False) -> Weights:
        """Weights to hand over."""
        return await self.call("weights", folder, live)  # type: ignore[no-any-return]

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write a checkpoint's model and the rest."""
        return await self.call("save", folder)  # type: ignore[no-any-return]

    async def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take them back."""
        await self.call("restore", folder, state)
