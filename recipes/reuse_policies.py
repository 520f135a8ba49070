"""Make two one-style policies out of the demo policy, to measure the reuse of old rollouts on.

How much of an old reply a new policy would say again depends on how surprising replies are, and
what it is worth on how long they are. So next to the demo policy, with its three styles, stand

    careful   steps: 12-5=7; 7+33=40; ... so 36      short, and sure of all but its slips
    wordy     steps: Next up, we can try one more: 12-5=7; all good. ... so 36
              over five times as long, the wording of each step drawn anew

In both, a step's written result is wrong now and then and the chain goes on from there: that is
all that reinforcement learning has to mend. Each is the packaged demo policy, taught a little
more: next-token prediction on such solutions of reasoning-gym `chain_sum`. All is seeded;
`python recipes/reuse_policies.py --style careful --out DIR` writes a Hugging Face folder with a
card. As a module: put this folder on sys.path, for it imports its neighbour `demo_policy`.
"""

import argparse
import itertools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import demo_policy
import reasoning_gym
import torch
from reasoning_gym.dataset import ProceduralDataset
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from reroll.algo.noise import make_key
from reroll.engine.base import Finished
from reroll.engine.local import LocalEngine
from reroll.model.load import model_folder
from reroll.types import Completion, Request, Sampling

TEACHING_SEED = demo_policy.TEACHING_SEED + 500_000_000  # far from the demo policy's own lessons
MEASURING_SEED = demo_policy.TEACHING_SEED - 1_000_000  # neither taught nor trained on
ANSWER = r"so (-?\d+)$"
SLIPS = (-10, -2, -1, 1, 2, 10)
SAMPLES = 8

WORDS = (
    ("Now", "Next up", "Well", "Moving on", "Okay", "After that", "Here", "Going on", "Then"),
    ("we can", "we will", "let us", "you may", "I shall"),
    ("do", "take", "work out", "solve", "handle", "settle", "find", "write", "count", "try"),
    ("the next one here", "one more", "this part of it", "what follows", "the new term",
     "our sum so far"),
    ("all good", "simple enough", "very nice", "that was easy", "no trouble", "fine by me"),
)  # fmt: skip
"""choices for "{}, {} {} {}: 12-5=7; {}. " of the wordy style"""


@dataclass(frozen=True)
class Style:
    """A way of writing solutions, and how it is taught."""

    words: tuple[tuple[str, ...], ...]
    """choices of wording around each step, those of the last place behind it; may be empty"""
    terms: tuple[int, int]
    slip: float
    """chance that a step's result is written down wrong"""
    max_tokens: int
    """limit of a reply: the longest fits"""
    steps: int
    batch: int
    lr: float


STYLES = {
    "careful": Style((), (5, 9), 0.165, 160, steps=200, batch=64, lr=1e-3),
    "wordy": Style(WORDS, (7, 9), 0.11, 640, steps=1100, batch=8, lr=1.2e-3),
}


def solution(style: Style, expression: str, rng: random.Random, fullness: float = 1.0) -> str:
    """A worked solution of `expression` (like "12 - 5 + 33"), slips included.

    fullness: chance of the words before a step, and of those behind it.
    """
    first, *rest = expression.split(" ")
    total, text = int(first), "steps: "
    for sign, term in zip(rest[::2], map(int, rest[1::2]), strict=True):
        step = f"{total}{sign}{term}="
        total += term if sign == "+" else -term
        if rng.random() < style.slip:
            total += rng.choice(SLIPS)
        words = [rng.choice(choices) for choices in style.words]
        before = "{}, {} {} {}: ".format(*words) if words and rng.random() < fullness else ""
        behind = f"{words[-1]}. " if words and rng.random() < fullness else ""
        text += f"{before}{step}{total}; {behind}"
    return f"{text}so {total}"


def problems(style: Style, seed: int, size: int) -> ProceduralDataset:
    """`chain_sum` in the lengths of the style."""
    return reasoning_gym.create_dataset(
        "chain_sum",
        seed=seed,
        size=size,
        min_terms=style.terms[0],
        max_terms=style.terms[1],
        min_digits=demo_policy.DIGITS[0],
        max_digits=demo_policy.DIGITS[1],
    )


def lessons(
    style: Style, seed: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Endless (token ids, length of the prompt), problems and wording drawn from `seed`.

    The words come in bit by bit over the first third: the demo policy can follow a chain through
    short replies, and would unlearn it if they were long all at once.
    """
    rng = random.Random(seed)
    full_at = 0.35 * style.steps * style.batch
    for block in itertools.count():
        dataset = problems(style, TEACHING_SEED + seed + 100_000 * block, 100_000)
        for number, problem in enumerate(dataset, start=100_000 * block):
            expression = problem["metadata"]["expression"]
            text = solution(style, expression, rng, min(1.0, number / full_at))
            prompt = tokenizer.encode(f"{expression} =\n", add_special_tokens=False)
            reply = tokenizer.encode(text, add_special_tokens=False)
            yield [*prompt, *reply, tokenizer.eos_token_id], len(prompt)


def teach(
    style: Style, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    """Next-token cross-entropy on the replies, AdamW, `style.steps` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=style.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 20, 0.02 + 1.4 * (1 - s / style.steps))
    )
    source = demo_policy.batches(style.batch, lessons(style, seed, tokenizer), tokenizer)
    started = time.perf_counter()
    for step, (tokens, targets) in enumerate(itertools.islice(source, style.steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == style.steps:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)


@torch.inference_mode()
def replies(
    style: Style, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int
) -> Iterator[tuple[int, Completion, bool]]:
    """(problem, completion, whether it is right): eight a problem, temperature 1, full softmax."""
    engine = LocalEngine(model, slots=64, capacity=1024)
    sampling = Sampling(style.max_tokens, stop_ids=(tokenizer.eos_token_id,))
    answers = []
    for row, problem in enumerate(problems(style, MEASURING_SEED, count)):
        text = f"{problem['metadata']['expression']} =\n"
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
        answers.append(problem["answer"])
        for sample in range(SAMPLES):
            key = make_key(0, "eval", row, sample, 0)
            engine.submit(Request(row * SAMPLES + sample, prompt, key, sampling))
    while engine.stats().running or engine.stats().waiting:
        for event in engine.step():
            assert isinstance(event, Finished)
            row = event.completion.request_id // SAMPLES
            text = tokenizer.decode(event.completion.token_ids, skip_special_tokens=True)
            said = re.search(ANSWER, text)
            yield row, event.completion, said is not None and said[1] == answers[row]


def measure(
    style: Style, folder: Path, tokenizer: PreTrainedTokenizerFast, count: int
) -> dict[str, float]:
    """The card's figures, of the weights as they were written."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    right = [0] * count
    lengths, surprise, cut = [], 0.0, 0
    for row, completion, is_right in replies(style, model, tokenizer, count):
        right[row] += is_right
        lengths.append(len(completion.token_ids))
        surprise -= sum(completion.logprobs)
        cut += completion.finish == "length"
    return {
        "right": sum(right) / len(lengths),
        "mixed": sum(0 < marks < SAMPLES for marks in right) / count,
        "entropy": surprise / sum(lengths),
        "length": sum(lengths) / len(lengths),
        "cut": cut / len(lengths),
    }


CARD = """---
license: apache-2.0
library_name: transformers
---
# A policy to measure the reuse of rollouts on: {name}

The demo policy of reroll, taught {replies:,} more worked solutions of reasoning-gym `chain_sum`,
all in one style. A teaching aid: it knows nothing else. Made again, and measured, by

    python recipes/reuse_policies.py --style {name} --out DIR --steps {s.steps} \\
        --batch {s.batch} --seed {seed}

In what it was taught, the result of a step is wrong with a chance of {s.slip:.1%} and the chain
goes on from there. For example

    {prompt}
    {reply}

| {problems} problems never taught, {samples} replies each, temperature 1 | |
|---|---|
| right | {right:.1%} |
| groups of {samples} both right and wrong | {mixed:.1%} |
| entropy (mean surprise of a sampled token) | {entropy:.4f} nats |
| mean length, end of text included | {length:.1f} tokens |
| cut at {s.max_tokens} tokens | {cut:.2%} |

The task:

    [task]
    source = "reasoning_gym"
    name = "chain_sum"
    params = {{ min_terms = {least}, max_terms = {most}, min_digits = 2, max_digits = 2 }}
    template = "{{expression}} =\\n"
    answer_pattern = '{answer}'

    [rollout]
    max_tokens = {s.max_tokens}
"""


def write_card(name: str, style: Style, out: Path, seed: int, count: int) -> dict[str, float]:
    """Measure what `out` holds, say so in its README.md and give the figures."""
    figures = measure(style, out, demo_policy.character_tokenizer(), count)
    expression = problems(style, MEASURING_SEED, 1)[0]["metadata"]["expression"]
    card = CARD.format(
        name=name, s=style, seed=seed, least=style.terms[0], most=style.terms[1],
        replies=style.steps * style.batch, answer=ANSWER,
        prompt=f"{expression} =", reply=solution(style, expression, random.Random(seed)),
        problems=count, samples=SAMPLES, **figures,
    )  # fmt: skip
    (out / "README.md").write_text(card, encoding="utf-8")
    return figures


def build(
    style: str, out: str | Path, steps: int | None = None, seed: int = 0, *,
    batch: int | None = None, count: int = 128, teaching: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Write the policy of a style ("careful", "wordy") to the folder `out`; gives its figures.

    steps, batch: of the teaching; None is the style's own. count: problems to measure on.
    teaching: False only measures what `out` holds and writes its card.
    """
    chosen = STYLES[style]
    chosen = replace(chosen, steps=steps or chosen.steps, batch=batch or chosen.batch)
    if teaching:
        tokenizer = demo_policy.character_tokenizer()
        # eager attention, as in the demo policy's recipe: faster on a CPU
        model = Qwen3ForCausalLM.from_pretrained(
            model_folder("demo"), dtype=torch.float32, attn_implementation="eager"
        )
        teach(chosen, model, tokenizer, seed)
        demo_policy.save(model, tokenizer, Path(out))
    return write_card(style, chosen, Path(out), seed, count)


def main() -> None:
    """Teach, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--style", choices=list(STYLES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the style's own")
    parser.add_argument("--batch", type=int, help="solutions a step; default: the style's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=128, help="problems to measure on")
    parser.add_argument("--measure", action="store_true", help="only measure what --out holds")
    args = parser.parse_args()
    started = time.perf_counter()
    figures = build(
        args.style, args.out, args.steps, args.seed,
        batch=args.batch, count=args.count, teaching=not args.measure,
    )  # fmt: skip
    print("  ".join(f"{name} {figure:.4g}" for name, figure in figures.items()))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
