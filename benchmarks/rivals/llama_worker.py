"""llama.cpp on this machine's CPU, one batch at a time. Runs where `llama-cpp-python` is installed; speaks JSON lines as `vllm_worker.py`.

Started with a GGUF file, threads, the most rows and the most tokens of one text. All prompts of a batch go through the model together, then
one token of every sequence at a time, drawn at temperature 1 by llama.cpp's own sampler from the whole distribution. With `remember` the sequences of
the batch before stay, and a text begins with what it shares with one of them.
"""

from __future__ import annotations

import os
import sys

import llama_cpp as cpp
from vllm_worker import serve  # beside this file


class Engine:
    """A model and a context with room for `rows` sequences of `most` tokens."""

    def __init__(self, path: str, threads: int, rows: int, most: int, remember: bool) -> None:
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
        asked = cpp.llama_context_default_params()
        self.rows, self.remember = rows, remember
        sequences = 2 * rows if remember else rows  # those of the batch before, and of this one
        asked.n_ctx, asked.n_batch, asked.n_ubatch, asked.n_seq_max = sequences * most, rows * most, 512, sequences
        asked.kv_unified = remember  # cells that sequences share
        asked.n_threads = asked.n_threads_batch = threads
        self.context = cpp.llama_init_from_model(self.model, asked)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot take {path} with {rows} sequences of {most} tokens")
        self.held: dict[int, list[int]] = {}  # the tokens whose keys and values a sequence has
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

    def forget(self) -> None:
        """Drop all keys and values."""
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), True)
        self.held = {}

    def begin(self, prompts: list[list[int]]) -> list[int]:
        """A sequence for each prompt, with all of it but its last token; what prompts share, and share with the batch before, is computed once.

        The sequences of the batch before are gone afterwards.
        """
        if not self.remember:
            self.forget()
        memory, former = cpp.llama_get_memory(self.context), self.held
        first = 0 if not former or min(former) >= self.rows else self.rows
        rows, texts, copies = [first + i for i in range(len(prompts))], [], []
        begun: dict[tuple[int, ...], int] = {}
        for row, prompt in zip(rows, prompts):
            whole = tuple(prompt[:-1])
            if self.remember and whole in begun:
                copies.append((begun[whole], row))
                continue
            begun[whole] = row
            common, source = max(((shared(prompt[:-1], text), one) for one, text in former.items()), default=(0, 0))
            if common:
                cpp.llama_memory_seq_cp(memory, source, row, 0, common)
            texts += [(token, at, row, False) for at, token in enumerate(whole) if at >= common]
        if texts:
            self.run(texts)
        for source, row in copies:
            cpp.llama_memory_seq_cp(memory, source, row, -1, -1)
        for row in former:
            cpp.llama_memory_seq_rm(memory, row, -1, -1)
        return rows

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The response to each."""
        rows = self.begin(prompts)
        self.run([(prompt[-1], len(prompt) - 1, row, True) for row, prompt in zip(rows, prompts)])
        places = list(range(len(prompts)))
        responses: list[list[int]] = [[] for _ in prompts]
        for turn in range(new):
            drawn = [cpp.llama_sampler_sample(drawer, self.context, place) for drawer, place in zip(self.drawers, places)]
            for response, token in zip(responses, drawn):
                response.append(token)
            if turn < new - 1:
                self.run([(token, len(prompt) + turn, row, True) for token, prompt, row in zip(drawn, prompts, rows)])
        self.held = {row: prompt + response[:-1] for row, prompt, response in zip(rows, prompts, responses)}
        return responses


def shared(one: list[int], other: list[int]) -> int:
    """Tokens with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def main() -> None:
    """Answer every line, until there is none."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    engine = Engine(sys.argv[1], *map(int, sys.argv[2:5]), "remember" in sys.argv[5:])
    serve(channel, cpp.__version__, engine.generate, engine.forget)


if __name__ == "__main__":
    main()
