"""What an attention layer computes besides softmax(scale * q k^T) v: window, soft cap, sinks, ALiBi.

Input: scores [H, L, M] of L queries and M keys, and how far before each query a key is in the text. Output: their
probabilities. The op `ragged_attention` computes the same; this is for the places that compute scores in PyTorch.
Example: with softcap 50 a score of 100 becomes 50 * tanh(2) = 48.2; with a sink of 0 two keys with scores of 0 get the
probability 1/3 each.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What an attention layer computes besides softmax(scale * q k^T) v; see rmcore.ops.ragged_attention."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks_H: Tensor | None = None
    slopes_H: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap == 0 and self.sinks_H is None and self.slopes_H is None

    def adjusted(self, scores_HLM: Tensor, behind_LM: Tensor) -> Tensor:
        """The scores with soft cap and ALiBi; `behind_LM`: how far before each query a key is in the text.

        Both may have a dimension for segments before theirs; then `behind` has one of size 1 for the heads.
        """
        if self.softcap > 0:
            scores_HLM = self.softcap * torch.tanh(scores_HLM / self.softcap)
        if self.slopes_H is not None:
            scores_HLM = scores_HLM - self.slopes_H.to(scores_HLM.dtype)[:, None, None] * behind_LM
        return scores_HLM

    def softmax(self, scores_HLM: Tensor) -> Tensor:
        """The probabilities of the keys [H, L, M], with a sink as one more key."""
        if self.sinks_H is None:
            return scores_HLM.softmax(-1)
        sink_HL1 = self.sinks_H.to(scores_HLM.dtype)[:, None, None].expand(*scores_HLM.shape[:-1], 1)
        return torch.cat([scores_HLM, sink_HL1], -1).softmax(-1)[..., :-1]
