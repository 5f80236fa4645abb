"""How far are the tokens a second of `ramulus plan --gpus` from what is measured here? `python -m benchmarks.rates FOLDER`.

One core in the place of a GPU: what it multiplies and reads a second is measured, in bfloat16, at the sizes of the model. The shares that are
reached are taken from two shapes of decoding (reading from one row, products from the most) and one of the update; the others are computed from
them, as for GPUs. Seconds are CPU seconds of one thread, the best of --repeats.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.pairing import record, table
from benchmarks.pretrained import FIRST, loaded, sampled
from benchmarks.update import GRPO
from benchmarks.update_pretrained import VOCABULARY, forest, learn, policy_of
from ramulus.engine.local.local_engine import LocalEngine
from ramulus.learn.packing.pack import pack
from ramulus.learn.policy.model import Pretrained
from ramulus.models.sizes import Sizes, sizes_of_model
from ramulus.run.memory.rates import Gpu, decode_rate, update_rate

ROWS = (1, 8, 32, 64)  # that decode together; the shares are taken from the first and the last
PATHS = ((48, 1), (160, 1), (360, 1))  # tokens of a path and trees; the first is what the share is taken from
PROMPT, NEW = 32, 32


def best(work: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of some repeats."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def core(sizes: Sizes) -> Gpu:
    """What one core multiplies and reads a second."""
    a, b = torch.randn(1024, sizes.hidden).bfloat16(), torch.randn(sizes.inner, sizes.hidden).bfloat16()
    large = torch.ones(2**27)  # half a gigabyte
    with torch.no_grad():
        speed = 2 * len(a) * b.numel() * 20 / best(lambda: [a @ b.T for _ in range(20)], 5)
        bandwidth = large.nbytes / best(large.sum, 5)
    return Gpu(0.0, speed, bandwidth, 1.0, 1.0, 1.0)


def decoding(folder: str, here: Gpu, sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of sequences."""
    engine, found = LocalEngine(loaded(folder, torch.float32), slots=max(ROWS), precision=torch.bfloat16), {}
    for rows in ROWS:
        prompts = torch.randint(FIRST, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
        sampled(engine, prompts, 2)
        short, long = (best(partial(sampled, engine, prompts, new), repeats) for new in (2, NEW + 2))
        found[rows] = rows * NEW / (long - short)
    context, few, many = PROMPT + NEW / 2, ROWS[0], ROWS[-1]
    reading = found[few] / decode_rate(replace(here, decode=1e9), sizes, few, context, 2)
    products = found[many] / decode_rate(replace(here, reading=1e9), sizes, many, context, 2)
    fitted = replace(here, reading=reading, decode=products)
    return [line(f"decoding, rows: {rows}", rate, decode_rate(fitted, sizes, rows, context, 2)) for rows, rate in found.items()]


def updating(folder: str, here: Gpu, sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """A row for each length of paths."""
    policy, found = policy_of("bfloat16", Pretrained(folder)()[0]), []
    for new, trees in PATHS:
        args = argparse.Namespace(trees=trees, prompt=100, new=new)
        trunks = forest(args)
        rows = pack(trunks, GRPO.credit(trunks), GRPO, 2**15)
        seconds = best(partial(learn, policy, rows, step=False), repeats)
        tokens = sum(map(len, rows))
        context = sum(float(row.position.double().mean()) * len(row) for row in rows) / tokens
        found.append((tokens, context, tokens / seconds))
    share = found[0][2] / update_rate(here, sizes, False, found[0][1])
    fitted = replace(here, update=share)
    return [line(f"update, {tokens} tokens that see {seen:.0f}", rate, update_rate(fitted, sizes, False, seen)) for tokens, seen, rate in found]


def line(what: str, rate: float, computed: float) -> dict[str, Any]:
    """A row of the table."""
    return {"what": what, "measured tokens/s": f"{rate:.0f}", "computed": f"{computed:.0f}", "off": f"{computed / rate - 1:+.0%}"}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sizes_of_model(loaded(args.folder, torch.float32))
    here = core(sizes)
    sys.stdout.write(f"this core: {here.speed / 1e9:.0f} GFLOP/s in bfloat16, {here.bandwidth / 1e9:.1f} GB/s\n")
    rows = [*decoding(args.folder, here, sizes, args.repeats), *updating(args.folder, here, sizes, args.repeats)]
    sys.stdout.write(f"{table(rows)}\n")
    record("rates", rows, "cpu")


if __name__ == "__main__":
    main()
