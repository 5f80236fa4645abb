"""What a step takes of memory, by part and by phase, from the recipe and the sizes of its model: nothing is loaded.

Every constant below was read off what autograd really keeps (tests/test_memory.py holds them against it) or measured (`python -m benchmarks.peak`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Literal

import torch

from ramulus.engine.factory import engine_traits
from ramulus.engine.memory import PlannedSampling
from ramulus.learn.factory import LearnerMemory, learner_traits
from ramulus.learn.policy.master_weights import ROWS_TOGETHER
from ramulus.learn.policy.writing import TRIED_WHOLE
from ramulus.models.sizes import KERNELS, Sizes
from ramulus.native.blocks import blocks_refused
from ramulus.native.memory import GIVES_BACK
from ramulus.native.processors import planned_in_bfloat16
from ramulus.run.config.recipe import Run
from ramulus.run.memory.work import Work, work_of

Phase = Literal["grow", "score", "update", "step", "save"]
MOMENTS: tuple[Phase, ...] = ("grow", "score", "update", "step", "save")
SPELLED = {"grow": "while trees grow", "score": "while log-probs are computed again", "update": "in the backward pass",
           "step": "in the optimizer's step", "save": "while a checkpoint is written"}  # fmt: skip
USUAL_TOKENS = 8192  # what `auto` takes at most of tokens a batch, where there is room

# Bytes that the forward pass keeps of one token in one layer for the backward pass: for each number of the hidden state, the queries, the keys, the
# feed-forward layer. "fused": learn/policy/fused_layers.py; "narrow": learn/policy/half.py. The others are transformers' modules. Where a run is
# about to begin it is measured instead (learn/policy/kept.py).
KEPT = {
    "fused": (16.0, 8.0, 8.0, 8.0),
    "plain": (24.0, 8.0, 8.0, 16.0),
    "autocast": (26.0, 4.0, 4.0, 8.0),
    "narrow": (12.0, 4.0, 4.0, 4.0),
    "half": (16.0, 4.0, 4.0, 8.0),
    "lora": (16.0, 8.0, 9.0, 16.0),
    "lora autocast": (18.0, 6.0, 4.5, 8.0),
}
NORM = {"lora": 4.0, "lora autocast": 4.0}  # more, for each number that a further norm is of; where its weight is trained 8
HEAD_NORM = NORM | {"fused": 4.0, "narrow": 2.0, "half": 6.0}  # of queries and keys, in layers of KERNELS
PACKED = {"plain": 4.0, "lora": 4.0, "lora autocast": 0.0}  # more for queries and keys that are cut out of one matrix's outputs; else 2
EXPERT = {"half": 4.6}  # more for each number of the hidden state, for each expert that a token visits; else 8.6
HOLES = 0.9  # of what adapters' layers keep on a CPU: freed between it, and kept by the C library until the update ends (python -m benchmarks.peak)
RANK = 7 * 4.0  # of a token in a layer, for each rank of adapters
BACKWARD = (12.0, 12.0)  # of a token in the layer whose gradients are being made: for each number of the hidden state, of the feed-forward layer
FORWARD = (16.0, 12.0)  # the same in a forward pass that keeps nothing
LOGITS, SCORED = 20.0, 16.0  # of a logit of the head's chunk, in the backward pass and where nothing is kept
LIBRARIES = {"cpu": 0.45e9, "cuda": 0.9e9}  # Python, torch and transformers; of a GPU its context and the workspaces of its libraries
_NARROWS = find_spec("ramulus.learn.policy.half") is not None
TREE = 60.0  # of a token of a tree


@dataclass(frozen=True)
class MemoryPart:
    """Something that takes memory, and when."""

    name: str
    bytes: float
    phases: tuple[Phase, ...] = MOMENTS


@dataclass(frozen=True)
class StepMemory:
    """A step's memory in a process: its parts, how many rows decode together where trees grow, how many tokens are in the model at once."""

    parts: tuple[MemoryPart, ...]
    rows: int
    tokens: int
    work: Work
    sizes: Sizes
    engine_bytes: int  # that an engine may take for keys and values
    tokens_per_batch: int = 0  # as they were asked for; a step may have fewer

    def at(self, phase: Phase) -> float:
        """Bytes that are held in a phase of the step."""
        return sum(part.bytes for part in self.parts if phase in part.phases)

    @cached_property
    def phase(self) -> Phase:
        """The one that takes most."""
        return max(MOMENTS, key=self.at)

    @property
    def peak(self) -> float:
        """Bytes of the phase that takes most."""
        return self.at(self.phase)

    def named(self, *names: str) -> float:
        """Bytes of the parts of these names, over all phases."""
        return sum(part.bytes for part in self.parts if part.name in names)


@dataclass(frozen=True)
class Site:
    """Where a step is planned: a process on a "cpu", or a "cuda" device, over `shards` of which the learner is cut, or the engine where it is alone.

    Which of them is there; the `first` of several learners may have the engine, with a model of its own, and gathers weights to hand over.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    shards: int = 1
    engine: bool = True
    learner: bool = True
    first: bool = True


def step_memory(run: Run, sizes: Sizes, site: Site = Site(), tokens: int | None = None, engine_bytes: int | None = None) -> StepMemory:
    """The memory of a step of `run`; `tokens` of a batch and `engine_bytes` of keys and values in place of those of the recipe."""
    work = work_of(run)
    wanted = tokens or (USUAL_TOKENS if run.tokens_per_batch == "auto" else run.tokens_per_batch)
    tokens = max(1, min(max(wanted, work.longest), most_tokens(run, site, work)))
    engine, sampling = engine_traits(run.engine).memory, sampling_of(run, sizes, site)
    room = engine_bytes or engine.room(sampling)
    parts = [MemoryPart("libraries", LIBRARIES[site.kind])]
    if site.learner:
        parts += learner_parts(run, sizes, site, work, tokens)
    if site.engine:
        parts += [MemoryPart(name, size) for name, size in engine.parts(sampling, room).items()]
    return StepMemory(tuple(part for part in parts if part.bytes), engine.rows(sampling, room), tokens, work, sizes, room, max(wanted, work.longest))


def most_tokens(run: Run, site: Site, work: Work) -> int:
    """Tokens of an optimizer step that one process learns from, at most: whole trees, shared among ranks."""
    return -(-work.trees // (run.minibatches * (site.shards if site.learner else 1))) * work.tree_tokens


def memory_of(run: Run) -> LearnerMemory:
    """What the memory of its learner depends on; what is usual where the learner does not say."""
    return learner_traits(run.learner).memory or LearnerMemory()


def leaves_holes(run: Run, weights: float) -> bool:
    """Whether what tensors leave on a CPU is the C library's, with weights of so many bytes."""
    return not memory_of(run).keeps_blocks or weights <= GIVES_BACK or bool(blocks_refused())


def learner_parts(run: Run, sizes: Sizes, site: Site, work: Work, tokens: int) -> list[MemoryPart]:
    """What the model and its training take."""
    own, many, learner = own_dtype(run, sizes).itemsize, site.shards, memory_of(run)
    masters = own == 2 and run.lora is None and learner.float32_masters
    here = 0.0 if site.kind == "cuda" and learner.offload else 1.0  # of what the optimizer keeps
    trained = sizes.adapters(run.lora.rank, run.lora.targets) if run.lora is not None else sizes.parameters
    weights = sizes.parameters * own
    kept, working, scoring = activations(run, sizes, site, tokens)
    several = tokens < most_tokens(run, site, work)  # then the gradients of other rows are there all the time
    width = own if run.lora is None else 4  # adapters are float32
    gradients = trained * width / many
    summed = here * master_bytes(trained, masters) / many  # of rows before, in float32
    held = gradients + summed * (tokens * ROWS_TOGETHER < most_tokens(run, site, work))
    early = held if several else max(0.0, gradients - kept) + min(gradients, sizes.vocabulary * sizes.hidden * own)
    gathered, reduced = gathering(sizes, own) if many > 1 else (0.0, 0.0)
    scored: tuple[Phase, ...] = ("score",) if passes_to_score(run) else ()
    holes = HOLES * kept if run.lora is not None and site.kind == "cpu" and not run.activation_checkpointing and leaves_holes(run, weights) else 0.0
    checkpointed = 0.0 if site.kind == "cuda" else trained * 4.0 if many == 1 else weights * site.first
    merged, again = written(run, sizes, site) if many == 1 else (0.0, 0.0)
    return [
        MemoryPart("weights", weights / many),
        MemoryPart("weights gathered from the ranks", gathered, ("update", *scored)),
        MemoryPart("adapters", (trained * 4 if run.lora is not None else 0) / many),
        MemoryPart("float32 masters", here * master_bytes(trained, masters) / many),
        MemoryPart("reference model", (weights if run.mix.kl_coef and run.lora is None else 0) / many),
        MemoryPart("optimizer", here * (2 * trained if learner.eighths else moment_bytes(trained, width, masters)) / many),
        MemoryPart("gradients", early + (reduced if run.lora is None else 0.0), ("update",)),
        MemoryPart("gradients", max(gradients, summed), ("step",)),
        MemoryPart("activations", kept, ("update",)),
        MemoryPart("freed between activations", holes, ("update",)),
        MemoryPart("one layer and the head", working, ("update",)),
        MemoryPart("one layer and the head", scoring, scored),
        MemoryPart("copies for a checkpoint", checkpointed, ("save",)),
        MemoryPart("weights with adapters merged", merged, ("save",)),
        MemoryPart("the model read back", again, ("save",)),
        MemoryPart("trees", 0.0 if site.kind == "cuda" else work.tokens * TREE),
    ]


def written(run: Run, sizes: Sizes, site: Site) -> tuple[float, float]:
    """Bytes of weights with adapters merged while a model is written, and of the model that is read back from the file the first time, on a CPU.

    Merged is float32 at least, and half precision then is written in float32 whole. Without adapters a model is read back before the first step,
    but for one that is too large to be written then.
    """
    own = own_dtype(run, sizes).itemsize
    width = max(own, 4) if run.lora is not None else own
    merged = width * sizes.merged(run.lora.targets) if run.lora is not None else 0
    whole = run.lora is not None or own * sizes.parameters > TRIED_WHOLE
    return float(merged), float(width * sizes.parameters * (whole and site.kind == "cpu"))


def master_bytes(trained: int, masters: bool) -> int:
    """Bytes of float32 copies of weights in half precision that the optimizer steps; and of their gradients while it does."""
    return 4 * trained * masters


def moment_bytes(trained: int, width: int, masters: bool) -> int:
    """Bytes of AdamW's two moments of so many weights of `width` bytes."""
    return 2 * trained * (4 if masters else width)


def training_bytes(trained: int, width: int) -> int:
    """Bytes that all weights take in the optimizer's step: themselves, what the optimizer keeps of them, their gradients."""
    masters = width == 2
    return trained * width + 2 * master_bytes(trained, masters) + moment_bytes(trained, width, masters) + trained * width * (not masters)


def passes_to_score(run: Run) -> int:
    """Passes over the tokens of a step that keep nothing, for log-probs of before the step and of the reference model."""
    return len({name.removesuffix("_tempered") for name in run.mix.columns - run.begins} & {"recomputed", "reference_model"})


def gathering(sizes: Sizes, own: int) -> tuple[float, float]:
    """Bytes of weights that a rank holds whole while it computes: embeddings, output layer, two layers. And of the gradients of the former.

    Those of weights in half precision are summed over ranks in float32.
    """
    ends = (2 if sizes.parameters > sizes.active else 1) * sizes.vocabulary * sizes.hidden
    return (ends + 2 * (sizes.parameters - ends) / sizes.layers) * own, ends * (own + 4 if own == 2 else own)


def activations(run: Run, sizes: Sizes, site: Site, tokens: int) -> tuple[float, float, float]:
    """Bytes that the forward pass over so many tokens keeps; what the backward pass needs beside them; what a pass that keeps nothing needs."""
    inner, head = sizes.inner, min(tokens, memory_of(run).chunk) * sizes.vocabulary
    rank = RANK * run.lora.rank if run.lora is not None else 0.0
    layer = tokens * (sizes.kept or (kept_of(way_of(run, site, sizes), sizes) + rank))
    backward, forward = (tokens * (a * sizes.hidden + b * inner) for a, b in (BACKWARD, FORWARD))
    casts = casts_of(run, sizes, site)
    logits = head * LOGITS
    if way_of(run, site, sizes) == "narrow":  # copies of the weights as long as the update, the head's twice; its logits' pulls in bfloat16
        casts, logits = 0.0, 2.0 * min(tokens * sizes.vocabulary, 2**28) + sizes.vocabulary * sizes.hidden * 8.0 + 2.0 * sizes.active
    ends = tokens * sizes.hidden * 16.0
    if run.activation_checkpointing:
        kept = ends + sizes.layers * tokens * sizes.hidden * min(4.0, own_dtype(run, sizes).itemsize)
        return kept, max(layer + backward, logits, casts + head * SCORED), max(forward, head * SCORED)
    return ends + sizes.layers * layer, max(backward, logits) + casts, max(forward, head * SCORED)


def casts_of(run: Run, sizes: Sizes, site: Site) -> float:
    """Bytes of the float32 weights in bfloat16 that autocast keeps: all as long as the graph, frozen ones as long as their layer's part of it."""
    if not autocasts(run, site) or own_dtype(run, sizes).itemsize == 2:
        return 0.0
    whole = 2.0 * (sizes.active if run.lora is None else sum(inputs * outputs for _, inputs, outputs in sizes.linear))
    if site.shards > 1:
        return whole * 2 / sizes.layers
    return whole / sizes.layers if run.lora is not None and run.activation_checkpointing else whole


def kept_of(way: str, sizes: Sizes) -> float:
    """Bytes that a layer keeps of a token, adapters' own left out: a row of KEPT, and what this architecture's layers have more."""
    hidden, query, key, inner = KEPT[way]
    hidden += NORM.get(way, 8.0) * max(0, sizes.norms - 2) + EXPERT.get(way, 8.6) * sizes.experts
    norms = HEAD_NORM if sizes.kind in KERNELS else NORM
    more = norms.get(way, 8.0) * sizes.head_norms + PACKED.get(way, 2.0) * sizes.packed
    inner = 16.0 if sizes.experts and "autocast" in way else inner  # which computes them in float32
    return hidden * sizes.hidden + (query + more) * sizes.query + (key + more) * sizes.key + inner * sizes.inner


def way_of(run: Run, site: Site, sizes: Sizes) -> str:
    """Which row of KEPT a run's layers are."""
    kernels = site.kind == "cpu" and site.shards == 1 and sizes.kind in KERNELS  # they know no shards
    autocast = autocasts(run, site)
    if autocast and run.lora is None and kernels and _NARROWS:
        return "narrow"
    if run.lora is not None:
        return "lora autocast" if autocast else "lora"
    if own_dtype(run, sizes).itemsize == 2:
        return "half"
    return "autocast" if autocast else "fused" if kernels else "plain"


def autocasts(run: Run, site: Site) -> bool:
    """Whether a run multiplies in bfloat16 there."""
    return planned_in_bfloat16(site.kind == "cuda") if run.autocast == "auto" else run.autocast


def sampling_of(run: Run, sizes: Sizes, site: Site) -> PlannedSampling:
    """What a step asks of the engine there."""
    work, apart = work_of(run), not site.learner or learner_traits(run.learner).apart or site.shards > 1
    adapted, gpus = run.lora is not None and not apart, 1 if site.learner else site.shards  # adapters are merged into a model of its own
    texts, cuda = work.trees * work.paths, site.kind == "cuda"
    return PlannedSampling(sizes, own_dtype(run, sizes), texts, work.longest, work.response, cuda, gpus, apart, adapted)


def own_dtype(run: Run, sizes: Sizes) -> torch.dtype:
    """Of the weights that are trained: what the recipe says, or what files and config say where it leaves it to them."""
    stated = "float32" if isinstance(run.model, str) else getattr(run.model, "dtype", "auto")
    return getattr(torch, sizes.dtype if stated == "auto" else stated)  # type: ignore[no-any-return]
