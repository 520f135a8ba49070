"""FLOPs of a forward, counted: 2 for each parameter that a token passes (of a mixture of experts
the routed ones only, embeddings looked up are free, the output head counted) and, for each token
it attends to, 4 for each element of the query heads.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from reroll.model.attention import BLOCK, FLEX_BLOCK, FLEX_FROM, takes_blocks, takes_flex
from reroll.model.load import embeddings


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of one token's forward: `per_token` + `per_context` for each token attended to."""

    per_token: float
    per_context: float
    block: int | None = None
    """queries that attend to nothing behind them, under a mask; None: all pairs are computed"""
    flex_from: int | None = None
    """columns under a mask from which flex attention is used; None: never"""

    def flops(self, tokens: float, context: float) -> float:
        """FLOPs of a forward over `tokens` that attend to `context` tokens in all."""
        return self.per_token * tokens + self.per_context * context

    def attended(self, width: int) -> float:
        """Tokens attended to among so many columns under a mask, needed or not."""
        block = FLEX_BLOCK if self.flexes(width) else self.block
        return width**2 if block is None else width * (width + min(width, block)) / 2

    def flexes(self, width: int) -> bool:
        """Whether so many columns under a mask attend through flex attention."""
        return self.flex_from is not None and width >= self.flex_from


def cost_model(model: PreTrainedModel) -> CostModel:
    """Read the sizes off the module."""
    config = model.config.get_text_config()
    embedding, head = embeddings(model)
    total = sum(p.numel() for p in model.parameters())
    passed = total - embedding.numel() + (head.numel() if head is embedding else 0)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        passed -= routed * (1 - config.num_experts_per_tok / experts)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    block = BLOCK if takes_blocks(model) else None
    flex_from = FLEX_FROM if takes_flex(model) else None
    per_context = 4.0 * heads * width * config.num_hidden_layers
    return CostModel(2.0 * passed, per_context, block, flex_from)
