"""The self-check of a forward pass: decoding over remembered keys and values against the model's plain forward, near and far."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ramulus.engine.local.forward import Forward, ModelForward
from ramulus.engine.local.fused import FusedForward
from ramulus.engine.local.kv import Geometry, Reach, Slots, rounded
from ramulus.models.precision import HALVES, is_half, widened
from ramulus.models.survey import FAR, message_of

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # of logits, relative to their spread; quantised models: COARSE
COARSE = 6e-2
ROUNDING = 3.0  # how many times as far from float32 as the model's own half-precision forward another one may be
SHORTEST = 12  # of a text, where windows do not make it longer
STEPS = 2  # decode steps


@dataclass(frozen=True)
class Trial:
    """Two texts of unequal length, the second at far positions."""

    tokens: Tensor  # [2, n]
    near: Tensor  # [2, n] positions in the slots
    far: Tensor  # [2, n] positions that the model is told
    lengths: tuple[int, int]

    def at(self, step: int) -> list[int]:
        """The place of each text's token that decode step `step` runs."""
        return [length - STEPS + step for length in self.lengths]

    def plain(self, reference: ModelForward) -> list[Tensor]:
        """The logits of each decode step [2, V] by the model's plain forward; the first text, alone, is not told its positions."""
        lines = [reference.plain(self.tokens[:1]), reference.plain(self.tokens[1:], self.far[1:])]
        return [torch.stack([line[0, at] for line, at in zip(lines, self.at(step))]) for step in range(STEPS)]


def verify_forward(forward: Forward, reference: ModelForward) -> float:
    """A padded prefill of two unequal rows and some decode steps against the model's plain forward.

    Windows and chunks that a text of LONGEST tokens reaches past are reached past; longer ones were read from the mask itself. Half-precision models
    compute in float32 here, where nothing is rounded; a fast forward of one, or in half precision of another, may be ROUNDING times as far from that
    as the model's own is in half precision.
    Returns the relative error of the logits; raises ValueError naming the architecture when it is too large.
    """
    half, own = is_half(reference.model), forward is reference
    case = trial(reference, own or type(forward) is FusedForward)
    if isinstance(forward, FusedForward):
        forward.rotary(int(case.far.max()) + 1)
    try:
        with widened(reference.model):
            truth = case.plain(reference)
            if own:
                geometry = replace(forward.geometry, dtype=torch.float32) if half else forward.geometry
                worst = relative_error(decoded(forward, geometry, case), truth)
        if half or not own:
            ours = decoded(forward, forward.geometry, case)  # the model's own must at least run in its own precision
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{reference.title} cannot be sampled by the local engine: its forward fails, {message_of(error)}") from error
    allowed = TOLERANCE.get(geometry.dtype if own else forward.geometry.dtype, COARSE)
    if not own:
        worst = relative_error(ours, truth)
        if half or forward.geometry.dtype in HALVES:
            with nullcontext() if half else torch.autocast(case.tokens.device.type, forward.geometry.dtype):
                allowed = 1e-3 + ROUNDING * relative_error(case.plain(reference), truth)
    if isinstance(forward, FusedForward):
        forward.rotary(SHORTEST)  # the long table is not kept
    if not worst <= allowed:
        raise ValueError(
            f"{reference.title} cannot be sampled by the local engine: decoding over remembered keys and values gives other logits than "
            f"its plain forward (relative error {worst:.1e}), so its tokens depend on more than those"
        )
    return worst


def trial(reference: ModelForward, far: bool) -> Trial:
    """Random texts, as long as the model's windows make necessary."""
    device = reference.geometry.device
    n = min(reference.limit, reference.survey.past_windows(SHORTEST))
    vocabulary = int(reference.model.get_input_embeddings().num_embeddings)
    tokens = torch.randint(vocabulary, (2, n), generator=torch.Generator().manual_seed(0)).to(device)
    near = torch.arange(n, device=device).expand(2, n)
    start = min(reference.limit, FAR) - n if far else 0
    return Trial(tokens, near, near + torch.tensor([[0], [start]], device=device), (n, max(n - 3, STEPS + 1)))


def decoded(forward: Forward, geometry: Geometry, case: Trial) -> list[Tensor]:
    """The logits of each decode step [2, V], after a prefill in other slots."""
    slots, device = Slots(geometry), geometry.device
    lengths = torch.tensor(case.lengths, device=device)[:, None]
    n = max(case.lengths)
    slots.resize(3, rounded(n), 0)
    first, near, far = (x[:, : n - STEPS].contiguous() for x in (case.tokens, case.near, case.far))
    forward(first, far, Reach(slots, near, slots.capacity, torch.tensor([2, 1], device=device), near < lengths - STEPS), False)
    for row, source in ((0, 2), (1, 1)):
        slots.move([(source, row, n)])
    step_logits = []
    for step in range(STEPS):
        at = torch.tensor(case.at(step), device=device)[:, None]
        tokens, near, far = (x.gather(1, at) for x in (case.tokens, case.near, case.far))
        logits = forward(tokens, far, Reach(slots, near, slots.capacity), True)
        assert logits is not None
        step_logits.append(logits)
    return step_logits


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative error of logits [2, V] over steps and rows."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.double(), other.double()
        spread = (other - other.mean(1, keepdim=True)).norm(dim=1).clamp(min=1e-12)
        worst = max(worst, *((one - other).norm(dim=1) / spread).nan_to_num(torch.inf).tolist())
    return worst
