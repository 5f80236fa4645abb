"""The forward pass of native/decode.c and the draw of native/draw.c, over a copy of the weights: what a CPU decodes fastest with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ramulus.engine.local.adapters import Matrices
from ramulus.engine.local.batch import COUNT, LEFT, POSITION, SLOT, STREAM, TOKEN, Batch
from ramulus.engine.local.fused import FusedForward, Layer
from ramulus.engine.local.kv import Reach, Slots
from ramulus.engine.local.precision import copied_bytes, unserved
from ramulus.engine.local.samples import Samples
from ramulus.native.build import library
from ramulus.native.memory import GB, free_memory

Part = tuple[Tensor, Tensor | None]
"""Weight [m, k] and bias [m] of one linear layer."""

WORD, ADDRESS = ctypes.c_int64, ctypes.c_void_p
FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
_KERNELS = {
    "ramulus_lanes": (WORD, ()),
    "ramulus_room": (WORD, (ADDRESS, WORD, WORD)),
    "ramulus_forward": (None, (ADDRESS,) * 4),
    "ramulus_steps": (WORD, (*(ADDRESS,) * 5, WORD)),
    "ramulus_copy": (None, (*(ADDRESS,) * 3, WORD)),
}
DRAWS = {
    "ramulus_entropy": (None, (ADDRESS, *(WORD,) * 4, ADDRESS)),
    "ramulus_draw": (None, (ADDRESS, *(WORD,) * 4, *(ADDRESS,) * 2, WORD, *(ADDRESS,) * 3)),
}

AT_ONCE = 2**30  # multiplications of one call of several steps, about 10 ms, after which others have a turn


def misfit(fused: FusedForward, precision: torch.dtype, most: int | None, memory: int) -> str | None:
    """Why the kernels do not serve this model in this precision, or None where they do: on a CPU, with a copy for them of at most `most` bytes.

    None as `most`: what is free now beside `memory` bytes of KV.
    """
    dtype, device = fused.geometry.dtype, fused.geometry.device
    if device.type != "cpu":
        return f"the kernels are for CPUs, the model is on {device}"
    if (reason := unserved(dtype, precision)) is not None:
        return reason
    if any(sight.chunk for sight in fused.reference.sights.values()):
        return "the kernels know no attention in chunks"
    size, limit = copy_bytes(fused, precision), max(0, free_memory() - memory) if most is None else most
    if size > limit:
        beside = f" beside {memory / GB:.1f} GB of KV" if most is None else ""
        return f"the kernels' copy of the weights takes {size / GB:.2f} GB, and {limit / GB:.2f} GB are left for it{beside}"
    return None


def copy_bytes(fused: FusedForward, precision: torch.dtype) -> int:
    """Bytes of the kernels' copy in this precision: all matrices, the head too where it is tied to the embeddings, and what is copied of those."""
    parts = [part for layer in fused.layers for part in (layer.query, layer.key, layer.value, layer.out, layer.gate, layer.up, layer.down)]
    matrices = sum(weight.numel() for weight, _ in (*parts, fused.head))
    return copied_bytes(fused.embedding.dtype, precision, matrices, fused.embedding.numel())


def _joined(parts: Sequence[Part], norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights [m, k] of stacked layers, and their biases [m] in float32; None where no part has one. A norm's weight makes them float32."""
    weight = parts[0][0] if len(parts) == 1 else torch.cat([w for w, _ in parts])
    if norm is not None:
        weight = weight.float() * norm.float()
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in parts]
    return weight, None if all(b is None for _, b in parts) else torch.cat(biases).float()


def _padded_norm(norm: Tensor, width: int) -> Tensor:
    """A norm's weight [d] in float32, with zeros up to whole panels."""
    return F.pad(norm.detach().float(), (0, -len(norm) % width))


class _Pass(ctypes.Structure):
    """`Pass` of decode.c: addresses of long columns [n], then what is done with them."""

    _fields_ = [
        *((name, ADDRESS) for name in ("token", "position", "slot", "answer")), ("n", WORD), ("together", WORD),
        ("logits", ADDRESS), ("room", ADDRESS), ("epsilon", ctypes.c_float), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Drawing(ctypes.Structure):
    """`Drawing` of decode.c: addresses of what a draw reads, of room for one step's, the function that draws, and where steps are written down."""

    _fields_ = [
        *((name, ADDRESS) for name in ("temperature", "stream", "count", "ends", "uniform", "draw", "token", "logprob", "entropy")),
        *((name, ADDRESS) for name in ("tokens", "logprobs", "entropies")), ("wide", WORD),
    ]  # fmt: skip


class Panels:
    """W and b of stacked linear layers as the kernels read them.

    weight [columns / width, inputs / pair, width, pair], in float32 with the weight of the norm before them folded in (a pair is one input), in
    bfloat16 just the model's own (two inputs). bias [columns], float32. Both are padded with zeros to whole panels and pairs.
    """

    def __init__(self, parts: Sequence[Part], width: int, dtype: torch.dtype, matrices: Matrices, norm: Tensor | None = None) -> None:
        self.parts, self.matrices, self.norm = parts, matrices, norm if dtype == torch.float32 else None
        columns, inputs = sum(len(w) for w, _ in parts), parts[0][0].shape[1]
        count, self.pair = -(-columns // width), 4 // dtype.itemsize
        self.shape = count, -(-inputs // self.pair), width, self.pair
        self.bias = torch.zeros(count * width, **FLOAT) if any(b is not None for _, b in parts) else None

    def place(self, room: Tensor) -> None:
        """Take the weights over into this room, a number for each and for the padding."""
        self.weight = room.view(self.shape).zero_()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now, adapters merged, to where the old ones were."""
        flat, bias = _joined([(self.matrices.whole(weight), bias) for weight, bias in self.parts], self.norm)
        flat = flat.to(self.weight.dtype).contiguous()
        if odd := -flat.shape[1] % self.pair:
            flat = F.pad(flat, (0, odd))
        elif flat.storage_offset() % self.pair or flat.stride(0) % self.pair:  # a part of a larger tensor that begins in the middle of a pair
            flat = flat.clone(memory_format=torch.contiguous_format)
        words, target = (x.view(torch.int32) if self.pair == 2 else x for x in (flat, self.weight.flatten(2)))  # a pair is moved as one
        count, inputs, width = target.shape
        whole = len(flat) // width
        target[:whole].copy_(words[: whole * width].view(whole, width, inputs).transpose(1, 2))
        if whole < count:
            target[whole, :, : len(flat) - whole * width].copy_(words[whole * width :].t())
        if self.bias is not None and bias is not None:
            self.bias[: len(flat)].copy_(bias)

    def pointers(self) -> list[int]:
        """Where they lie; 0 for no bias."""
        return [self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()]


class PanelLayer:
    """The matrices of one decoder layer, and the norms that are in none of them."""

    def __init__(self, layer: Layer, width: int, dtype: torch.dtype, matrices: Matrices) -> None:
        after, before = layer.after, layer.before
        self.matrices = [
            Panels((layer.query, layer.key, layer.value), width, dtype, matrices, before),
            Panels((layer.out,), width, dtype, matrices),
            Panels((layer.gate,), width, dtype, matrices, after),
            Panels((layer.up,), width, dtype, matrices, after),
            Panels((layer.down,), width, dtype, matrices),
        ]
        folded = dtype == torch.float32
        self.sources = [layer.query_norm, layer.key_norm, None if folded else before, None if folded else after]
        self.norms = [None if norm is None else _padded_norm(norm, width) for norm in self.sources]

    def refresh(self) -> None:
        """Copy the weights as they are now."""
        for matrix in self.matrices:
            matrix.refresh()
        for mine, theirs in zip(self.norms, self.sources, strict=True):
            if mine is not None and theirs is not None:
                mine[: len(theirs)].copy_(theirs.detach())

    def pointers(self) -> list[int]:
        """The addresses of the layer's numbers, as decode.c lays them out."""
        matrices = [address for matrix in self.matrices for address in matrix.pointers()]
        return matrices + [0 if norm is None else norm.data_ptr() for norm in self.norms]


class CompiledForward(FusedForward):
    """All layers in one call without torch; a token's logits are the same bits whatever runs beside it, prefilled or decoded.

    In float32, or in bfloat16: weights, keys, values and the inputs of products, all else in float32. Raises ValueError for a model that the kernels
    do not fit, and Unavailable without a compiler. `flags` are the compiler's.
    """

    name = "compiled"

    def __init__(self, fused: FusedForward, precision: torch.dtype = torch.float32, flags: Sequence[str] = ()) -> None:
        cells = ("-DBFLOAT",) if precision == torch.bfloat16 else ()
        self.library, self.draws = library("decode.c", _KERNELS, *cells, *flags), library("draw.c", DRAWS, *flags)
        super().__init__(fused.reference, fused.layers, fused.head, fused.matrices, fused.epsilon)
        g = self.geometry = replace(fused.geometry, dtype=precision)
        self.rounding = fused.geometry.dtype if cells else torch.float32  # in bfloat16 as the model has them itself
        lanes = int(self.library.ramulus_lanes())
        if g.dim % lanes:
            raise ValueError(f"the compiled kernels take heads of a multiple of {lanes} numbers, not {g.dim}")
        width = 2 * lanes
        self.panels = [PanelLayer(layer, width, precision, self.matrices) for layer in self.layers]
        self.last = Panels((self.head,), width, precision, self.matrices, self.norm)
        self._place(precision)
        self._read()
        rows, hidden = self.head[0].shape
        self.vocabulary = min(rows, self.reference.drawn or rows)
        self.columns = (-(-self.vocabulary // width) + 1) * width  # of the logits, with padding
        if self.vocabulary > len(self.table):
            raise ValueError(f"the compiled kernels take no head of {self.vocabulary} tokens over {len(self.table)} embeddings")
        inner = len(self.layers[0].gate[0])
        plain = self.table.dtype == torch.float32
        self.shape = np.array(
            (len(self.layers), hidden, self.query_heads, g.heads, g.dim, inner, self.vocabulary, plain, 1), dtype=np.int64
        )
        self.room = torch.empty(0, **FLOAT)
        self.line = torch.arange(64, device="cpu")
        self.size = sum(matrix.weight.numel() for matrix in self._matrices())
        self.model = self._model()

    def _matrices(self) -> list[Panels]:
        return [*(matrix for layer in self.panels for matrix in layer.matrices), self.last]

    def _place(self, precision: torch.dtype) -> None:
        """Lay all matrices into one block in the order in which a pass reads them: what it asks of memory ahead may be of the next one."""
        sizes = [math.prod(matrix.shape) for matrix in self._matrices()]
        block = torch.empty(sum(sizes), dtype=precision, device="cpu")
        for matrix, room in zip(self._matrices(), block.split(sizes), strict=True):
            matrix.place(room)

    @property
    def nbytes(self) -> int:
        """Bytes of the kernels' copy of the weights."""
        copied = 0 if self.table.data_ptr() == self.embedding.data_ptr() else self.table.nbytes
        return copied + sum(matrix.weight.nbytes for matrix in self._matrices())

    def refresh(self) -> None:
        """Copy the model's weights anew into the kernels' layout."""
        for layer in self.panels:
            layer.refresh()
        self.last.refresh()
        self._read()
        self.model = self._model()

    def _read(self) -> None:
        """What is read in place: the embeddings, in the precision of the kernels or in float32; and the last norm, where no matrix has it in it."""
        table = self.embedding.detach()
        self.table = (table if table.dtype == self.geometry.dtype else table.float()).contiguous()
        self.final = _padded_norm(self.norm, self.last.weight.shape[2]) if self.last.norm is None else None

    def rotary(self, length: int) -> None:
        """Fill the tables, [length, dim / 2] each."""
        super().rotary(length)
        half = self.geometry.dim // 2
        self.cosine, self.sine = (x[:, 0, half:].float().contiguous() for x in (self.cosine, self.sine))
        self.model = self._model()

    def _model(self) -> np.ndarray:
        """The model as decode.c reads it: addresses, in the order of its structs."""
        parts: list[int] = [self.table.data_ptr(), self.cosine.data_ptr(), self.sine.data_ptr()]
        parts += [0 if self.final is None else self.final.data_ptr(), *self.last.pointers()]
        for index, layer in enumerate(self.panels):
            parts += [*layer.pointers(), self.reference.sights[index].window or 0]
        return np.array(parts, dtype=np.uint64)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, positions: Tensor, reach: Reach, logits: bool) -> Tensor | None:
        """tokens, positions [B, n] -> logits [B, V] after each row's token, a view of padded columns; a pass of several tokens a row gives none."""
        slots = reach.slots
        if logits and tokens.shape[1] > 1:
            raise ValueError("the compiled kernels give logits in passes of one token a row alone")
        if slots.capacity > len(self.cosine):
            self.rotary(slots.capacity)
        b, n = tokens.shape
        if b > len(self.line):
            self.line = torch.arange(2 * b, device="cpu")
        slot_numbers = self.line[:b] if reach.rows is None else reach.rows
        if n > 1:
            slot_numbers = slot_numbers.repeat_interleave(n)
        tokens, positions = tokens.reshape(-1), positions.reshape(-1)
        if reach.chosen is not None:
            tokens, positions, slot_numbers = (x[reach.chosen] for x in (tokens, positions, slot_numbers))
        answers = self.line[:b] if logits else torch.full_like(tokens, -1)
        out = torch.empty(b if logits else 0, self.columns, **FLOAT)
        self._run(tokens, positions, slot_numbers, answers, slots, n > 1, out)
        return out[:, : self.vocabulary] if logits else None

    def _run(
        self, tokens: Tensor, positions: Tensor, slot_numbers: Tensor, answers: Tensor, slots: Slots, together: bool, out: Tensor
    ) -> None:
        """Call the kernel; every tensor is long and contiguous but `out`, which is float32."""
        columns = [x.contiguous() for x in (tokens, positions, slot_numbers, answers)]
        described = self.described([x.data_ptr() for x in columns], len(tokens), slots, together, out)
        store = described_store(slots.store)
        arrays = [array.ctypes.data for array in (self.model, self.shape, store)]
        self.library.ramulus_forward(*arrays, ctypes.addressof(described))

    def described(self, columns: list[int], n: int, slots: Slots, together: bool, out: Tensor) -> _Pass:
        """A pass of n tokens, with room for it; `columns` are addresses."""
        self.shape[-1] = torch.get_num_threads()
        needed = self.library.ramulus_room(self.shape.ctypes.data, n, slots.capacity)
        if len(self.room) < needed:
            self.room = torch.empty(needed, **FLOAT)
        return _Pass(*columns, n, together, out.data_ptr(), self.room.data_ptr(), self.epsilon, self.scale)

    def release(self) -> None:
        """Give the room of a pass back."""
        self.room = torch.empty(0, **FLOAT)

    def copy(self, store: Tensor, moves: list[tuple[int, int, int]]) -> None:
        """Of each (source, target, n) the first n positions of one row of the store over another, in this order."""
        described, triples = described_store(store), np.array(moves, dtype=np.int64)
        self.library.ramulus_copy(self.shape.ctypes.data, described.ctypes.data, triples.ctypes.data, len(moves))

    def entropy(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> [B] nats; NaN where a logit is."""
        entropies = torch.empty(len(logits), **FLOAT)
        where = logits.data_ptr(), logits.stride(0), len(logits), logits.shape[1], torch.get_num_threads()
        self.draws.ramulus_entropy(*where, entropies.data_ptr())
        return entropies

    def draw(
        self, logits: Tensor, temperature: Tensor, uniform: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, V], temperature [B] float32, uniform [B] float64 -> tokens, their log-probs, entropies [B].

        Nothing is truncated; an `entropy` that is known already is not computed again.
        """
        count = len(logits)
        tokens, chosen = torch.empty(count, dtype=torch.long, device="cpu"), torch.empty(count, **FLOAT)
        entropies = torch.empty(count, **FLOAT) if entropy is None else entropy
        temperature = temperature.contiguous()  # a rule's may be a view
        where = logits.data_ptr(), logits.stride(0), count, logits.shape[1], torch.get_num_threads()
        drawn = temperature.data_ptr(), uniform.data_ptr(), entropy is not None
        self.draws.ramulus_draw(*where, *drawn, tokens.data_ptr(), chosen.data_ptr(), entropies.data_ptr())
        return tokens, chosen, entropies


def described_store(store: Tensor) -> np.ndarray:
    """Slots as decode.c reads them: store [layers, 2, rows, heads, capacity, dim]."""
    return np.array((store.data_ptr(), store.shape[2], store.shape[4]), dtype=np.uint64)


class DecodeSteps:
    """Several decode steps in one call, of sequences with nothing truncated and no temperature rule."""

    def __init__(self, forward: CompiledForward, most: int) -> None:
        self.forward = forward
        self.line, self.uniform = np.arange(most), np.empty(most)
        self.tokens, self.numbers = np.empty(most, dtype=np.int64), np.empty((2, most), dtype=np.float32)
        self.out = torch.empty(0, forward.columns, **FLOAT)
        self.drawing = Drawing(
            uniform=self.uniform.ctypes.data,
            draw=ctypes.cast(forward.draws.ramulus_draw, ADDRESS).value,
            token=self.tokens.ctypes.data,
            logprob=self.numbers[0].ctypes.data,
            entropy=self.numbers[1].ctypes.data,
        )

    def run(self, batch: Batch, slots: Slots, samples: Samples, most: int) -> int:
        """Up to `most` steps, until a sequence draws a token in `batch.ends` or has logits that are not finite; the batch goes on and the samples
        are written. Returns how many, at least one."""
        forward, n = self.forward, batch.n
        if slots.capacity > len(forward.cosine):
            forward.rotary(slots.capacity)
        if len(self.out) < n:
            self.out = torch.empty(n, forward.columns, **FLOAT)
        wide = 2 * forward.geometry.layers * forward.query_heads * forward.geometry.dim  # multiplications of a row for each token it looks at
        most = max(1, min(most, AT_ONCE // (forward.size * n + wide * int(batch.state[POSITION, :n].sum()))))
        inputs = [batch.state[i].ctypes.data for i in (TOKEN, POSITION, SLOT)]
        described = forward.described([*inputs, self.line.ctypes.data], n, slots, False, self.out)
        self._point_at(batch, samples, samples.room(most, batch.rows))
        store = described_store(slots.store)
        arrays = [array.ctypes.data for array in (forward.model, forward.shape, store)]
        steps = int(forward.library.ramulus_steps(*arrays, ctypes.addressof(described), ctypes.addressof(self.drawing), most))
        batch.state[LEFT, :n] -= steps
        samples.now += steps
        return steps

    def _point_at(self, batch: Batch, samples: Samples, at: int) -> None:
        """Let the kernel read the batch and write from the step `at` on; all arrays outlive the call."""
        drawing = self.drawing
        drawing.temperature = batch.temperature.ctypes.data
        drawing.stream, drawing.count = (batch.state[i].ctypes.data for i in (STREAM, COUNT))
        drawing.ends = None if batch.ends is None else batch.ends.ctypes.data
        drawing.tokens = samples.tokens[at].ctypes.data
        drawing.logprobs, drawing.entropies = (column[at].ctypes.data for column in samples.numbers[:2])
        drawing.wide = samples.tokens.shape[1]

    def release(self) -> None:
        """Give the memory of the logits back."""
        self.out = torch.empty(0, self.forward.columns, **FLOAT)

    @property
    def logits(self) -> Tensor:
        """[most, V] of the last step."""
        return self.out[:, : self.forward.vocabulary]
