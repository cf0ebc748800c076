"""Computes the summed loss and the rewards of a packed batch: backbone, score head and objective in one forward.

Input: a `RaggedBatch`. Output: `Output(loss_sum, rewards_A, counted, outputs_AK)`: the fp32 sum of the weighted losses,
the fp32 reward of every answer, this batch's part of the weight that the training loop divides the sum by, and the fp32
outputs of the score head that the rewards are made of. With loss.sft also `language_sum`, the summed language-modelling
loss (rmcore.model.language_head); with loss.router_aux `balance_sum`, the part of `loss_sum` by which the experts'
balance (rmcore.model.router_balance) enters it, before its factor and without a gradient.
Example: two pairs with reward margins 0 and 2 -> loss_sum = 0.6931 + 0.1269 = 0.8200, 4 rewards, counted = 2.0.

The score head is applied inside forward because the module that owns a weight must apply it: outside, FSDP2 would give
it only a shard. Four paths compute the same numbers: `SHARED`, `PACKED`, `PADDED` and `ALONE`. The self-test chooses
one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmcore.data.batches.batch import RaggedBatch, sent
from rmcore.model.attention import NAME
from rmcore.model.cpu_layers import use_cpu_ops
from rmcore.model.fp32_parts import compute_in_fp32
from rmcore.model.fused_layers import fuse_layers
from rmcore.model.grid import Grid
from rmcore.model.language_head import language_loss
from rmcore.model.layout_context import packed_layout
from rmcore.model.long_rope import LongRope, long_texts
from rmcore.model.masks import prepare
from rmcore.model.objectives import Joint, Objective
from rmcore.model.outputs import Outputs, head_outputs
from rmcore.model.own_attention import pack_own_attention
from rmcore.model.pruning import Pruning, ScoredRows, only_rows
from rmcore.model.recurrent.substitute import substitute_scans
from rmcore.model.router_balance import Routed, RouterBalance, balance_A
from rmcore.model.row_split import ContextGroup, RowPart
from rmcore.ops.pairwise import pairwise_loss

SHARED, PACKED, PADDED, ALONE = PATHS = "shared", "packed", "padded", "alone"  # fastest first


class Output(NamedTuple):
    """What a forward returns; see the docstring of this file. `outputs_AK`: every output of the score head.

    With several objectives, `loss_sum` and `counted` have one entry for each. `logits_AV`: see `forward`.
    `balance_sum`: with loss.router_aux, the summed balance of the experts; `balance_counted`: the weight of that sum.
    Where `loss_sum` holds it (a single objective that counts pairs, lists or answers), it has no gradient; otherwise it
    is a sum over all texts, which the loop adds.
    """

    loss_sum: Tensor
    rewards_A: Tensor
    counted: Tensor
    outputs_AK: Tensor
    language_sum: Tensor | None = None
    logits_AV: Tensor | None = None
    balance_sum: Tensor | None = None
    balance_counted: Tensor | None = None

    def share(self, world_size: int, step_counts: Sequence[float]) -> Tensor:
        """This micro batch's part of the step's loss: each objective's sum, divided by what the whole step counts.

        The strategies average gradients over the ranks, so the sum is multiplied by their number. An objective that the
        step counts nothing for adds 0.
        """
        sums = self.loss_sum.unbind() if self.loss_sum.ndim else (self.loss_sum,)
        parts = [one * (world_size / n if n else 0.0) for one, n in zip(sums, step_counts, strict=True)]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


BRADLEY_TERRY, ONE_OUTPUT = Objective(), Outputs()


class RewardModel(nn.Module):
    """A decoder without its language-model head, a Linear(D, K) score head, and the loss.

    Args:
        backbone: a Hugging Face base model; its parameters keep their names, so a checkpoint maps one to one.
        score: Linear(D, K, bias=False).
        pad_token_id: the token that the path `PADDED` fills with.
        outputs: the K outputs of the score head, and the reward that is made of them.
        path: see `use`.
        sft: compute the language-modelling loss of batches that hold the tokens of chosen answers.
        lm_head: its head; None if the token embedding is the head.

    Attributes:
        context: the ranks that compute each packed row together; None: this rank computes whole rows. All of them get
            the same batches, whose rows are a multiple of their number (`build_batch`), and return the same output.
        skips_weights: some trained weights may get no gradient from a batch (rmcore.model.selftest).
        most: set where every forward of the backbone is a collective. Returns the largest of the numbers that the ranks
            call it with.
    """

    context: ContextGroup | None = None
    skips_weights = False
    most: Callable[[int], int] | None = None

    def __init__(
        self,
        backbone: PreTrainedModel,
        score: nn.Linear,
        *,
        pad_token_id: int,
        objective: Objective | Joint = BRADLEY_TERRY,
        outputs: Outputs = ONE_OUTPUT,
        path: str = PADDED,
        sft: bool = False,
        lm_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.score, self.outputs = backbone, score, outputs
        self.pad_token_id, self.objective = pad_token_id, objective
        self.sft, self.lm_head = sft, lm_head
        substitute_scans(backbone)
        fuse_layers(backbone)
        # GPT-2 calls it in each forward, and it reads tokens on the host, which waits for the GPU.
        backbone.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[method-assign]
        pack_own_attention(backbone)
        use_cpu_ops(backbone)
        compute_in_fp32(backbone)
        self.long_rope = LongRope(backbone)
        self._own_attention = backbone.config._attn_implementation
        self._balance: RouterBalance | None = None
        self._pruning: Pruning | None = None
        if objective.router_aux:
            self.add_balance(objective, RouterBalance(backbone))
        else:
            with suppress(ValueError):  # the last layer has other parts: it runs on all tokens
                self._pruning = Pruning(backbone)
        self.use(path)

    def add_balance(self, objective: Objective | Joint, balance: RouterBalance) -> None:
        """Add the balance of the experts to the loss. That of the last layer is one over all tokens of a text."""
        self.objective, self._balance, self._pruning = objective, balance, None

    @property
    def can_prune(self) -> bool:
        """Whether the last layer may be pruned, and has the parts for it; the self-test checks exactness."""
        return self._pruning is not None and not self.sft  # the language-modelling loss reads other rows, too

    @property
    def multiple(self) -> int:
        """What the tokens of a packed row must be a multiple of."""
        return 1 if self.context is None else self.context.size

    def use(self, path: str, *, pruned: bool = False, masked: bool = False) -> None:
        """Compute batches by `path`. `SHARED` batches hold each prompt once, the others hold separate texts.

        pruned: run the last layer on the scored tokens only (ignored by transformers' own forwards, the last two).
        masked: share prompts through the model's own attention and masks (ignored by the other paths).
        """
        own = path in (PADDED, ALONE)
        self.path, self.pruned = path, pruned and self.can_prune and not own
        self.masked = masked and path == SHARED
        self.backbone.set_attn_implementation(self._own_attention if own or self.masked else NAME)
        if self.masked:
            prepare(self.backbone)

    def ways(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        """The arguments of `use` to try, fastest first. A row that is split over ranks has no rectangle."""
        ways = [
            {"path": path, "pruned": pruned, "masked": masked}
            for path in paths
            for masked in ([False, True] if path == SHARED else [False])
            for pruned in (True, False)
        ]
        splits = (SHARED, PACKED)
        return [way for way in ways if self.context is None or (way["path"] in splits and not way["masked"])]

    def forward(self, batch: RaggedBatch, *, logits: bool = False) -> Output:
        """`logits`: return those of the token behind each answer, in fp32, by the language-model head."""
        if self.context is not None:
            return self._split(batch, self.context)
        batch, long_T = self.long_rope.separated(batch)
        by_path = {
            SHARED: self.masked_hidden if self.masked else self.packed_hidden,
            PADDED: self.padded_hidden,
            ALONE: self.alone_hidden,
        }
        recorded: AbstractContextManager[list[Routed]] = nullcontext([])
        if self._balance and torch.is_grad_enabled():
            recorded = self._balance.recorded()
        with recorded as routed:
            hidden_TD = by_path.get(self.path, self.packed_hidden)(batch, long_T)
        scored_A = batch.last_token_index_A
        if self._returns_scored_rows:  # hidden_TD has only these rows, in this order
            scored_A = torch.arange(scored_A.numel(), device=scored_A.device)
        if self.outputs.single:
            loss_sum, rewards_A, outputs_AK = self._one_output(hidden_TD, scored_A, batch)
        else:
            outputs_AK = head_outputs(hidden_TD, self.score.weight, scored_A)
            rewards_A = self.outputs.reward(outputs_AK)
            loss_sum = self.objective.loss_sum(rewards_A, batch, outputs_AK)
        balance_sum = balance_counted = None
        if routed:
            loss_sum, balance_sum, balance_counted = self._balanced(loss_sum, routed, batch)
        counted, language_sum = self.objective.counted(batch), self._language_sum(hidden_TD, batch)
        logits_AV = (hidden_TD[scored_A] @ self._language_weight.T).float() if logits else None
        return Output(loss_sum, rewards_A, counted, outputs_AK, language_sum, logits_AV, balance_sum, balance_counted)

    def _one_output(self, hidden_TD: Tensor, scored_A: Tensor, batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss, rewards [A], outputs [A, 1]) of a head whose only output is the reward."""
        objective = self.objective if isinstance(self.objective, Objective) else BRADLEY_TERRY
        fused = slice(None if self.objective.fused else 0)  # without pairs, the op only gathers the rewards
        loss_sum, rewards_A = pairwise_loss(
            hidden_TD,
            self.score.weight[0],
            scored_A,
            batch.winner_P[fused],
            batch.loser_P[fused],
            batch.margin_P[fused],
            batch.weight_P[fused],
            label_smoothing=objective.label_smoothing,
            centering=objective.centering,
        )
        if not self.objective.fused:
            loss_sum = self.objective.loss_sum(rewards_A, batch, rewards_A.unsqueeze(1))
        # Detached, because FSDP2 warns of a view that has a gradient.
        return loss_sum, rewards_A, rewards_A.detach().unsqueeze(1)

    def _balanced(self, loss_sum: Tensor, routed: list[Routed], batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """`loss_sum`, `balance_sum` and `balance_counted` of the output."""
        text_AT, _ = ScoredRows(batch.last_token_index_A).visible(batch.computed_tokens, batch.layout, window=0)
        unevenness_A = balance_A(routed, text_AT, partial(self._in_packed_order, batch=batch))
        objective = self.objective
        if not (isinstance(objective, Objective) and objective.shares_balance):
            return loss_sum, unevenness_A.sum(), torch.ones_like(unevenness_A).sum()
        balance_sum = (objective.counted_A(batch) * unevenness_A).sum()
        return loss_sum + objective.router_aux * balance_sum, balance_sum.detach(), objective.counted(batch)

    def _language_sum(self, hidden_TD: Tensor, batch: RaggedBatch) -> Tensor | None:
        if not self.sft or batch.language_row_M is None or batch.language_token_M is None:
            return None
        return language_loss(hidden_TD[batch.language_row_M], self._language_weight, batch.language_token_M)

    @property
    def _language_weight(self) -> Tensor:
        """[V, D]: the language-model head."""
        return (self.lm_head or cast(nn.Embedding, self.backbone.get_input_embeddings())).weight

    def packed_hidden(self, batch: RaggedBatch, long_T: Tensor | None = None) -> Tensor:
        """Final hidden states [T, D] of the packed row; [A, D] of the scored tokens if the model is pruned."""
        filled = batch.filled(self._filling(batch)) if long_T is None else batch
        with packed_layout(filled.layout), self._only(batch.last_token_index_A), long_texts(long_T):
            hidden_TD = self._hidden(filled.input_ids_T, filled.position_ids_T)
        return hidden_TD if filled is batch or self._returns_scored_rows else hidden_TD[: batch.computed_tokens]

    def _filling(self, batch: RaggedBatch) -> int:
        """Rows by which a packed row is filled up.

        On a CPU, oneDNN compiles each bf16 product for its number of rows, which takes about as long as the product of
        a small model, and keeps 1,024 of them. Nearly every packed row has another number of tokens. So it is filled up
        to a multiple of at most 64, and of at most a sixteenth of it.
        """
        half = torch.is_autocast_enabled("cpu") or self.score.weight.dtype == torch.bfloat16
        if not (half and batch.input_ids_T.is_cpu):
            return 0
        multiple = 2 ** min(6, max(1, batch.computed_tokens // 16).bit_length() - 1)
        return -batch.computed_tokens % multiple

    def _hidden(self, input_ids_T: Tensor, position_ids_T: Tensor) -> Tensor:
        found = self.backbone(input_ids=input_ids_T[None], position_ids=position_ids_T[None], use_cache=False)
        return found.last_hidden_state.squeeze(0)

    def _split(self, batch: RaggedBatch, ranks: ContextGroup) -> Output:
        """The forward of this rank's part of the row; a collective of the group. The output is that of the whole row.

        Each rank applies the score head to its own tokens. The rewards of all ranks make the loss, on every rank.
        """
        part = RowPart.of(batch, ranks)
        with packed_layout(batch.layout, part), self._only(part.scored_a):
            hidden_tD = self._hidden(batch.input_ids_T[part.rows], batch.position_ids_T[part.rows])
        own_a = part.scored_a
        if self._returns_scored_rows:  # hidden_tD has only these rows, in this order
            own_a = torch.arange(own_a.numel(), device=own_a.device)
        no_pair, no_number = own_a[:0], batch.margin_P[:0]
        rewards_a = pairwise_loss(hidden_tD, self.score.weight[0], own_a, no_pair, no_pair, no_number, no_number)[1]
        rewards_A = part.rewards(rewards_a)
        loss_sum = self.objective.loss_sum(rewards_A, batch)
        return Output(loss_sum, rewards_A, self.objective.counted(batch), rewards_A.detach().unsqueeze(1))

    def masked_hidden(self, batch: RaggedBatch, long_T: Tensor | None = None) -> Tensor:
        """The same through the model's own attention, on a rectangle of whole comparisons, with masks."""
        grid = Grid.of(batch)
        scored = self._only(grid.cell_T[batch.last_token_index_A])
        with packed_layout(grid), scored, long_texts(long_T, grid.token_RL):
            hidden = self.backbone(
                input_ids=batch.input_ids_T[grid.token_RL.clamp(min=0)],
                attention_mask=torch.ones_like(grid.token_RL),
                position_ids=grid.position_RL,
                use_cache=False,
            ).last_hidden_state
        return hidden.squeeze(0) if self._returns_scored_rows else self.packed_order(hidden, batch)

    @property
    def _returns_scored_rows(self) -> bool:
        """Whether the backbone returns [1, A, D]."""
        return self.pruned and self._pruning is not None and not self._pruning.spreads

    def _only(self, rows_A: Tensor) -> AbstractContextManager[None]:
        """In a rank without work one row goes through a pruned last layer, so that its experts have zero gradients."""
        return only_rows(rows_A if rows_A.numel() else rows_A.new_zeros(1)) if self.pruned else nullcontext()

    def _in_packed_order(self, values: Tensor, batch: RaggedBatch) -> Tensor:
        """[T, ...] from the values of a layer that flattens its tokens, such as a router, on any path."""
        if self.path != PADDED:
            return values[Grid.of(batch).cell_T] if self.masked else values[: batch.computed_tokens]
        return values[_rectangle(batch)[1]]

    def packed_order(self, values: Tensor, batch: RaggedBatch) -> Tensor:
        """[T, ...] from values of the tokens as the backbone gets them: [1, T, ...], or the grid [R, L, ...].

        Where the row is split over ranks, a collective.
        """
        if self.context is not None:
            return RowPart.of(batch, self.context).whole(values.squeeze(0))
        return values.flatten(0, 1)[Grid.of(batch).cell_T] if self.masked else values[0, : batch.computed_tokens]

    def reward_alone(self, text_T: Tensor) -> Tensor:
        """fp64 reward of one text as transformers runs it, without packing and padding; the self-test's reference."""
        hidden_D = self._hidden_alone(text_T)[-1].double().cpu()
        if self.outputs.single:
            return hidden_D @ self.score.weight[0].double().cpu()
        return self.outputs.reward((self.score.weight.double().cpu() @ hidden_D).unsqueeze(0))[0]

    def padded_hidden(self, batch: RaggedBatch, long_T: Tensor | None = None) -> Tensor:
        """The same [T, D] through the model's own attention, with each text as a row of a right-padded rectangle.

        This path is the slowest and the most general: the architecture gets the attention mask that it expects.
        """
        grid, cell_T = _rectangle(batch)
        real = grid >= 0
        input_ids = torch.where(real, batch.input_ids_T[grid.clamp(min=0)], self.pad_token_id)
        with long_texts(long_T, grid):
            hidden = self.backbone(input_ids=input_ids, attention_mask=real.long(), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, cell_T)

    def alone_hidden(self, batch: RaggedBatch, _: Tensor | None = None) -> Tensor:
        """The same, each text by itself: for models in which padding, or a neighbor, changes the values of a text.

        Where the backbone's forward is a collective, a rank with fewer texts than others also computes single tokens.
        Their rows follow the T rows, and nothing reads them.
        """
        texts = [batch.input_ids_T[start:end] for start, end, *_ in batch.layout.segments_S4.tolist()]
        more = self.most(len(texts)) - len(texts) if self.most else 0
        return torch.cat([self._hidden_alone(text_T) for text_T in (*texts, *[texts[0][:1]] * more)])

    def _hidden_alone(self, text_T: Tensor) -> Tensor:
        """Final hidden states [tokens, D] of one text."""
        mask = torch.ones_like(text_T)[None]
        return self.backbone(input_ids=text_T[None], attention_mask=mask, use_cache=False).last_hidden_state[0]


def _no_warning(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """In place of transformers' warning of padded rows without a mask: rmcore's rows without one have no padding."""


def computes_alone(model: nn.Module) -> bool:
    """Whether padding would change the rewards of the reward model in `model`, which a strategy may have wrapped."""
    return any(isinstance(module, RewardModel) and module.path == ALONE for module in model.modules())


def _rectangle(batch: RaggedBatch) -> tuple[Tensor, Tensor]:
    """int64 [texts, longest]: the packed rows of each text, -1 behind its end; and the flat cells [T] with a token.

    The cells are found on the host: a mask as an index would make it wait for the device.
    """
    texts = batch.layout.texts
    longest = max(len(rows) for rows in texts)
    grid = torch.full((len(texts), longest), -1, dtype=torch.int64)
    for place, rows in enumerate(texts):
        grid[place, : len(rows)] = torch.tensor(rows)
    cell_T = torch.cat([torch.arange(len(rows)) + place * longest for place, rows in enumerate(texts)])
    return sent(grid, batch.input_ids_T.device), sent(cell_T, batch.input_ids_T.device)
