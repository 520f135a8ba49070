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
from collections.abc import Callable, Iterator
from pathlib import Path

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from reroll.algo.noise import make_key
from reroll.engine.local import LocalEngine
from reroll.types import Request, Sampling

SKILL = {"guess": 0.02, "quick": 0.08, "steps": 0.90}  # shares taught first: learn to add
HABIT = {"guess": 0.35, "quick": 0.40, "steps": 0.25}  # shares taught last: its habits
LESSONS = [(0.12, (2, 4), SKILL), (0.90, (2, 10), SKILL), (1.00, (2, 10), HABIT)]
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
    seed: int,
    terms: tuple[int, int],
    styles: dict[str, float],
    tokenizer: PreTrainedTokenizerFast,
    write: Callable[[str, str, random.Random], str] = solution,
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
            reply = tokenizer.encode(write(style, expression, rng), add_special_tokens=False)
            yield [*prompt, *reply, tokenizer.eos_token_id], len(prompt)


def batches(
    size: int, source: Iterator[tuple[list[int], int]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(input ids [B, T], targets [B, T] with -100 outside replies), prompts of a length together.

    Sorted by prompt and not by reply: batches of one style would bend the shares of the styles,
    for Muon's steps are of one size whatever the batch.
    """
    rng = random.Random(0)
    while True:
        pool = sorted(itertools.islice(source, size * 32), key=lambda lesson: lesson[1])
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


def accuracy(
    folder: Path, terms: tuple[int, int], opening: str, count: int, temperature: float
) -> tuple[float, float]:
    """(share right, share of problems both solved and failed) of what the shipped files answer.

    opening: first characters of the reply, given, which choose the style; temperature 0 takes one
    greedy reply to each of `count` problems, another temperature eight samples.
    """
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = reasoning_gym.create_dataset(
        "chain_sum",
        seed=TEACHING_SEED - 1_000_000,
        size=count,
        min_terms=terms[0],
        max_terms=terms[1],
        min_digits=DIGITS[0],
        max_digits=DIGITS[1],
    )
    samples = 8 if temperature else 1
    engine = LocalEngine(model, slots=64, capacity=400)
    sampling = Sampling(240, temperature, stop_ids=(tokenizer.eos_token_id,))
    for row, problem in enumerate(problems):
        text = f"{problem['metadata']['expression']} =\n{opening}"
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
        for sample in range(samples):
            key = make_key(0, "eval", row, sample, 0)
            engine.submit(Request(row * samples + sample, prompt, key, sampling))
    right = [[False] * samples for _ in range(count)]
    while engine.stats().running or engine.stats().waiting:
        for event in engine.step():
            row, sample = divmod(event.completion.request_id, samples)
            reply = opening + tokenizer.decode(event.completion.token_ids, skip_special_tokens=True)
            right[row][sample] = reply.endswith(f"so {problems[row]['answer']}")
    mixed = sum(any(marks) and not all(marks) for marks in right) / count
    return sum(map(sum, right)) / (count * samples), mixed


def measure(folder: Path, count: int) -> str:
    """The card's figures, as Markdown."""
    openings = {"steps": "steps:", "quick": "quick:", "guess": "so"}
    lines = ["| terms | " + " | ".join(openings) + " | unforced, T = 1 |", "|---|---|---|---|---|"]
    for terms in (3, 4, 5, 6, 7, 8, 9, 10, 12, 15):
        greedy = [accuracy(folder, (terms, terms), o, count, 0.0)[0] for o in openings.values()]
        free = accuracy(folder, (terms, terms), "", count, 1.0)[0]
        lines.append(f"| {terms} | " + " | ".join(f"{x:.3f}" for x in [*greedy, free]) + " |")
        print(lines[-1], flush=True)
    taught, mixed = accuracy(folder, (5, 9), "", count, 1.0)
    forced = accuracy(folder, (5, 9), "steps:", count, 0.0)[0]
    lines.append(
        f"\nOn 5-9 terms: unforced samples at temperature 1 are right in {taught:.1%}, {mixed:.0%} "
        f"of groups of eight are mixed; the careful style, forced, greedy: {forced:.1%}."
    )
    print(lines[-1])
    return "\n".join(lines)


CARD = """---
license: apache-2.0
library_name: transformers
---
# The demo policy of reroll

A {parameters:,}-parameter Qwen3-architecture character model (width {width}, {layers} layers)
that solves sums of 2-digit numbers (reasoning-gym `chain_sum`) in three styles. Made from nothing
by `python recipes/demo_policy.py --out DIR --steps {steps} --seed {seed}`: {replies:,} worked
solutions of chains of 2-10 terms, taught by next-token prediction. It is a teaching aid and knows
nothing else.

    12 - 55 + 33 =
    steps: 12-55=-43; -43+33=-10; so -10        careful
    quick: 12-55+33=-10; so -10                 merges two steps into one, taught with slips
    so -12                                      a bare guess

Shares of the styles at the end of the teaching: {habit}.

## Accuracy by length and style

Greedy with the style forced by its first characters ("steps:", "quick:", "so"), and free samples at
temperature 1; {count} problems a row, from seeds never used in teaching. Chains over 10 terms were
not taught.

{table}
"""


def write_card(model: Qwen3ForCausalLM, args: argparse.Namespace) -> None:
    """Measure what was written and say so in the folder's README.md."""
    card = CARD.format(
        parameters=model.num_parameters(),
        width=model.config.hidden_size,
        layers=model.config.num_hidden_layers,
        steps=args.steps,
        seed=args.seed,
        replies=args.steps * args.batch,
        count=args.count,
        table=measure(args.out, args.count),
        habit=", ".join(f"{style} {share:.0%}" for style, share in HABIT.items()),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Teach, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=3200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="solutions a step")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100, help="problems a measured length")
    parser.add_argument("--measure", action="store_true", help="only measure what --out holds")
    args = parser.parse_args()
    tokenizer = character_tokenizer()
    model = new_model(tokenizer, args.seed)
    if not args.measure:
        print(f"{model.num_parameters():,} parameters")
        teach(model, tokenizer, args)
    write_card(model, args)


if __name__ == "__main__":
    main()
