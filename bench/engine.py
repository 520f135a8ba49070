"""Decode throughput of the embedded engine against Hugging Face `generate`, on the same module.

Useful tokens per second, same sampling (temperature 1, EOS suppressed), arms interleaved in one
process, medians of paired ratios. (a) `equal`: 64 sequences of one length. (b) `ragged`: 256
requests with log-normal lengths (mean 128, sigma 1, cap 512), 64 slots; `generate` takes them in
batches of 64 in arrival order, each batch as long as its longest. Ends with a profile of where the
engine's time goes.

    python -m bench.engine [--quick] [--fresh]
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from bench.common import Parts, arguments, table
from reroll.engine.base import Finished
from reroll.engine.local import LocalEngine
from reroll.types import Request, Sampling

PROMPT = 16
SIZES = {
    "3m": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4),
    "25m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8),
}
VOCABULARY = 128
SEED = 0


def build(size: str) -> Qwen3ForCausalLM:
    """A random Qwen3 of about this many parameters, 64-wide heads, two query heads a key head."""
    torch.manual_seed(SEED)
    shape = SIZES[size]
    heads = shape["hidden_size"] // 64
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        head_dim=64,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **shape,
    )
    model = Qwen3ForCausalLM(config).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def log_normal_lengths(count: int, mean: float, sigma: float, cap: int) -> list[int]:
    """Lengths whose untruncated law has this mean."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(SEED)) * sigma
    lengths = (draws + math.log(mean) - sigma**2 / 2).exp().round().long().clamp(1, cap)
    return lengths.tolist()


def prompts(count: int) -> torch.Tensor:
    """Random prompts `[count, PROMPT]`."""
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randint(VOCABULARY, (count, PROMPT), generator=generator)


def run_engine(model: Qwen3ForCausalLM, lengths: list[int], slots: int) -> float:
    """Useful tokens per second of the embedded engine."""
    engine = LocalEngine(model, slots=slots, capacity=PROMPT + max(lengths))
    rows = prompts(len(lengths)).tolist()
    _synchronize()
    started = time.perf_counter()
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        engine.submit(Request(index, tuple(row), key=index, sampling=Sampling(length)))
    done = 0
    while done < len(lengths):
        for event in engine.step():
            assert isinstance(event, Finished)
            done += 1
    _synchronize()
    return sum(lengths) / (time.perf_counter() - started)


def run_generate(model: Qwen3ForCausalLM, lengths: list[int], slots: int) -> float:
    """Useful tokens per second of `generate` in batches of `slots` in arrival order."""
    rows = prompts(len(lengths)).to(model.device)
    _synchronize()
    started = time.perf_counter()
    for start in range(0, len(lengths), slots):
        batch = rows[start : start + slots]
        new = max(lengths[start : start + slots])
        out = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert out.shape[1] == PROMPT + new
    _synchronize()
    return sum(lengths) / (time.perf_counter() - started)


def run_continuous(model: Qwen3ForCausalLM, lengths: list[int], slots: int) -> float | str:
    """Useful tokens per second of Hugging Face continuous batching, or why it does not run."""
    del slots  # it chooses its own batch
    rows = prompts(len(lengths)).tolist()
    config = GenerationConfig(
        max_new_tokens=max(lengths),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        eos_token_id=-1,
        pad_token_id=0,
    )
    started = time.perf_counter()
    try:
        outputs = model.generate_batch(
            inputs=rows, generation_config=config, max_new_tokens=max(lengths), progress_bar=False
        )
    except Exception as error:  # it is a rival, not ours: say what it said
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    seconds = time.perf_counter() - started
    produced = sum(len(o.generated_tokens) for o in outputs.values())
    return produced / seconds if produced else "no tokens came back"


def paired(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run the arms in turn, `repeats` times over."""
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            figures[name].append(arm())
    return figures


GROUPS = {
    "matrix products": ("mm", "linear", "addmm", "bmm", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "cache writes": ("index_put",),
    "noise and sampling": (
        "argmax",
        "logsumexp",
        "log",
        "neg",
        "bitwise",
        "__and__",
        "__rshift__",
        "__lshift__",
        "addcmul",
        "gather",
        "exp",
    ),
}


def profile(model: Qwen3ForCausalLM, ticks: int) -> dict[str, float]:
    """Share of the engine's wall time by kind of work, at 64 slots."""
    engine = LocalEngine(model, slots=64, capacity=PROMPT + ticks + 1)
    for index, row in enumerate(prompts(64).tolist()):
        engine.submit(Request(index, tuple(row), key=index, sampling=Sampling(ticks + 1)))
    engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        for _ in range(ticks - 1):
            engine.step()
        wall = time.perf_counter() - started
    shares = dict.fromkeys([*GROUPS, "norms, rotary, element-wise"], 0.0)
    for entry in profiler.key_averages():
        name = entry.key.removeprefix("aten::")
        group = next((g for g, keys in GROUPS.items() if any(k in name for k in keys)), None)
        shares[group or "norms, rotary, element-wise"] += entry.self_cpu_time_total / 1e6 / wall
    shares["Python between operators"] = max(0.0, 1 - sum(shares.values()))
    return shares


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print tables, save."""
    args = arguments(__doc__.split("\n")[0])
    parts = Parts("engine", args)
    equal = [32] * 16 if args.quick else [256] * 64
    ragged = log_normal_lengths(*((32, 24, 1.0, 64) if args.quick else (256, 128, 1.0, 512)))
    slots = 16 if args.quick else 64
    summary: dict[str, float] = {}
    rows: list[list[object]] = []
    detail: dict[str, Any] = {"ragged_lengths_mean": sum(ragged) / len(ragged)}
    for size in SIZES:
        model = build(size)
        for arm in (run_engine, run_generate):
            arm(model, [8] * slots, slots)  # warm up
        for name, lengths in (("equal", equal), ("ragged", ragged)):
            repeats = 1 if args.quick else (5 if size == "3m" else 3)
            arms: dict[str, Callable[[], float]] = {
                "engine": lambda m=model, n=lengths: run_engine(m, n, slots),
                "generate": lambda m=model, n=lengths: run_generate(m, n, slots),
            }
            figures = parts.measure(f"{name}_{size}", lambda a=arms, r=repeats: paired(a, r))
            ratios = [e / g for e, g in zip(figures["engine"], figures["generate"], strict=True)]
            summary[f"{name}_vs_hf_{size}"] = round(statistics.median(ratios), 3)
            detail[f"{name}_{size}"] = figures
            medians = [f"{statistics.median(figures[arm]):,.0f}" for arm in arms]
            rows.append(
                [
                    f"{size} {name}",
                    *medians,
                    f"{statistics.median(ratios):.2f}x",
                    f"{min(ratios):.2f} - {max(ratios):.2f}",
                ]
            )
        continuous = parts.measure(
            f"continuous_{size}", lambda m=model: run_continuous(m, equal, slots)
        )
        detail[f"continuous_equal_{size}"] = continuous
        detail[f"profile_{size}"] = parts.measure(
            f"profile_{size}", lambda m=model: profile(m, 8 if args.quick else 128)
        )
    table("Useful tokens per second", ["case", "engine", "generate", "median ratio", "range"], rows)
    continuous_rows = [[s, detail[f"continuous_equal_{s}"]] for s in SIZES]
    table(
        "Hugging Face continuous batching, equal lengths",
        ["size", "tokens per second"],
        [[s, f"{c:,.0f}" if isinstance(c, float) else c] for s, c in continuous_rows],
    )
    table(
        "Where the engine's time goes, 64 slots, share of wall time",
        ["kind of work", *SIZES],
        [
            [kind, *(f"{detail[f'profile_{s}'][kind]:.1%}" for s in SIZES)]
            for kind in detail["profile_3m"]
        ],
    )
    parts.finish("engine", summary, [SEED], detail)


if __name__ == "__main__":
    main()
