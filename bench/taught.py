"""Policies taught for a benchmark: the demo's, on other lessons, kept in bench/policies.

Next-token prediction on replies; a minute or two on two cores.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from recipes import demo_policy
from reroll.model.load import model_folder

FOLDER = Path(__file__).parent / "policies"
BATCH, RATE = 48, 3e-4
Lessons = Callable[[Any], Iterator[tuple[list[int], int]]]
"""tokenizer -> endless (token ids, length of the prompt), as `demo_policy.lessons`"""


def taught(name: str, lessons: Lessons, steps: int, seed: int) -> str:
    """The folder of a policy; it is taught when it is not there."""
    folder = FOLDER / name
    if (folder / "model.safetensors").exists():
        return str(folder)
    print(f"teaching the policy {name} (a minute or two)", flush=True)
    torch.manual_seed(seed)
    source = model_folder("demo")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    batches = demo_policy.batches(BATCH, lessons(tokenizer), tokenizer)
    for step, (tokens, targets) in enumerate(itertools.islice(batches, steps)):
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 1.4 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
