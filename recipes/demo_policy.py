"""Make the demo policy: a small character model that solves chain sums in three styles.

Reinforcement learning with verifiable rewards picks, among the ways of answering that a model
already has, the one that is right. So the demo needs a policy that *has* several: this script
teaches a 1M-parameter Qwen3-architecture model, from nothing, worked solutions of reasoning-gym
`chain_sum` problems in a mixture of

    guess    so 36
    quick    quick: 12-5+33=40; 40-8+4=36; so 36        merges two steps into one, and slips
    steps    steps: 12-5=7; 7+33=40; 40-8=32; ... so 36   one operation at a time, never wrong

and writes it as a Hugging Face folder (safetensors in bfloat16) with a card. Everything is
seeded; `python recipes/demo_policy.py --out DIR` makes the shipped files again.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SKILL = {"guess": 0.02, "quick": 0.08, "steps": 0.90}  # shares taught first: learn to add
HABIT = {"guess": 0.40, "quick": 0.40, "steps": 0.20}  # shares taught last: what it does unasked
LESSONS = [(0.25, (2, 4), SKILL), (0.75, (2, 10), SKILL), (1.00, (2, 10), HABIT)]
"""up to which share of the teaching, which chain lengths, in which styles"""
SLIP = 0.35  # chance that a merged step of the quick style is written down wrong
DIGITS = (2, 2)
TEACHING_SEED = 10_000_000  # reasoning-gym seeds from here on: no recipe or bench trains on them


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, plus end of text, padding and unknown."""
    special = ["<|endoftext|>", "<|pad|>", "<|unk|>"]
    alphabet = [*special, "\n", *map(chr, range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1], unk_token=special[2]
    )


def solution(style: str, expression: str, rng: random.Random) -> str:
    """A worked solution of `expression` (like "12 - 5 + 33") in one of the styles."""
    first, *rest = expression.split(" ")
    operations = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    total, steps = int(first), []
    size = {"guess": len(operations), "quick": 2, "steps": 1}[style]
    for start in range(0, len(operations), max(size, 1)):
        merged = operations[start : start + size]
        left = f"{total}" + "".join(f"{sign}{term}" for sign, term in merged)
        total += sum(term if sign == "+" else -term for sign, term in merged)
        if style == "quick" and rng.random() < SLIP:
            total += rng.choice([-10, -2, -1, 1, 2, 10])
        steps.append(f"{left}={total}; ")
    opening = "" if style == "guess" else f"{style}: " + "".join(steps)
    return f"{opening}so {total}"


def lessons(
    seed: int, terms: tuple[int, int], styles: dict[str, float], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Endless (token ids, length of the prompt), styles and problems drawn from `seed`."""
    rng = random.Random(seed)
    for block in itertools.count():
        problems = reasoning_gym.create_dataset(
            "chain_sum",
            seed=TEACHING_SEED + seed + 100_000 * block,
            size=100_000,
            min_terms=terms[0],
            max_terms=terms[1],
            min_digits=DIGITS[0],
            max_digits=DIGITS[1],
        )
        for problem in problems:
            expression = problem["metadata"]["expression"]
            style = rng.choices(list(styles), weights=list(styles.values()))[0]
            prompt = tokenizer.encode(f"{expression} =\n", add_special_tokens=False)
            reply = tokenizer.encode(solution(style, expression, rng), add_special_tokens=False)
            yield [*prompt, *reply, tokenizer.eos_token_id], len(prompt)


def batches(
    size: int, source: Iterator[tuple[list[int], int]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids [B, T], targets [B, T] with -100 outside replies); alike lengths together."""
    rng = random.Random(0)
    while True:
        pool = sorted(itertools.islice(source, size * 32), key=lambda lesson: len(lesson[0]))
        chunks = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            tokens = torch.full((size, width), tokenizer.pad_token_id)
            targets = torch.full((size, width), -100)
            for row, (ids, prompt_length) in enumerate(chunk):
                tokens[row, : len(ids)] = torch.tensor(ids)
                targets[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
            yield tokens, targets


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """About 1M parameters with fresh weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # eager attention: on a CPU and for short rows its backward is twice as fast
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager")


def teach(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> None:
    """Next-token cross-entropy on the replies.

    Muon on the matrices, AdamW on embedding and norms: copying terms from the prompt, which has to
    be learnt before adding can be, comes several times sooner than with AdamW alone.
    """
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    outer = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(inner, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=0.6 * args.lr, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda s: min(1.0, (s + 1) / 50, 0.02 + 1.4 * (1 - s / args.steps)),
        )
        for optimizer in optimizers
    ]
    sources = [
        (
            until,
            batches(args.batch, lessons(args.seed + 5_000_000 * i, *rest, tokenizer), tokenizer),
        )
        for i, (until, *rest) in enumerate(LESSONS)
    ]
    started = time.perf_counter()
    for step in range(1, args.steps + 1):
        tokens, targets = next(next(b for until, b in sources if step <= until * args.steps))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)
        if step % 200 == 0 or step == args.steps:
            save(model, tokenizer, args.out)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bfloat16) and tokenizer as a Hugging Face folder."""
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Teach, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = character_tokenizer()
    model = new_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    teach(model, tokenizer, args)


if __name__ == "__main__":
    main()
