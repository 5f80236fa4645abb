"""vLLM on this machine's CPU, one batch at a time. Runs in vLLM's environment (`make vllm`); speaks JSON lines.

Started with a model's folder, a dtype, the most rows and the most tokens of one text, and with `remember` where keys and values of former texts are
to be used again. Each line it reads has `prompts` (lists of token ids) and `new`; it answers with the tokens of each response and the CPU seconds of
this process, all threads, prefill included. With `forget` what is remembered goes first, as it does at new weights.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

BLOCK = 32  # tokens that are remembered together; the least that its attention on a CPU takes


def say(channel: Any, content: dict[str, Any]) -> None:
    """One line to whoever started this process."""
    channel.write(json.dumps(content) + "\n")
    channel.flush()


def spent() -> float:
    """CPU seconds of this process so far, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def serve(channel: Any, version: str, generate: Callable[[list[list[int]], int], list[list[int]]], forget: Callable[[], object]) -> None:
    """Say the version, then answer every line until there is none; `generate` makes responses of prompts and a number of tokens."""
    say(channel, {"version": version})
    for line in sys.stdin:
        asked = json.loads(line)
        before = spent()
        if asked.get("forget"):
            forget()
        responses = generate(asked["prompts"], asked["new"])
        say(channel, {"tokens": responses, "seconds": spent() - before})


def main() -> None:
    """Answer every line, until there is none."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    from vllm import LLM, SamplingParams, __version__

    folder, dtype, rows, most = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    remember = "remember" in sys.argv[5:]
    more = {"block_size": BLOCK} if remember else {}
    engine = LLM(folder, dtype=dtype, max_num_seqs=rows, max_model_len=most, enable_prefix_caching=remember, seed=0, **more)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        how = SamplingParams(temperature=1.0, max_tokens=new, min_tokens=new, ignore_eos=True, logprobs=0, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    serve(channel, __version__, generate, engine.reset_prefix_cache)


if __name__ == "__main__":
    main()
