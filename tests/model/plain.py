"""Log-probs the obvious way: one unpadded forward for each text. All else must equal these."""

import torch
from transformers import PreTrainedModel


def plain(
    model: PreTrainedModel, context: list[int], continuation: list[int], temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each continuation token and the entropy of its law, with gradient."""
    tokens = torch.tensor([[*context, *continuation]])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(context) - 1 : -1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logs = (logits / temperature).log_softmax(-1)
    chosen = logs[torch.arange(len(continuation)), torch.tensor(continuation)]
    return chosen, -(logs.exp() * logs).sum(-1)
