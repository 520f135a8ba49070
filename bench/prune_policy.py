"""The demo policy with rarer successes: its careful style is taught down to one reply of fourteen.

Next-token prediction on the demo's own worked solutions, in other shares; about a minute on two
cores, kept in bench/policies.
"""

import itertools
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from reroll.model.load import model_folder

FOLDER = Path(__file__).parent / "policies" / "rare"
HABIT = {"guess": 0.50, "quick": 0.43, "steps": 0.07}
STEPS, BATCH, RATE, SEED = 160, 48, 3e-4, 77


def rare_policy() -> str:
    """The policy's folder; made when it is not there."""
    if (FOLDER / "model.safetensors").exists():
        return str(FOLDER)
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
    import demo_policy

    print("teaching the policy with rare successes (a minute)", flush=True)
    torch.manual_seed(SEED)
    source = model_folder("demo")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    lessons = demo_policy.lessons(SEED, (5, 9), HABIT, tokenizer)
    batches = demo_policy.batches(BATCH, lessons, tokenizer)
    for step, (tokens, targets) in enumerate(itertools.islice(batches, STEPS)):
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 1.4 * (1 - step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    return str(FOLDER)
