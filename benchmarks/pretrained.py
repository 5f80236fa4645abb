"""How fast does a pretrained model decode, and how far are its log-probs? `python -m benchmarks.pretrained FOLDER --new 128`.

Rows of random prompts that all get the same number of new tokens, temperature 1, nothing truncated, in tokens per CPU-second of the whole
process, prefill included; contenders take turns. Ours takes new weights before each repeat, as at every training step. Checked in the same run: each
response has its length. `--mismatch` compares recorded log-probs with the model's plain forward over the same texts, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.pairing import record, spread, table
from benchmarks.rivals.worker import Piped
from ramulus.engine.engine import Request, Sampling, Segment
from ramulus.engine.local.local_engine import LocalEngine

CONTENDERS = ("ours-float32", "ours-bfloat16", "generate-float32", "generate-bfloat16")
VLLM = ("vllm-float32", "vllm-bfloat16")  # in an environment of their own
FIRST = 100  # ids below may be special tokens, which prompts do not contain


def cpu_seconds() -> float:
    """Of this process so far, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def loaded(folder: str, dtype: torch.dtype) -> Any:
    """The model in eval mode, without EOS, which `generate` would stop at."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def sampled(engine: LocalEngine, prompts: Tensor, new: int) -> list[Segment]:
    """A response to each prompt, by weights that were just loaded."""

    async def everything() -> list[Segment]:
        await engine.load(None, engine.version + 1)
        return await engine.sample([Request(tuple(prompt), Sampling(new), seed=i) for i, prompt in enumerate(prompts.tolist())])

    return asyncio.run(everything())


def generated(model: Any, prompts: Tensor, new: int) -> list[Tensor]:
    """The same by transformers' own loop."""
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "max_new_tokens": new}
    with torch.inference_mode():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    return [row[prompts.shape[1] :] for row in out]


class Worker(Piped):
    """Another engine in its own environment and process; answers with its responses, and counts its own CPU seconds."""

    def __init__(self, name: str, script: str, python: str, *arguments: object) -> None:
        alone = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        command = [python, str(Path(__file__).parent / "rivals" / script), *map(str, arguments)]
        super().__init__(name, command, torch.get_num_threads(), alone)
        print(f"{name}: {self.hello['version']}", flush=True)
        self.seconds = 0.0

    def responses(self, prompts: list[list[int]], new: int, forget: bool = False) -> list[list[int]]:
        """Of that many tokens; `forget`: nothing is known of former texts."""
        told = self.asked({"prompts": prompts, "new": new, "forget": forget})
        self.seconds += told["seconds"]
        return list(told["tokens"])

    def __call__(self, prompts: Tensor, new: int) -> list[list[int]]:
        return self.responses(prompts.tolist(), new)


def contender(name: str, args: argparse.Namespace) -> Callable[[Tensor, int], list[Any]]:
    """What answers prompts [rows, n] with `new` tokens each."""
    folder, rows = args.folder, args.rows
    kind, _, dtype = name.partition("-")
    if kind == "vllm":
        return Worker(name, "vllm_worker.py", args.vllm, folder, dtype, rows, args.prompt + args.new)
    if kind == "generate":
        model = loaded(folder, getattr(torch, dtype))
        return lambda prompts, new: generated(model, prompts, new)
    engine = LocalEngine(loaded(folder, torch.float32), slots=rows, precision=getattr(torch, dtype))
    print(f"{name}: {engine.about}", flush=True)
    return lambda prompts, new: sampled(engine, prompts, new)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    prompts = torch.randint(FIRST, args.vocabulary, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0))
    ways = {name: contender(name, args) for name in args.contenders}
    for file in args.gguf:
        name, threads = f"llama.cpp {file.name}", torch.get_num_threads()
        ways[name] = Worker(name, "llama_worker.py", args.llama, file, threads, args.rows, args.prompt + args.new)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(prompts, 2)
    for _ in range(args.repeats):
        for name, way in ways.items():
            clock = (lambda way=way: way.seconds) if isinstance(way, Worker) else cpu_seconds
            before = clock()
            answers = way(prompts, args.new)
            rates[name].append(args.rows * args.new / (clock() - before))
            sizes = {len(answer.tokens if isinstance(answer, Segment) else answer) for answer in answers}
            if sizes != {args.new}:
                raise AssertionError(f"{name} answered with {sizes} tokens, not {args.new}")
    about = {"rows": args.rows, "prompt": args.prompt, "new": args.new, "threads": torch.get_num_threads()}
    return [{"who": name} | about | {"tokens/CPU-s": str(spread(found)), "repeats": len(found)} for name, found in rates.items()]


@torch.no_grad()
def mismatches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Differences of log-probs of what ours sampled, between: ours, the plain forward in float32, in bfloat16, and in float32 under autocast."""
    exact, half = loaded(args.folder, torch.float32), loaded(args.folder, torch.bfloat16)
    prompts = torch.randint(FIRST, args.vocabulary, (args.rows, args.prompt), generator=torch.Generator().manual_seed(0))
    rows = []
    for name, model, precision in (("float32", exact, None), ("bfloat16 beside float32", exact, torch.bfloat16), ("bfloat16", half, None)):
        segments = sampled(LocalEngine(model, slots=args.rows, precision=precision), prompts, args.new)
        columns: dict[str, list[Tensor]] = {"ours": [], "float32": [], "bfloat16": [], "autocast": []}
        for prompt, segment in zip(prompts, segments):
            answer = torch.tensor(segment.tokens.tolist())
            text = torch.cat((prompt, answer))[None]
            columns["ours"].append(torch.tensor(segment.logprobs.tolist()))
            for way, judge, cast in (("float32", exact, False), ("bfloat16", half, False), ("autocast", exact, True)):
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    logits = judge(text).logits[0, args.prompt - 1 : -1].float()
                columns[way].append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0])
        whole = {way: torch.cat(column) for way, column in columns.items()}
        pairs = [("ours", "float32"), ("ours", "bfloat16"), ("ours", "autocast"), ("bfloat16", "float32"), ("autocast", "float32")]
        rows.append({"ours in": name, "tokens": len(whole["ours"])} | {f"{a} - {b}": told(whole[a] - whole[b]) for a, b in pairs})
    return rows


def told(off: Tensor) -> str:
    """Standard deviation, mean and largest of differences."""
    return f"{float(off.std()):.1e}, {float(off.abs().mean()):.1e}, {float(off.abs().max()):.1e}"


def add_rivals(parser: argparse.ArgumentParser) -> None:
    """The options that say where other engines are."""
    parser.add_argument("--vllm", default=".venv-vllm/bin/python", help="the Python of vLLM's environment, which `make vllm` makes")
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="files of the model for llama.cpp, each a contender")
    parser.add_argument("--llama", default=".venv-llama/bin/python", help="the Python of an environment with llama-cpp-python")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of each response")
    parser.add_argument("--vocabulary", type=int, default=40_000, help="ids of prompts are below it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS + VLLM, default=CONTENDERS)
    add_rivals(parser)
    parser.add_argument("--mismatch", action="store_true", help="compare log-probs instead of speed")
    args = parser.parse_args()
    rows = mismatches(args) if args.mismatch else measured(args)
    print(table(rows))
    record("pretrained", rows, "cpu")


if __name__ == "__main__":
    main()
