"""llama.cpp on this machine's CPU, one batch at a time. Runs where `llama-cpp-python` is installed; speaks JSON lines as `vllm_worker.py`.

Started with a GGUF file, threads, the most rows and the most tokens of one text. All prompts of a batch go through the model together, then
one token of every sequence at a time, drawn at temperature 1 by llama.cpp's own sampler from the whole distribution. Nothing is kept.
"""

from __future__ import annotations

import os
import sys

import llama_cpp as cpp
from vllm_worker import serve  # beside this file


class Engine:
    """A model and a context with room for `rows` sequences of `most` tokens."""

    def __init__(self, path: str, threads: int, rows: int, most: int) -> None:
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
        asked = cpp.llama_context_default_params()
        asked.n_ctx, asked.n_batch, asked.n_ubatch, asked.n_seq_max = rows * most, rows * most, 512, rows
        asked.n_threads = asked.n_threads_batch = threads
        self.context = cpp.llama_init_from_model(self.model, asked)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot take {path} with {rows} sequences of {most} tokens")
        self.batch = cpp.llama_batch_init(rows * most, 0, 1)
        self.drawers = [cpp.llama_sampler_init_dist(seed) for seed in range(rows)]

    def run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Send (token, position, sequence, whether its logits are wanted) through the model."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, row
        code = cpp.llama_decode(self.context, self.batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")

    def generate(self, prompts: list[list[int]], new: int) -> list[int]:
        """The length of each response."""
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        texts = [(token, at, row, at == len(prompt) - 1) for row, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        self.run(texts)
        places = [i for i, (*_, wanted) in enumerate(texts) if wanted]
        lengths = [0] * len(prompts)
        for turn in range(new):
            drawn = [cpp.llama_sampler_sample(self.drawers[row], self.context, place) for row, place in enumerate(places)]
            lengths = [length + 1 for length in lengths]
            if turn < new - 1:
                self.run([(token, len(prompts[row]) + turn, row, True) for row, token in enumerate(drawn)])
                places = list(range(len(prompts)))
        return lengths


def main() -> None:
    """Answer every line, until there is none."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    engine = Engine(sys.argv[1], *map(int, sys.argv[2:5]))
    serve(channel, cpp.__version__, engine.generate)


if __name__ == "__main__":
    main()
