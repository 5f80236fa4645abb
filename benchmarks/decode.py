"""How fast does the local engine decode? `python -m benchmarks.decode --shape S --dtype float32`.

More requests than slots, against transformers `generate` in batches of the same size: same weights, dtype, prompts, forced
response lengths and sampling (temperature 1, nothing truncated). A trainer does not know lengths beforehand, so both take the
requests as they come. `generate` yields tokens alone; the engine records log-prob and entropy of each as well.
Checked in the same run: every response has its length, and the engine's log-probs are those of a plain forward.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from benchmarks.pairing import SHAPES, Shape, interleave, ratio, record, settle, spread, table
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.run.runtime import collect_seldom

# largest and mean difference of log-probs to the plain forward
TOLERANCE = {"float32": (2e-4, 2e-5), "bfloat16": (0.25, 0.03)}
# prompt tokens, median and longest response; the quickstart's are those of its own task
LENGTHS = {
    "quickstart": (11, 32, 64),
    "S": (64, 64, 256),
    "M": (64, 48, 160),
    "0.5B": (128, 256, 1024),
    "1.5B": (128, 256, 1024),
}
SIGMA = 0.6  # of the log-normal response lengths
SCALE = 2.0  # of the random weights
FIRST = 2  # ids below are padding and EOS, which prompts do not contain


@dataclass(frozen=True)
class Work:
    """N prompts of like but unequal lengths, and how many tokens each is answered with."""

    prompts: list[tuple[int, ...]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Response tokens in all."""
        return sum(self.lengths)


def work(shape: Shape, n: int, prompt: int, median: int, longest: int, equal: bool, seed: int = 0) -> Work:
    """Prompts of `prompt` tokens give or take a quarter; response lengths log-normal up to `longest`, or all at the mean of those."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(prompt - prompt // 4, prompt + prompt // 4 + 1, (n,), generator=generator).tolist()
    prompts = [tuple(torch.randint(FIRST, shape.vocabulary, (size,), generator=generator).tolist()) for size in sizes]
    drawn = (torch.randn(n, generator=generator) * SIGMA + math.log(median)).exp().round().clamp(4, longest).long()
    lengths = [round(float(drawn.float().mean()))] * n if equal else drawn.tolist()
    return Work(prompts, lengths)


class Lengths(StoppingCriteria):
    """Each row ends when it has its forced length."""

    def __init__(self, stops: Tensor) -> None:
        self.stops = stops  # [B] positions in the padded row

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.stops <= input_ids.shape[1]


def generate(model: Any, todo: Work, batch: int) -> list[Tensor]:
    """transformers' own loop, prompts padded on the left, in batches as they come -> response tokens of each request."""
    device = model.device
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
        eos_token_id=None,
        max_new_tokens=max(todo.lengths),
    )
    found = []
    for start in range(0, len(todo.prompts), batch):
        prompts, lengths = todo.prompts[start : start + batch], todo.lengths[start : start + batch]
        wide = max(map(len, prompts))
        rows = torch.tensor([(0,) * (wide - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts], device=device)
        stops = Lengths(torch.tensor(lengths, device=device) + wide)
        with torch.inference_mode():
            out = model.generate(rows, attention_mask=mask, generation_config=settings, stopping_criteria=[stops])
        found += [row[wide : wide + n] for row, n in zip(out, lengths)]
    return found


def sample(engine: LocalEngine, todo: Work) -> list[Segment]:
    """All requests at once, after the weights were taken anew, as at the start of every training step."""

    async def everything() -> list[Segment]:
        await engine.load(None, engine.version + 1)
        asked = zip(todo.prompts, todo.lengths)
        requests = [Request(p, Sampling(n), seed=seed) for seed, (p, n) in enumerate(asked)]
        return await engine.sample(requests)

    return asyncio.run(everything())


@torch.no_grad()
def differences(model: Any, todo: Work, segments: list[Segment], count: int = 32) -> Tensor:
    """|our log-prob - that of the plain forward over the whole text|, of the tokens of some requests spread over all."""
    found = []
    for i in range(0, len(segments), max(1, len(segments) // count)):
        text = torch.tensor([todo.prompts[i] + tuple(segments[i].tokens)], device=model.device)
        logits = model(text).logits[0, len(todo.prompts[i]) - 1 : -1].float()
        truth = logits.log_softmax(-1).gather(1, text[0, len(todo.prompts[i]) :, None])[:, 0].cpu()
        found.append((truth - torch.tensor(segments[i].logprobs)).abs())
    return torch.cat(found)


def checked(model: Any, todo: Work, segments: list[Segment], theirs: list[Tensor], dtype: str) -> tuple[float, float]:
    """Largest and mean difference of log-probs; raises AssertionError where they, or a length, are wrong."""
    for name, sizes in (("engine", [len(s.tokens) for s in segments]), ("generate", [len(row) for row in theirs])):
        if sizes != todo.lengths:
            raise AssertionError(f"the responses of {name} do not have the forced lengths")
    off = differences(model, todo, segments)
    most, mean = float(off.max()), float(off.mean())
    if not (most <= TOLERANCE[dtype][0] and mean <= TOLERANCE[dtype][1]):
        raise AssertionError(
            f"log-probs differ by up to {most:.1e}, {mean:.1e} in the mean; allowed are {TOLERANCE[dtype]}"
        )
    return most, mean


def bandwidth() -> float:
    """Bytes a second that this GPU reads and writes in a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, 5, 2, "cuda")["copy"]
    return 2 * source.nbytes / spread(seconds).median


def bytes_read(model: Any, engine: LocalEngine, todo: Work, steps: int) -> float:
    """What decoding must read at least: the weights (not the rows of the embedding) at each step, and every row's own KV."""
    kept = {p.data_ptr(): p.nbytes for p in model.parameters()}
    if not model.config.tie_word_embeddings:
        kept.pop(model.get_input_embeddings().weight.data_ptr())
    per_token = engine.forward.geometry.token_bytes
    seen = sum(n * len(p) + n * (n + 1) // 2 for p, n in zip(todo.prompts, todo.lengths))
    return sum(kept.values()) * steps + seen * per_token


def measure(args: argparse.Namespace, model: Any, equal: bool) -> dict[str, Any]:
    """One row of the table."""
    prompt, median, longest = LENGTHS[args.shape]
    todo = work(SHAPES[args.shape], args.requests, prompt, median, longest, equal)
    engine = LocalEngine(model, slots=args.batch, memory=args.memory_mb * 2**20, threads=args.engine_threads)
    most, mean = checked(model, todo, sample(engine, todo), generate(model, todo, args.batch), args.dtype)
    before = engine.counters()["steps"]
    sample(engine, todo)
    steps = engine.counters()["steps"] - before
    contenders = {"ramulus": lambda: sample(engine, todo), "generate": lambda: generate(model, todo, args.batch)}
    seconds = interleave(contenders, args.repeats, 0, args.device)
    row = {
        "shape": args.shape, "dtype": args.dtype, "lengths": "equal" if equal else "unequal", "tokens": todo.tokens,
        "ramulus tokens/s": str(spread([todo.tokens / s for s in seconds["ramulus"]])),
        "generate tokens/s": str(spread([todo.tokens / s for s in seconds["generate"]])),
        "speed-up": str(ratio(seconds, "ramulus", "generate")),
        "engine threads": engine.threads or torch.get_num_threads(), "ramulus steps": steps, "log-prob error max, mean": f"{most:.1e}, {mean:.1e}",
    }  # fmt: skip
    if args.device.startswith("cuda"):
        row["share of memory bandwidth"] = round(
            bytes_read(model, engine, todo, steps) / spread(seconds["ramulus"]).median / bandwidth(), 3
        )
    settle(args.device)
    return row


def prepared(args: argparse.Namespace) -> Any:
    """The model: no EOS for `generate` to fall back on, and weights so large that a wrong attention shows in the log-probs."""
    model = SHAPES[args.shape](args.device, getattr(torch, args.dtype))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SCALE)
    return model


def main() -> None:
    """Measure unequal and equal lengths and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="S")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="rows that decode together, on both sides")
    parser.add_argument("--memory-mb", type=int, default=1024, help="of KV")
    parser.add_argument(
        "--engine-threads", type=int, help="of torch while the engine works; generate keeps OMP_NUM_THREADS"
    )
    parser.add_argument("--lengths", choices=("both", "unequal", "equal"), default="both")
    args = parser.parse_args()
    model = prepared(args)
    collect_seldom()  # as the command line does after its imports
    rows = [measure(args, model, name == "equal") for name in ("unequal", "equal") if args.lengths in ("both", name)]
    print(table(rows))
    record("decode", rows, args.device)


if __name__ == "__main__":
    main()
