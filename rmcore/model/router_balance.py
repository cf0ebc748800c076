"""Measures how evenly the routers of a mixture of experts spread the tokens of each text over the experts.

Input: a decoder, a packed batch, and what the routers return while the decoder runs. Output: one number per answer; the
loss adds it, times `loss.router_aux`, so that no expert is left without tokens.
Example: 4 experts, 2 per token. A text that uses all experts equally has a balance of 1, and one that sends every token
to the same two experts with probability 1/2 each has 4 / 2 * (1 * 1/2 + 1 * 1/2) = 2.

The balance of a text in one layer is E/K sum_e f_e P_e: f_e is the fraction of its tokens that the layer sends to
expert e, P_e the mean of the router's normalised score of e, E the number of experts, K those per token. Only P has a
gradient. It is the sequence-wise auxiliary loss of DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20), averaged over the
layers with experts. The Switch loss (arXiv 2101.03961, eq. 4), which transformers computes, multiplies means over all
tokens of a batch, so it would depend on the cut of a step into ranks and micro batches. A mean over texts does not.

A text is the prompt and one answer. The tokens of a shared prompt are computed once and count in each of its texts.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmcore.config import UserError


class Routed(NamedTuple):
    """What one router returned: the logits [tokens, E] and the chosen experts [tokens, K]."""

    logits: Tensor
    chosen: Tensor
    scores: Callable[[Tensor], Tensor]


class RouterBalance:
    """Hooks on the routers of `backbone`, inactive except within `recorded`.

    Raises UserError if the model has no routers, or routers whose scores are not understood.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        recorder = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", None)
        routers = [module for module in backbone.modules() if kind is not None and isinstance(module, kind)]
        if not routers:
            raise UserError(
                f"loss.router_aux: {type(backbone).__name__} has no routers of experts whose logits transformers "
                "records; set it to 0"
            )
        scores, self._routers = _scores_of(routers[0], backbone.config.get_text_config().hidden_size), len(routers)
        self._routed: list[Routed] | None = None

        def record(_: nn.Module, __: Any, output: Any) -> None:
            if self._routed is not None:  # not while activations are recomputed
                self._routed.append(Routed(output[0], output[2], scores))

        for router in routers:
            router.register_forward_hook(record)

    @contextmanager
    def recorded(self) -> Iterator[list[Routed]]:
        """Collects what the routers return within, one entry per layer with experts.

        If the backbone runs several times, an entry has the tokens of one forward after the other.
        """
        routed: list[Routed] = []
        self._routed = routed
        try:
            yield routed
        finally:
            self._routed = None
        if len(routed) > self._routers:
            layers = [routed[layer :: self._routers] for layer in range(self._routers)]
            routed[:] = [
                one[0]._replace(logits=torch.cat([r.logits for r in one]), chosen=torch.cat([r.chosen for r in one]))
                for one in layers
            ]


def balance_A(routed: list[Routed], text_AT: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
    """The balance of each text, averaged over the layers: [A], in fp32 (fp64 of fp64 logits).

    text_AT: bool, the rows of the packed batch that belong to each text. order: gives [T, ...] from values of the
    tokens in the order in which the decoder computes them.
    """
    wide = torch.float64 if routed[0].logits.dtype == torch.float64 else torch.float32
    share_AT = text_AT.to(wide) / text_AT.sum(1, keepdim=True)
    total = share_AT.new_zeros(len(share_AT))
    with torch.autocast(text_AT.device.type, enabled=False):
        for logits, chosen, scores in routed:
            s_TE = order(scores(logits.to(wide)))
            with torch.no_grad():
                sent_TE = order(torch.zeros_like(logits, dtype=wide).scatter_(1, chosen, 1.0))
                f_AE = share_AT @ sent_TE
            experts, each = logits.shape[1], chosen.shape[1]
            total = total + experts / each * (f_AE * (share_AT @ s_TE)).sum(1)
    return total / len(routed)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _sigmoid(logits: Tensor) -> Tensor:
    """The affinities of DeepSeek-V3, eq. 15 and 19."""
    s = logits.sigmoid()
    return s / s.sum(-1, keepdim=True)


def _scores_of(router: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
    """How the router makes scores of its logits: the weights that it gives to experts are in the ratio of the scores.

    It is found on a copy with random weights. Raises UserError for a router with another rule, or with other outputs.
    """
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        for buffer in probe.buffers():
            buffer.zero_()
        hidden = torch.randn(64, width, generator=generator) * 4.0 / width**0.5
        try:
            # Some routers are given a bias for each expert, which is 0 here.
            bias = torch.zeros(next(probe.parameters()).shape[0])
            biases = len(inspect.signature(type(probe).forward).parameters) - 2  # without the module and hidden states
            logits, weights, chosen = probe(hidden, *[bias] * biases)
            given = (weights / weights.sum(-1, keepdim=True)).float()
            for scores in (_softmax, _sigmoid):
                picked = scores(logits.float()).gather(1, chosen)
                if chosen.shape[1] > 1 and torch.allclose(picked / picked.sum(-1, keepdim=True), given, atol=1e-4):
                    return scores
            reason = "its weights are not those of a softmax or of sigmoids"
        except Exception as error:  # a router with other arguments or outputs
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    raise UserError(
        f"loss.router_aux: rmcore does not know how {type(router).__name__} scores experts ({reason}); set it to 0"
    )
