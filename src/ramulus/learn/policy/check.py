"""The self-check of a policy: hidden states on packed trees against the model's plain forward of their paths, near and far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ramulus.learn.attention.tree_attention import Way, attending, plan
from ramulus.learn.policy.fused_layers import Patch, fused
from ramulus.learn.policy.head import Head, head_of
from ramulus.models.positions import context
from ramulus.models.precision import is_half, widened
from ramulus.models.survey import FAR, Survey, message_of, plain_way, survey

PREFIX, BRANCH = 4, 3  # tokens of the check's trees: a prompt with two branches
NEAR = 3  # times the error of torch's autocast that layers in bfloat16 may have
CLOSE, QUANTISED = 1e-3, 0.1  # of logits, relative to the largest; of quantised models


def verify_policy(model: Any, chunk: int, patches: Sequence[Patch], way: Way) -> tuple[Survey, Head]:
    """Hold the logits of two packed trees against those of their four paths; the second tree stands at the last positions that there are.

    Half-precision models compute in float32 here. Returns what the layers ask of attention and the head, which scales logits unless the model scales
    what it gives to its output layer; raises ValueError where the model takes no tree or the logits differ.
    """
    name = type(model).__name__
    head = head_of(model, chunk)
    try:
        model_survey = survey(model)
        off = logit_difference(model, head, patches, "dense" if way == "flex" else way, model_survey)
        if head.scale != 1 and not off <= CLOSE:
            head = replace(head, scale=1.0)
            off = logit_difference(model, head, patches, "dense" if way == "flex" else way, model_survey)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name} cannot learn from packed trees: {message_of(error)}") from error
    kinds = {parameter.dtype for parameter in model.parameters()}
    exact = is_half(model) or all(kind.is_floating_point and kind.itemsize > 2 for kind in kinds)
    if not off <= (CLOSE if exact else QUANTISED):
        raise ValueError(
            f"{name} cannot learn from packed trees: its logits there differ from those of separate sequences by {off:.2g}, so its tokens depend on "
            "more than the keys and values of those before them, or it changes logits in a way that is not known"
        )
    return model_survey, head


@torch.no_grad()
def logit_difference(model: Any, head: Head, patches: Sequence[Patch], way: Way, model_survey: Survey) -> float:
    """The largest difference of logits, relative to the largest logit."""
    token, position, parent, end, lines = checked_trees(model, model_survey)

    def packed(dtype: torch.dtype) -> Tensor:
        tree = plan(parent, end, dtype, way, model_survey.sights)
        with attending(model), fused(patches), head.stopped() as states:
            model(input_ids=token[None], position_ids=position[None], attention_mask=None, use_cache=False, tree=tree)
        return head.logits(states[0][0])

    dtype = next(model.parameters()).dtype
    if is_half(model):
        packed(dtype)  # in its own precision it must at least run
    with widened(model):
        ours = packed(torch.float32 if is_half(model) else dtype)[lines]
        with attending(model, plain_way(model, model_survey)):
            near = model(input_ids=token[lines[:2]], use_cache=False).logits  # which positions it takes by itself
            far = model(input_ids=token[lines[2:]], position_ids=position[lines[2:]], use_cache=False).logits
    alone = torch.cat((near, far))[..., : head.drawn]
    return float(((ours - alone).abs().max() / alone.abs().max().clamp(min=1)).nan_to_num(torch.inf))


@torch.no_grad()
def answers_as_autocast(model: Any, head: Head, patches: Sequence[Patch], model_survey: Survey) -> bool:
    """Whether layers in bfloat16 of our own are about as near to float32 as those of torch's autocast, on the trees of the check."""
    token, position, parent, end, _ = checked_trees(model, model_survey)

    def packed(dtype: torch.dtype, chosen: Sequence[Patch]) -> Tensor:
        tree = plan(parent, end, dtype, "auto", model_survey.sights)
        casting = torch.autocast(token.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with casting, attending(model), fused(chosen), head.stopped() as given:
            model(input_ids=token[None], position_ids=position[None], attention_mask=None, use_cache=False, tree=tree)
            return head.logits(given[0][0])

    with widened(model):
        exact = packed(torch.float32, [])
    ours, theirs = (float((packed(torch.bfloat16, chosen) - exact).norm() / exact.norm()) for chosen in (patches, []))
    return ours <= NEAR * theirs + CLOSE


def checked_trees(model: Any, model_survey: Survey) -> tuple[Tensor, ...]:
    """`trees` for a model, as long as its windows ask and up to its last positions, on its device."""
    most = context(model.config)
    prefix = min(max(1, most - BRANCH), model_survey.past_windows(PREFIX))
    case = trees(prefix, max(0, min(most, FAR) - prefix - BRANCH), int(model.get_input_embeddings().num_embeddings))
    return tuple(x.to(model.get_input_embeddings().weight.device) for x in case)


def trees(prefix: int, start: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Two trees of a prompt of `prefix` tokens with two branches each, the second from position `start` on.

    token, position, parent, end [T] of the row, and the places of the tokens of each path [4, prefix + BRANCH].
    """
    depth, size = prefix + BRANCH, prefix + 2 * BRANCH
    index = torch.arange(size)
    position = torch.where(index < depth, index, index - BRANCH)
    parent = (index - 1).clamp(min=0)
    parent[depth] = prefix - 1
    end = torch.where((index >= prefix) & (index < depth), depth, size)
    lines = torch.stack((index[:depth], torch.cat((index[:prefix], index[depth:]))))
    both = [torch.cat((x, x + more)) for x, more in ((position, start), (parent, size), (end, size), (lines, size))]
    return ((torch.arange(2 * size) * 7 + 1) % vocabulary, *both)
