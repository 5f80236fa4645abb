"""The policy: log-probs of packed trees, gradients, optimizer steps, weights."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ramulus.core.tree import Author
from ramulus.learn.attention.tree_attention import Way, attending, plan
from ramulus.learn.batch.score_row import Scored, ScoreRow
from ramulus.learn.batch.tree_batch import TreeBatch
from ramulus.learn.policy.activation_checkpointing import checkpointed, recomputing
from ramulus.learn.policy.check import answers_as_autocast, verify_policy
from ramulus.learn.policy.fused_layers import Patch, fused, patches
from ramulus.learn.policy.half import half_patches
from ramulus.learn.policy.influence import Influence, RowInfluence, influences
from ramulus.learn.policy.learner import Evaluated
from ramulus.learn.policy.loading import unheard
from ramulus.learn.policy.lora import Lora, attach, merged, without
from ramulus.learn.policy.master_weights import MasterWeights
from ramulus.learn.policy.narrow import Narrow
from ramulus.learn.policy.writing import read_back, try_writing, write_model
from ramulus.models.positions import rope_limit
from ramulus.native.processors import device_multiplies_bfloat16

if TYPE_CHECKING:
    from ramulus.learn.objective.mix import Mix

_NOW, _FIRST = ("recomputed", "entropy"), ("reference_model",)  # columns, tempered or not, by the model as it is and by the reference model
ADAM = ("step", "exp_avg", "exp_avg_sq")


class TorchPolicy:
    """A transformers causal LM that learns from packed trees.

    The model stays in eval mode, so no dropout is active. Raises ValueError, at once, for a model whose log-probs on a packed tree are not
    those of its separate sequences (recurrent layers and the like).

    Example:
        >>> from ramulus import Author, Behavior, Clip, Estimator, GroupMean, Mix, Scratch, Task, Term, TorchPolicy, Tree, pack
        >>> model, tokenizer = Scratch("0123456789+=?", hidden=16, layers=1, heads=2, kv_heads=1)()
        >>> policy, mix = TorchPolicy(model), Mix((Term(Estimator(Clip(), Behavior(), GroupMean())),))
        >>> tree = Tree.plant(Task("t", (1, 2), "t"))
        >>> leaves = [tree.add(tree.root, [3], Author.POLICY, logprobs=[-2.5], finish="eos", reward=r) for r in (1.0, 0.0)]
        >>> for batch in pack([tree], mix.credit([tree]), mix):
        ...     columns = policy.accumulate(mix, batch)
        >>> policy.update(lr=1e-3)["skipped"]
        0.0
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,  # only `write` needs it
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,  # of matrices only, not of norms and biases
        clip: float = 1.0,  # of the gradient norm; inf clips nothing
        autocast: bool | Literal["auto"] = False,  # bfloat16 matrix products; auto: where the device multiplies bfloat16
        activation_checkpointing: bool = False,  # keep only each layer's input and compute the layer again in the backward pass
        lora: Lora | None = None,
        reference_model: bool = False,  # keep what `score` needs for "reference_model"; a second copy of the weights unless LoRA gives it
        chunk: int = 1024,  # targets whose logits exist at once
        attention: Way = "auto",
        float32_masters: bool = True,  # the optimizer steps float32 copies of weights in half precision
    ) -> None:
        self.model, self.tokenizer, self.version, self.skipped = model.eval(), tokenizer, 0, 0
        self.clip, self.attention, self.written = clip, attention, False
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        autocast = device_multiplies_bfloat16(self.device) if autocast == "auto" else autocast
        self.autocast, self.narrow = autocast, Narrow()
        self.critic: nn.Linear | None = None  # a value head
        self.survey, self.head = verify_policy(model, chunk, [] if autocast else patches(model), "dense" if self.device.type != "cpu" else attention)
        self.reach = rope_limit(model.config)
        self.reference = copy.deepcopy(model).requires_grad_(False) if reference_model and lora is None else None
        self.wrapped = attach(model, lora) if lora is not None else None
        self.patches = self._checked_patches(model)  # adapters stay as they are
        self.reference_patches = self._patches(self.reference) if self.reference is not None and self.patches else []
        if autocast and self.patches:
            self.head = replace(self.head, narrow=self.narrow)
        self.layers = checkpointed(model) if activation_checkpointing else []
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = MasterWeights(float32_masters)
        self.masters.take(self.trainable)
        groups = [[p for p in self.masters.stepped.values() if (p.ndim >= 2) == matrix] for matrix in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (weight_decay, 0.0)) if group],
            lr=0.0, betas=betas, eps=eps, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip

    def _patches(self, model: Any) -> list[Patch]:
        return half_patches(model, self.narrow) if self.autocast else patches(model)

    def _checked_patches(self, model: Any) -> list[Patch]:
        """`_patches`; none where those in bfloat16 do not answer as torch's autocast does."""
        chosen = self._patches(model)
        right = not self.autocast or not chosen or answers_as_autocast(model, self.head, chosen, self.survey)
        self.narrow.forget()
        return chosen if right else []

    def evaluate(
        self, batch: TreeBatch, entropy_grad: bool = False, grad: bool = True, tempered: bool = True, hot: bool = False
    ) -> Evaluated:
        """Tempered log-probs, plain log-probs, entropy and values [T] of the tokens that some term weighs; 0 elsewhere.

        Tempered is plain, the same tensor, where every temperature is 1. `hot` takes the entropy at the temperature of sampling too. Raises
        ValueError for a greedy token whose tempered log-prob is asked for.
        """
        batch = batch.to(self.device)
        target = can_be_learned(batch.author) & (batch.weight != 0).any(0)
        temperature = temperatures(batch.temperature, target, tempered)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return self._logprobs(
                self.model, (batch.token, batch.position, batch.parent, batch.end), target, temperature, entropy_grad, hot=hot
            )

    def accumulate(self, mix: Mix, batch: TreeBatch) -> Evaluated:
        """Add the gradient of the mix on one row; returns what `evaluate` does, detached."""
        self.masters.begin_row()
        batch = batch.to(self.device)
        evaluated = self.evaluate(batch, mix.entropy_bonus != 0, tempered=mix.tempered, hot=mix.entropy_tempered)
        loss = mix.loss(evaluated.tempered, evaluated.plain, evaluated.entropy, batch, evaluated.value)
        if loss.requires_grad:
            loss.backward()
        return evaluated.each(Tensor.detach)

    def discard(self) -> None:
        """Drop the gradients so far: the optimizer step begins anew."""
        self.masters.discard()

    def read(self, hidden: Tensor, parent: Tensor) -> Tensor | None:
        """What a value head says of the state before each token [T], from hidden states [T, d]; this policy has none."""
        return None

    def update(self, lr: float) -> dict[str, float]:
        """Clip, step and clear the gradients; where there are none, or the norm is not finite, only the latter (`skipped` is 1)."""
        held = self.masters.hold_gradients()
        norm = float(nn.utils.clip_grad_norm_(self.masters.stepped.values(), self.clip)) if held else 0.0
        step = bool(held) and math.isfinite(norm)
        if step:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("speed", 1.0)
            self.version += 1  # first: whoever is reading the parameters meanwhile sees that they are others
            self.optimizer.step()
            self.masters.round_off()
        self.skipped += not step
        self.narrow.forget()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": float(not step)}

    @torch.no_grad()
    def score(self, rows: Sequence[ScoreRow], columns: Sequence[str], influence: Influence | None = None) -> list[Scored]:
        """As `Learner.score`: influence rides on the pass of "recomputed", or on that of "value", or takes one of its own, without the head."""
        self.check_kept(columns)
        watches = [influence.watch(row) for row in rows] if influence is not None else []
        scored: list[Scored] = [{} for _ in rows]
        for i, (row, scores) in enumerate(zip(rows, scored, strict=True)):
            watch = watches[i] if watches else None
            now, first = ([name for name in columns if name.removesuffix("_tempered") in kinds] for kinds in (_NOW, _FIRST))
            if now or "value" in columns or watch is not None:
                scores |= self._score_row(self.model, row, [*now, *({"value"} & set(columns))], watch)
            if first:
                with without(self.wrapped) if self.wrapped is not None else nullcontext():
                    scores |= self._score_row(self.model if self.reference is None else self.reference, row, first)
        for scores, column in zip(scored, influences(rows, watches) if watches else (), strict=bool(watches)):
            scores["influence"] = column
        return scored

    def check_kept(self, columns: Collection[str]) -> None:
        """Raise ValueError for a column that this policy cannot compute."""
        if {"reference_model", "reference_model_tempered"} & set(columns) and self.reference is None and self.wrapped is None:
            raise ValueError(
                "the KL term needs the reference model, but this policy keeps none: make it with TorchPolicy(..., reference_model=True)"
            )
        if "value" in columns and self.critic is None:
            raise ValueError('the column "value" needs a value head, but this policy has none: make an ActorCritic')

    def _score_row(
        self, model: Any, row: ScoreRow, names: Sequence[str], watch: RowInfluence | None = None
    ) -> Scored:
        """Log-probs [T] of every learned token of a row under these names, tempered by those that end so, and "value" where this model has a head."""
        token, position, parent, end = (t.to(self.device) for t in (row.token, row.position, row.parent, row.end))
        hot, bare = any(name.endswith("_tempered") for name in names), not set(names) - {"value"}
        target = torch.zeros_like(token, dtype=torch.bool) if bare else can_be_learned(row.author.to(self.device))
        temperature = temperatures(row.temperature.to(self.device), target, True) if hot and row.temperature is not None else None
        evaluated = self._logprobs(model, (token, position, parent, end), target, temperature, False, watch, bare=bare)
        known = {"value": evaluated.value, "entropy": evaluated.entropy}
        columns = {name: known[name] if name in known else evaluated.tempered if name.endswith("_tempered") else evaluated.plain for name in names}
        return {name: column.cpu() for name, column in columns.items() if column is not None}

    def _logprobs(
        self,
        model: Any,
        row: tuple[Tensor, Tensor, Tensor, Tensor],
        target: Tensor,
        temperature: Tensor | None,
        entropy_grad: bool,
        watch: RowInfluence | None = None,
        bare: bool = False,
        hot: bool = False,
    ) -> Evaluated:
        """(token, position, parent, end) [T] each, target [T] bool, temperatures [T] or None -> columns [T].

        `bare` makes a pass without targets, for the watch and for values; `hot` takes the entropy at those temperatures.
        """
        token, _, parent, _ = row
        index = target.nonzero()[:, 0]
        zeros = torch.zeros(
            len(token), dtype=torch.float64 if self.dtype == torch.float64 else torch.float32, device=self.device
        )
        if not len(index) and not bare:
            return Evaluated(zeros, zeros, zeros, zeros if self.critic is not None else None)
        check_beginnings(parent, index)
        with self._casting():
            hidden = self._hidden(model, *row, watch)
            value = self.read(hidden, parent) if model is self.model else None
            if bare:
                return Evaluated(zeros, zeros, zeros, value)
            head = self.head if model is self.model else replace(self.head, linear=model.get_output_embeddings())
            outputs = head(hidden[parent[index]], token[index], None if temperature is None else temperature[index], entropy_grad, hot)
        plain, entropy = (zeros.index_copy(0, index, column.to(zeros.dtype)) for column in outputs[1:])
        return Evaluated(plain if temperature is None else zeros.index_copy(0, index, outputs[0].to(zeros.dtype)), plain, entropy, value)

    def _hidden(
        self, model: Any, token: Tensor, position: Tensor, parent: Tensor, end: Tensor, watch: RowInfluence | None = None
    ) -> Tensor:
        """[T] each -> hidden states [T, d] of the last layer; a watch sees every layer's queries and keys."""
        count = len(token)
        way = plan(parent, end, torch.bfloat16 if self.autocast else self.dtype, self.attention, self.survey.sights)
        self.check_depth(way.depth)
        if way.length > count:
            token, position = (nn.functional.pad(x, (0, way.length - count)) for x in (token, position))
        rows = {"input_ids": token[None], "position_ids": position[None]}
        mine = model is self.model
        quick = self.patches if mine else self.reference_patches
        head = self.head if mine else replace(self.head, linear=model.get_output_embeddings())
        with attending(model), fused(quick), recomputing(self.layers if mine else [], model, quick), head.stopped() as states:
            model(**rows, attention_mask=None, use_cache=False, tree=watch.over(way) if watch else way)
        return states[0][0, :count]

    def check_depth(self, depth: int) -> None:
        """Raise ValueError for a path of so many tokens where the model's positions do not reach so far."""
        if depth > self.reach:
            raise ValueError(
                f"a path holds {depth} tokens and the rotary embedding of {type(self.model).__name__} changes beyond {self.reach} for all tokens of "
                "a text: shorten prompts or responses"
            )

    def _casting(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, LoRA merged; without LoRA no copy is made."""
        return merged(self.model) if self.wrapped is not None else self.model.state_dict()

    def write(self, path: Path | str) -> None:
        """A plain Hugging Face folder, LoRA merged, that AutoModelForCausalLM.from_pretrained loads; with the tokenizer if there is one.

        The first time, what was written is loaded back and compared.
        """
        state = self.weights() if self.wrapped is not None or not self.written else None
        with unheard():
            write_model(path, self.model, self.tokenizer, state if self.wrapped is not None else None)
            if not self.written and state is not None:
                read_back(path, self.model, self.tokenizer, state)
        self.written = True

    def try_writing(self) -> None:
        """Write to a temporary folder and read back, so that a model that cannot be saved is refused before work begins; as `writing.try_writing`."""
        with unheard():
            whole = try_writing(self.model, self.tokenizer, self.weights() if self.wrapped is not None else None)
        self.written = whole and self.wrapped is None  # adapters that are zero yet could be lost

    def tensors(self, weights: bool = True) -> dict[str, Tensor]:
        """Everything a resumed run needs, flat, for safetensors: trained weights (unless told not), optimizer, reference model."""
        flat = {f"weights/{name}": tensor for name, tensor in self.kept().items()} if weights else {}
        flat |= self.masters.tensors()
        for name, stepped in self.masters.stepped.items():
            flat |= {f"adam/{part}/{name}": value for part, value in self.optimizer.state.get(stepped, {}).items()}
        if self.reference is not None:
            flat |= {f"reference_model/{name}": p for name, p in self.reference.named_parameters()}
        return {name: tensor.detach() for name, tensor in flat.items()}

    def state(self) -> dict[str, Any]:
        """What belongs beside `tensors()`, as plain JSON."""
        return {"version": self.version, "skipped": self.skipped} | ({"below": self.below} if self.wrapped is not None else {})

    @cached_property
    def below(self) -> str:
        """A digest of the frozen weights below adapters: of up to 256 numbers of each, spread over it."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in sorted(self.model.named_parameters()):
            if not parameter.requires_grad:
                flat = parameter.detach().flatten()
                digest.update(f"{name} {tuple(parameter.shape)}".encode())
                digest.update(flat[:: max(1, len(flat) // 256)][:256].double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_below(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a checkpoint's adapters are of another model."""
        if self.wrapped is not None and state.get("below", self.below) != self.below:
            raise ValueError(
                "the model below the adapters is another than the run began with, and adapters of one mean nothing on another: bring the old one "
                "back under that name, or begin a new run with --fresh"
            )

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take back `tensors()` and `state()`, bit for bit and in place, so that an engine that shares the weights sees them.

        Raises ValueError where the checkpoint is of another model.
        """
        self.check_below(state)
        weights = dict(self.kept())
        if any(name.startswith("weights/") for name in tensors):
            _fill(weights, tensors, "weights/")
        if self.reference is not None:
            former = any(name.startswith("frozen/") for name in tensors)  # a checkpoint of before it was called so
            _fill(dict(self.reference.named_parameters()), tensors, "frozen/" if former else "reference_model/")
        self.optimizer.state.clear()
        self.narrow.forget()
        self.masters.restore(tensors)
        for name, stepped in self.masters.stepped.items():
            moments = {part: tensors[f"adam/{part}/{name}"] for part in ADAM if f"adam/{part}/{name}" in tensors}
            if moments:
                self.optimizer.state[stepped] = {
                    part: value.to(self.device, value.dtype if part == "step" else stepped.dtype, copy=True) for part, value in moments.items()
                }
        self.version, self.skipped = int(state["version"]), int(state["skipped"])

    def kept(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and the buffers that a checkpoint holds."""
        buffers = {
            name: t
            for name, t in self.model.named_buffers()
            if self.wrapped is None and name in self.model.state_dict()
        }
        return {**self.trainable, **buffers}


def can_be_learned(author: Tensor) -> Tensor:
    """author [T] -> [T] bool: is the token one that can be learned from?"""
    return (author == int(Author.POLICY)) | (author == int(Author.EXPERT))


def check_beginnings(parent: Tensor, index: Tensor) -> None:
    """Raise ValueError where one of the tokens [N] to be learned has nothing before it."""
    if bool((parent[index] == index).any()):
        raise ValueError("a path begins with a token to be learned, and nothing comes before it to predict it from: give the task a prompt")


def temperatures(temperature: Tensor, target: Tensor, needed: bool) -> Tensor | None:
    """Temperatures [T] to divide logits by, or None where all are 1; 0 where the text was greedy, which has no tempered log-prob."""
    greedy = target & (temperature == 0)
    if bool(greedy.any()):
        if needed:
            raise ValueError(
                f"{int(greedy.sum())} tokens to be learned were sampled at temperature 0, where the sampler's distribution is one token and has "
                "no gradient: sample above 0, or use the reference Recomputed(), which is untempered"
            )
        temperature = temperature.masked_fill(greedy, 1.0)
    return None if bool((temperature[target] == 1).all()) else temperature


def _fill(into: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> None:
    """Copy the tensors under a prefix into those of the same names; ValueError where names or shapes differ."""
    for name, tensor in into.items():
        saved = tensors.get(prefix + name)
        if saved is None or saved.shape != tensor.shape:
            held = "no" if saved is None else f"{tuple(saved.shape)} as"
            raise ValueError(
                f"the checkpoint has {held} {prefix}{name}, the model wants {tuple(tensor.shape)}: resume with the model it is of"
            )
        tensor.copy_(saved)
