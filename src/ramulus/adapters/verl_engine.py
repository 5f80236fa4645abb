"""verl's client of its rollout servers as an engine: prefixes in, tokens and their log-probs out."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from ramulus.engine.engine import Request, Segment, Weights, together

NO_TOKENS = "a rollout server of verl answered without a token, or without log-probs: set rollout.calculate_log_probs=True"


class ClientEngine:
    """Samples by `client.generate`, each request under one `sticky` id, so that all of a tree go to the server that has their prefixes.

    Weights are verl's to load. `seeded`: the server takes a seed, as vLLM's does. Callers replay `until` and stop strings.
    """

    def __init__(self, client: Any, sticky: str, limit: int, seeded: bool) -> None:
        self.client, self.sticky, self.limit, self.seeded = client, sticky, limit, seeded
        self.features: frozenset[str] = frozenset()
        self.about = "rollout servers of verl"
        self.sampled = 0

    async def sample(self, requests: Sequence[Request]) -> list[Segment]:
        """One continuation of each request, in order."""
        return await together(self._one(request) for request in requests)

    async def _one(self, request: Request) -> Segment:
        sampling = request.sampling
        if not isinstance(sampling.temperature, int | float):
            raise ValueError(f"verl samples at one temperature, not by {sampling.temperature}: leave the rule out")
        params = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "max_tokens": sampling.max_tokens,
            "stop_token_ids": sorted(request.stop.ids), "logprobs": True,
        }  # fmt: skip
        if self.seeded:
            params["seed"] = request.seed % 2**31
        answer = await self.client.generate(request_id=self.sticky, prompt_ids=list(request.prefix), sampling_params=params)
        tokens, logprobs = list(answer.token_ids)[: sampling.max_tokens], list(answer.log_probs or ())[: sampling.max_tokens]
        if not tokens or len(tokens) != len(logprobs):
            raise RuntimeError(NO_TOKENS)
        version = int(answer.extra_fields.get("global_steps") or 0)
        ended = tokens[-1] in request.stop.ids or len(tokens) < sampling.max_tokens
        self.sampled += len(tokens)
        return Segment(
            array("i", tokens), array("f", logprobs), "eos" if ended else None, version, version, temperature=float(sampling.temperature)
        )

    async def load(self, weights: Weights, version: int) -> None:
        """Nothing: verl loads its servers' weights."""

    async def reset(self) -> None:
        """Nothing: verl's servers forget when weights are loaded."""

    def counters(self) -> Mapping[str, int]:
        """Tokens sampled; the servers keep the rest to themselves."""
        return {"sampled": self.sampled}

    def close(self) -> None:
        """Nothing: the servers are verl's."""
