"""Names for weights and vocabularies, so that what was written with others is known."""

import hashlib
import json

import torch
from transformers import PreTrainedTokenizerBase

from reroll.config import TaskSection


def weights_digest(model: torch.nn.Module) -> str:
    """Names the weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(task: TaskSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """Names the vocabulary and the templates that prompts go through."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    chat = tokenizer.chat_template if task.chat == "auto" else None
    said = json.dumps([vocabulary, chat, task.template, task.system])
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()
