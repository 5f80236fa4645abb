"""What travels between a run and a vLLM server: requests as `/inference/v1/generate` takes them, and its answers read with a close eye."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from ramulus.engine.engine import Request, Segment
from ramulus.engine.remote.wire import rule_to_json
from ramulus.engine.stops import check_request

TEMPERATURE = "ramulus_temperature"  # where a request names its temperature rule, for the plug-in
KNOWN_RULES = ("ByEntropy",)  # the temperature rules that the plug-in builds
SHARP = 0.01  # vLLM takes temperatures between 0 and this one for this one
NONE = -9000.0  # vLLM writes -9999 for a log-prob that is no number or minus infinity


class Malformed(Exception):
    """An answer that cannot be what was asked for, in words that go on after "the vLLM server at X answered"."""


def refuse(request: Request, limit: int, vocabulary: int, rules: bool) -> None:
    """Raise ValueError for a request that no server could ever serve as it is meant."""
    check_request(request, limit, vocabulary)
    sampling = request.sampling
    if request.until is not None or request.stop.strings:
        raise ValueError("until and stop strings cannot be asked inside a vLLM server: ask them of what comes back")
    if callable(sampling.temperature):
        name = type(sampling.temperature).__name__
        if name not in KNOWN_RULES or not rules:
            known = ", ".join(KNOWN_RULES)
            raise ValueError(f"vLLM servers know the temperature rule {known}, and not {name}: sample with engine=Local() for others")
        rule_to_json(sampling.temperature)
    elif 0 < sampling.temperature < SHARP:
        raise ValueError(f"vLLM samples at temperature 0 (greedy) or at {SHARP} and above, not at {sampling.temperature}")


def call_of(request: Request, prefix: int, salt: str) -> dict[str, Any]:
    """A request whose prefix has a place in a list, as `/inference/v1/generate` takes it; keys and values are shared under the same salt alone."""
    sampling, rule = request.sampling, {}
    temperature = sampling.temperature
    if callable(temperature):
        rule, temperature = {"extra_args": {TEMPERATURE: rule_to_json(temperature)}}, 1.0
    plain = {
        "max_tokens": sampling.max_tokens, "temperature": float(temperature),
        "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "seed": request.seed % 2**63, "logprobs": 0, "ignore_eos": True, "stop_token_ids": sorted(request.stop.ids), "detokenize": False,
    }  # fmt: skip
    return {"prefix": prefix, "cache_salt": salt, "sampling_params": plain | rule}


def calls_of(requests: Sequence[Request], salt: str) -> dict[str, Any]:
    """Many requests; a prefix that several share is said once."""
    places: dict[tuple[int, ...], int] = {}
    calls = [call_of(request, places.setdefault(tuple(request.prefix), len(places)), salt) for request in requests]
    return {"prefixes": list(places), "requests": calls}


def segment_of(answer: Any, request: Request, vocabulary: int) -> tuple[Segment, int]:
    """What was sampled, and how many tokens of the prefix were reused; Malformed where something of it cannot be."""
    try:
        [choice] = answer["choices"]
        tokens = [int(token) for token in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        pairs = [(token_of_entry(entry), entry["logprob"]) for entry in content]
        spans = [(int(span["version"]), int(span["start"]), int(span["end"])) for span in choice.get("weight_versions") or ()]
        usage = answer.get("usage") or {}
        reused = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        finish = choice["finish_reason"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Malformed(f"something that is no answer to a request ({type(error).__name__}: {error})") from None
    check_tokens(tokens, [token for token, _ in pairs], finish, request, vocabulary)
    logprobs = [number(value) for _, value in pairs]
    greedy = request.sampling.temperature == 0
    column = array("f", [0.0] * len(tokens) if greedy else logprobs)
    end = "eos" if tokens[-1] in request.stop.ids else None
    temperature = request.sampling.temperature
    segment = Segment(array("i", tokens), column, end, temperature=None if callable(temperature) else float(temperature))
    return versioned(segment, spans), reused


def token_of_entry(entry: Mapping[str, Any]) -> int:
    """The token that a log-prob is of; vLLM 0.31 says it as "token_id:7"."""
    return int(entry["token_id"]) if "token_id" in entry else int(str(entry["token"]).removeprefix("token_id:"))


def number(value: Any) -> float:
    """A log-prob; Malformed where it is none."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= NONE or value > 1e-3:
        raise Malformed(f"log-probs that are no numbers ({value})")
    return float(value)


def check_tokens(tokens: Sequence[int], named: Sequence[int], finish: Any, request: Request, vocabulary: int) -> None:
    """Raise Malformed for tokens that are not what the request asked for, or have not a log-prob each."""
    most, ids = request.sampling.max_tokens, request.stop.ids
    if finish == "abort":
        raise Malformed("a text that was broken off")
    if len(named) != len(tokens):
        raise Malformed(f"{len(tokens)} tokens with {len(named)} log-probs")
    if list(named) != list(tokens):
        raise Malformed("log-probs of other tokens")
    if not 1 <= len(tokens) <= most:
        raise Malformed(f"{len(tokens)} tokens where 1 to {most} were asked for")
    if any(token in ids for token in tokens[:-1]) or (len(tokens) < most and tokens[-1] not in ids):
        raise Malformed(f"{len(tokens)} tokens that end elsewhere than at {most} or at the first stop token")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise Malformed(f"a token outside the vocabulary of {vocabulary}")


def versioned(segment: Segment, spans: Sequence[tuple[int, int, int]]) -> Segment:
    """The segment with the versions of its spans, which must cover it; without spans as it is."""
    if not spans:
        return segment
    edges = [0, *(end for _, _, end in spans)]
    if [start for _, start, _ in spans] != edges[:-1] or edges[-1] != len(segment.tokens) or edges != sorted(set(edges)):
        raise Malformed(f"versions of other tokens than its {len(segment.tokens)}")
    segment.version, segment.newest = spans[0][0], spans[-1][0]
    if len(spans) > 1:
        segment.versions = array("i", [version for version, start, end in spans for _ in range(start, end)])
    return segment


def said_of(answer: Mapping[str, Any] | Any) -> str:
    """What vLLM says of an error."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    text = error.get("message") if isinstance(error, Mapping) else error
    return " ".join(str(text or answer).split())[:300]
