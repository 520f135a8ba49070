"""Ledger: tokens, FLOPs and seconds by category, added up over a run.

Categories: prefill, verify, decode (engine), grade (grader processes, beside the engine), score
(forwards of reference, critic and proximal policy before a batch is trained on), train (forward,
backward, optimizer; policy and critic), sync (engine and trainer trading places: weights,
checkpoints).

FLOPs are counted, not measured (`model/flops.py`): a trained token costs three forwards, two where
the weights are frozen but for adapters, one more with gradient checkpointing. A critic's trunk
counts like the policy. What rollouts share, where it is run once, counts once.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from reroll.engine.base import Stats
from reroll.model.flops import CostModel
from reroll.train.forwards import Work

CATEGORIES = ("prefill", "verify", "decode", "grade", "score", "train", "sync")


@dataclass(slots=True)
class Ledger:
    """Sums by category."""

    tokens: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    collected: float = 0.0
    """FLOPs that traces had cost before the first step"""
    paper: float = 0.0
    """FLOPs as papers count them: 2 a parameter and token sampled, 6 more where it is trained on,
    prompt and prefix included, nothing for attention, nothing off for what is cached"""

    def add_engine(self, before: Stats, after: Stats, cost: CostModel) -> None:
        """Book what the engine did between two copies of its counters.

        Verification shares forwards with prefill; its seconds are its share of their tokens. What
        is offered again in ticks has its tokens and FLOPs under verify, its seconds under decode.
        """
        tokens = {
            "prefill": after.tokens_prefilled - before.tokens_prefilled,
            "verify": after.tokens_verified - before.tokens_verified,
            "decode": after.tokens_decoded - before.tokens_decoded,
        }
        for name, count in tokens.items():
            self.tokens[name] += count
            self.flops[name] += cost.flops(count, after.context[name] - before.context[name])
        forwards = after.seconds["prefill"] - before.seconds["prefill"]
        walked = tokens["verify"] - (after.tokens_redrafted - before.tokens_redrafted)
        share = walked / max(1, walked + tokens["prefill"])
        self.seconds["prefill"] += forwards * (1 - share)
        self.seconds["verify"] += forwards * share
        self.seconds["decode"] += after.seconds["decode"] - before.seconds["decode"]

    def add_forwards(
        self, category: str, work: Sequence[Work], seconds: float, cost: CostModel
    ) -> None:
        """Book what the trainer ran: scoring ("score") or training ("train")."""
        for passes, layout in work:
            self.tokens[category] += layout.nodes
            self.flops[category] += passes * cost.flops(layout.nodes, layout.context)
        self.seconds[category] += seconds

    def add_collection(self, spent: dict[str, float]) -> None:
        """Book what traces have cost (`rollout/traces.py`)."""
        self.collected += spent.get("flops", 0.0)
        self.paper += spent.get("flops_paper", 0.0)

    def add_paper(self, sampled: float, trained: float, cost: CostModel) -> None:
        """Book tokens sampled and trained on, prompts and prefixes included, as papers do."""
        self.paper += cost.per_token * (sampled + 3 * trained)

    def totals(self) -> dict[str, float]:
        """FLOPs since the first token, those of collecting included, in both views."""
        total = self.collected + sum(self.flops.values())
        return {"flops_total": total, "flops_total_paper": self.paper}

    def since(self, earlier: "Ledger") -> "Ledger":
        """What was booked after `earlier`, a copy of this ledger."""
        parts = (("tokens", self.tokens), ("flops", self.flops), ("seconds", self.seconds))
        found = Ledger()
        for name, now in parts:
            before = getattr(earlier, name)
            setattr(found, name, {c: now[c] - before[c] for c in CATEGORIES})
        return found

    def copy(self) -> "Ledger":
        """An independent copy."""
        return deepcopy(self)

    def metrics(self) -> dict[str, float]:
        """Flat `tokens_*`, `flops_*`, `seconds_*` with a value for each category."""
        kinds = ("tokens", "flops", "seconds")
        return {f"{kind}_{c}": v for kind in kinds for c, v in getattr(self, kind).items()}
