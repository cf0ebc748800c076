"""Makes all ranks train by one plan: they agree on the token budget and the recompute, and compare everything else.

Input: the budget and the recompute that suit this rank's own memory; the facts that its plan is made of.
Output: the least budget and the most frugal recompute of all ranks; or one UserError on all ranks.
Example: a rank with 60 GB of memory finds (13,299 tokens, none), a rank with 80 GB (17,000 tokens, none). Both use
13,299. With 13,299 on one and 17,000 on the other, the plans would differ in nearly every step: some pairs would be
trained twice and some never.
"""

import hashlib
import json
from typing import Any

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.cost.dry_run import RECOMPUTES
from rmcore.cost.memory import Budget
from rmcore.data.prepare import PreparedData
from rmcore.parallel.world import World, all_gather_json

# Settings that decide what a step computes and which collectives a rank joins. The others may differ between hosts.
DECISIVE = ("data.shuffle", "batch", "optim", "loss", "parallel", "run", "log.every")
OF_A_HOST = ("run.dir", "run.resume")  # paths


def agree(world: World, own: Budget) -> Budget:
    """The least token budget and the most frugal recompute over all ranks; a collective.

    It fits on every rank whose own choice fits: fewer tokens and more recompute never need more memory.
    """
    found = all_gather_json(world, [own.tokens, RECOMPUTES.index(own.recompute)])
    return Budget(min(tokens for tokens, _ in found), RECOMPUTES[max(recompute for _, recompute in found)])


def plan_facts(config: Config, data: PreparedData, budget: Budget, path: str) -> dict[str, Any]:
    """Everything that decides the plan and the collectives of a run, by name. `path`: the self-test's choice."""
    facts: dict[str, Any] = {
        "the fingerprint of data.train": data.train.fingerprint,
        "the fingerprints of data.eval": [part.fingerprint for part in data.evals.values()],
        "the token budget": budget.tokens,
        "the recompute": budget.recompute,
        "the attention that the self-test chose (set model.attention)": path,
    }
    for section, values in config.model_dump(mode="json").items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if (section in DECISIVE or key in DECISIVE) and key not in OF_A_HOST:
                facts[key] = value
    return facts


def check_same_plan(world: World, facts: dict[str, Any]) -> None:
    """Compare a fingerprint of the facts over all ranks; a collective. Raises UserError on all ranks if it differs."""
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(all_gather_json(world, fingerprint))) == 1:
        return
    everyones = all_gather_json(world, facts)
    lines = []
    for name, first in everyones[0].items():
        rank = next((rank for rank, other in enumerate(everyones) if other[name] != first), None)
        if rank is not None:
            lines.append(f"  {name}: {json.dumps(first)} on rank 0, {json.dumps(everyones[rank][name])} on rank {rank}")
    raise UserError(
        "the ranks do not have the same plan, so some pairs would be trained twice and some never:\n"
        + "\n".join(lines)
        + "\nstart all ranks with the same command, the same data and the same packages"
    )
