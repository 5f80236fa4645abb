"""`learner=Sharded(...)` in a recipe: what builds the learner over many processes. Torch itself is loaded when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ramulus.learn.factory import LearnerMemory, LearnerTraits, Ranks
from ramulus.native.processors import device_multiplies_bfloat16

if TYPE_CHECKING:
    from ramulus.learn.policy.learner import Learner


@dataclass(frozen=True)
class Sharded:
    """Trains with FSDP2 over many processes: weights, gradients and optimizer are spread over them.

    Started by `torchrun`, its processes are the ranks; else this process starts `ranks` on this machine, itself one of them. Rank 0 draws tasks,
    samples and writes; the engine has a whole model there, and is handed the weights after every step.

    Example:
        >>> from ramulus import Sharded
        >>> Sharded(ranks=8).offload
        False
    """

    ranks: int | None = None  # processes on this machine; None: one a GPU, or one. torchrun's own number where it started them
    sharing: int | None = None  # ranks that hold one copy of the weights together; None: those of a machine. The others hold copies (hybrid)
    offload: bool = False  # the optimizer's numbers, 12 bytes a trained weight, stay in the CPUs' memory and are stepped there
    adam: Literal["exact", "8bit"] = "exact"  # 8bit: moments in 8 bits (torchao), 2 bytes a trained weight in place of 8
    timeout: float = 1800.0  # seconds for which a rank waits for the others in the middle of a step
    chunk: int = 1024  # targets whose logits exist at once
    attention: str = "auto"
    float32_masters: bool = True  # the optimizer steps float32 copies of weights in half precision

    def __post_init__(self) -> None:
        for name in ("ranks", "sharing"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"learner.{name} must be at least 1, got {value}")
        if not 0 < self.timeout <= 1e9:
            raise ValueError(f"learner.timeout must be above 0 and at most 1e9 seconds, got {self.timeout}")
        if self.adam not in ("exact", "8bit"):
            raise ValueError(f"learner.adam is 'exact' or '8bit', got {self.adam!r}")
        if self.chunk < 1:
            raise ValueError(f"learner.chunk must be at least 1, got {self.chunk}")

    @property
    def traits(self) -> LearnerTraits:
        """Its ranks; what the memory of each depends on."""
        memory = LearnerMemory(self.chunk, self.float32_masters, self.offload, self.adam == "8bit")
        return LearnerTraits(True, Ranks(self.ranks, self.sharing, self.timeout), memory)

    def __call__(self, model: Any, tokenizer: Any, source: Any, value: bool, options: Mapping[str, Any], seed: int) -> Learner:
        """A learner of a copy of `model`, over the ranks; `options` are those of TorchPolicy. `source` and `seed` are not needed."""
        import torch

        from ramulus.learn.sharded.placing import Spread
        from ramulus.learn.sharded.sharded_learner import sharded_learner
        from ramulus.learn.sharded.starting import start_ranks
        from ramulus.learn.sharded.world import STANDING

        device = model.device.type
        usual = torch.cuda.device_count() if device == "cuda" else 1
        size = STANDING[0].size if STANDING else self.ranks or usual
        local = STANDING[0].local if STANDING else size
        sharing = self.sharing or min(local, size)
        if size % sharing:
            raise ValueError(f"learner.sharing={sharing} does not divide {size} ranks: take a number that does")
        if options.get("autocast") == "auto":  # asked of the ranks' device: the policy here is built on a copy that lies elsewhere
            options = dict(options) | {"autocast": device_multiplies_bfloat16(model.device)}
        more = dict(options) | {"chunk": self.chunk, "attention": self.attention, "float32_masters": False}
        how = {name: options[name] for name in ("betas", "eps", "weight_decay") if name in options}
        how |= {"float32_masters": self.float32_masters, "offload": self.offload, "adam": self.adam, "seconds": self.timeout}
        spread = Spread(sharing=sharing, device=device, **how)
        world = STANDING[0] if STANDING else start_ranks(size, self.timeout)
        return sharded_learner(world, model, tokenizer, value, more, spread)
