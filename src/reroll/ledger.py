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
from dataclasses import asdict, dataclass, field

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

    def since(self, earlier: "Ledger") -> "Ledger":
        """What was booked after `earlier`, a copy of this ledger."""
        parts = (("tokens", self.tokens), ("flops", self.flops), ("seconds", self.seconds))
        return Ledger(
            **{
                name: {c: now[c] - getattr(earlier, name)[c] for c in CATEGORIES}
                for name, now in parts
            }
        )

    def copy(self) -> "Ledger":
        """An independent copy."""
        return deepcopy(self)

    def metrics(self) -> dict[str, float]:
        """Flat `tokens_*`, `flops_*`, `seconds_*` with a value for each category."""
        return {f"{kind}_{c}": v for kind, sums in asdict(self).items() for c, v in sums.items()}
