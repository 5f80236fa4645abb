"""The local engine: torch on CPU or one GPU, reading the trainer's own weights."""

from __future__ import annotations

import asyncio
import os
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from ramulus.engine.engine import Decode, Request, Segment, Weights
from ramulus.engine.local.choice import choose
from ramulus.engine.local.compiled import CompiledForward
from ramulus.engine.local.scheduler import Scheduler
from ramulus.engine.local.sequence import Group
from ramulus.native.memory import GIVES_BACK, OutOfMemory, allocation_failed, give_back

QUIET = 8  # turns of the event loop without a new request before the next step


class LocalEngine:
    """Samples from a Hugging Face causal LM by continuous batching, with KV shared along prefixes.

    `model`: on one device; its parameters are read in place or copied by `load`: call it after every optimizer step, since the KV
    of the old weights must go too. `slots`: sequences that decode together. `memory`: bytes of KV, for the running sequences and for what
    is remembered of ended ones; the least recently used goes first and is prefilled again when needed. The kernels reserve up to three
    quarters of it for slots at the first request; the system gives pages as they are used. Slots that grow while they hold anything exist
    twice for a moment, which can take up to three quarters of it once more. `precision`: of weights, keys, values and products, None for the
    model's own; where it is another than that (bfloat16 beside a float32 trainer), the kernels or else a copy of the model hold the weights in it.
    `fast`: read the weights of Llama-like models without transformers' per-module overhead where that passes the self-check. `native`: on a CPU
    such models are decoded by compiled kernels, in float32 or bfloat16, from one more copy of their matrices, which `load` renews; False, or no C
    compiler, leaves them to torch's operations, two to four times slower. `native_limit`: most bytes of that copy (`native_bytes` says how many it
    takes); None allows what is free beside `memory` when the engine is built. `about` says which way was taken and, where it is not the kernels, why.
    `threads`: of torch while the engine works, None leaves them; without the kernels a model of 128 dimensions decodes faster with one than with two.
    `decode`: the text of tokens, for stop strings.

    Any architecture whose attention goes through transformers' AttentionInterface works, with windows, soft caps and sinks; a self-check at
    construction compares prefill and decode with the plain forward, and ValueError names the architecture that fails it. Build the engine after peft
    adapters are in place, and keep the parameters the same objects (optimizer steps and `load_state_dict` do).

    Guarantees. (1) The same requests in the same order give the same tokens, bit for bit, at a given number of slots, thread count,
    memory, `native` and `native_limit`, run after run, counted from construction, a `load` or a `release`: nothing depends on the clock. (2) A
    request's random numbers are a function of its seed and the token index; its neighbours, the batch shape, forking and eviction change
    log-probs only within float tolerance (which can flip a token whose draw lies that near an edge), and not at all in compiled kernels
    without truncation.
    (3) Tokens are scored by the distribution they were drawn from; a token of probability 0 is never drawn.

    Example:
        >>> import asyncio
        >>> from ramulus import LocalEngine, Request, Sampling, Scratch, StopRule
        >>> model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
        >>> request = Request(tuple(tokenizer("1+2=").input_ids), Sampling(max_tokens=3), StopRule(), seed=7)
        >>> [segment] = asyncio.run(LocalEngine(model, slots=4).sample([request]))
        >>> len(segment.tokens), len(segment.logprobs)
        (3, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int = 64,
        memory: int = 2**30,
        precision: torch.dtype | None = None,
        fast: bool = True,
        native: bool = True,
        native_limit: int | None = None,
        threads: int | None = None,
        decode: Decode | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 (None leaves torch's), got {threads}")
        self.model, self.threads = model, threads
        choice = choose(model, precision, fast, native, native_limit, memory)
        self.forward, self.about, self._copy, reference = choice.forward, choice.about, choice.copy, choice.reference
        vocabulary = int(reference.model.get_input_embeddings().num_embeddings)
        self._scheduler = Scheduler(self.forward, vocabulary, reference.limit, slots, memory, decode)
        self.features = frozenset({"rules", "until", "entropy", "kept", "in_place", "sleep"} | ({"strings"} if decode else set()))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: asyncio.Task[None] | None = None
        self._gate: asyncio.Future[None] | None = None  # held while `load` waits
        self._arrivals = 0

    @property
    def version(self) -> int:
        """Version of the weights that sample now."""
        return self._scheduler.version

    def counters(self) -> dict[str, int]:
        """Since construction, as `COUNTERS` has them; every prefix runs at least its last token."""
        return dict(self._scheduler.counters)

    def close(self) -> None:
        """Nothing: it has no processes or threads to end."""

    @property
    def limit(self) -> int:
        """Most tokens of prefix and continuation together."""
        return self._scheduler.limit

    @property
    def native_bytes(self) -> int:
        """Bytes of the copy of the matrices that the kernels read; 0 when there is none."""
        return self.forward.nbytes if isinstance(self.forward, CompiledForward) else 0

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each, batched with those of other calls; each decode step serves all of them.

        Raises ValueError, before any is sampled, for an empty prefix, an unknown token, a text beyond the model's positions, a text that
        `memory` cannot hold, or stop strings without `decode`.
        """
        self._scheduler.check(requests)
        if not requests:
            return []
        loop = self._attach()
        while self._gate is not None:
            await asyncio.wait({self._gate})  # not the gate itself: it would be cancelled with whoever waits
        future: asyncio.Future[list[Segment]] = loop.create_future()
        self._scheduler.enqueue(Group(future, [None] * len(requests), len(requests)), requests)
        self._arrivals += 1
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        return await future

    async def load(self, weights: Weights, version: int) -> None:
        """Take new weights once requests in flight have finished; requests made meanwhile wait for them.

        `weights`: None where the learner changed the model in place, a folder of safetensors or one such file, or a state dict. All KV is
        dropped and the low-precision copy renewed. Raises FileNotFoundError, RuntimeError (which names the tensors) or TypeError for weights that are
        none of the model's; it then samples with what it has, and nothing of them is in it.
        """
        state = _read(weights)
        async with self._alone():
            self._take(state)
            self._scheduler.version = version

    async def reset(self) -> None:
        """Forget all KV once requests in flight have finished; the weights stay."""
        async with self._alone():
            self._scheduler.forget()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """No request is in flight, and those made meanwhile wait."""
        loop = self._attach()
        while self._gate is not None:
            await asyncio.wait({self._gate})
        self._gate = loop.create_future()
        try:
            while self._driver is not None and not self._driver.done():
                await asyncio.wait({self._driver})
            yield
        finally:
            gate, self._gate = self._gate, None
            gate.set_result(None)

    def release(self) -> None:
        """Drop all KV and give its memory back, say before a training step on a GPU; raises RuntimeError while requests are in flight."""
        if self._scheduler.busy:
            raise RuntimeError("requests are in flight: await them before releasing the KV memory")
        self._scheduler.abandon(None)  # nobody; it closes the holes of the last step
        self._scheduler.release()

    async def sleep(self) -> None:
        """`release`, once requests in flight have finished; the next request takes memory again."""
        async with self._alone():
            self.release()

    def _take(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        if weights is not None:
            state = whole(self.model, weights)
            refuse_unfit(self.model, state)
            self.model.load_state_dict(state)
        self._scheduler.forget()
        if self._copy is not None:
            with torch.no_grad():
                for mine, theirs in zip(self._copy.parameters(), self.model.parameters()):
                    mine.copy_(theirs)
        self.forward.refresh()
        if self.native_bytes > GIVES_BACK:
            give_back(blocks=False)  # adapters that were merged on the way

    def _attach(self) -> asyncio.AbstractEventLoop:
        """The running loop; whatever an earlier, closed one left behind is dropped."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._scheduler.abandon(None)
            self._loop, self._driver, self._gate = loop, None, None
        return loop

    async def _drive(self) -> None:
        """Steps until there is nothing to do; a failure reaches all who wait, but for that of an `until`, which is its caller's own."""
        scheduler = self._scheduler
        try:
            answered = 1
            while True:
                await self._settle(answered)
                try:
                    with _threads(self.threads):
                        scheduler.admit()
                        if not scheduler.batch.rows:
                            return
                        answered = scheduler.step()
                except Exception as error:
                    if not allocation_failed(error):
                        raise
                    failure = OutOfMemory(str(error))
                else:
                    continue
                if not scheduler.halve():  # here the error is gone, and with it what its frames held
                    raise failure
        except asyncio.CancelledError:  # between two steps, so what is remembered is whole
            scheduler.abandon(None)
            raise
        except Exception as error:
            scheduler.abandon(error)
            scheduler.release()
        except BaseException:
            scheduler.abandon(None)
            scheduler.release()
            raise

    async def _settle(self, answered: int) -> None:
        """Let coroutines that an answer woke make their next requests: counted in turns of the loop, not in time."""
        quiet = 0 if answered else QUIET - 1
        while quiet < QUIET:
            before = self._arrivals
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._arrivals == before else 0


def whole(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with every name of a tied parameter, which is saved under one of them."""
    names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    there = {names[name]: tensor for name, tensor in weights.items() if name in names}
    return {name: there[key] for name, key in names.items() if key in there} | dict(weights)


class _Tried(TorchFunctionMode):
    """Inside, a tensor that would be copied over another is copied in one number alone, over nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        target, source, *_ = args
        torch.empty(min(1, source.numel()), dtype=target.dtype, device=target.device).copy_(source.reshape(-1)[:1])
        return target


def refuse_unfit(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError, which names the tensors, where `load_state_dict` would; TypeError for names that are none. The model stays as it is."""
    if strange := [name for name in state if not isinstance(name, str)]:
        raise TypeError(f"weights are a state dict, whose names are text, got {strange[0]!r}: load the state dict of such a model")
    try:
        with _Tried():
            model.load_state_dict(state)
    except RuntimeError as error:
        _, *wrong = (textwrap.shorten(line, 400, placeholder=" ...") for line in str(error).splitlines())
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        text = f"these weights do not fit this {type(model).__name__}, which stays as it was: {' '.join(wrong[:4])}{more}"
        raise RuntimeError(text) from error


def _read(weights: Weights) -> Mapping[str, torch.Tensor] | None:
    """The state dict that a path or a mapping holds; None for parameters that are shared."""
    if weights is None or isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"weights must be None (shared with the learner), a path or a state dict, got {type(weights).__name__}")
    files = sorted(Path(weights).glob("*.safetensors")) if Path(weights).is_dir() else [Path(weights)]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"there are no weights at {weights}: give a folder that holds *.safetensors, or one such file")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch's threads set to `count` and put back; None leaves them."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
