"""The demo policy with rarer successes: its careful style is taught down to a small share.

Next-token prediction on the demo's own worked solutions, in other shares; about a minute on two
cores, kept in bench/policies.
"""

import itertools
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from reroll.model.load import model_folder

FOLDER = Path(__file__).parent / "policies"
CAREFUL = {"rare": 0.07, "scarce": 0.02}
"""share of careful replies, the only ones that are right more often than by luck"""
STEPS, BATCH, RATE, SEED = 160, 48, 3e-4, 77


def rare_policy(name: str) -> str:
    """The folder of the policy `rare` or `scarce`; made when it is not there."""
    folder, careful = FOLDER / name, CAREFUL[name]
    if (folder / "model.safetensors").exists():
        return str(folder)
    rest = 1 - careful
    habit = {"guess": rest * 50 / 93, "quick": rest * 43 / 93, "steps": careful}
    sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
    import demo_policy

    print(f"teaching the policy with {name} successes (a minute)", flush=True)
    torch.manual_seed(SEED)
    source = model_folder("demo")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98))
    lessons = demo_policy.lessons(SEED, (5, 9), habit, tokenizer)
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
