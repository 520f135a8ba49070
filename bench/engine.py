"""Decode throughput of the embedded engine against Hugging Face `generate`, on the same module.

Useful tokens per second, same sampling (temperature 1, EOS suppressed), the arms in turn, each in a
process of its own so that neither inherits the other allocator, medians of paired ratios.
(a) `equal`: 64 sequences of one length. (b) `ragged`: 256
requests with log-normal lengths (mean 128, sigma 1, cap 512), 64 slots; `generate` takes them in
batches of 64 in arrival order, each batch as long as its longest. Ends with a profile of where the
engine's time goes.

    python -m bench.engine [--quick] [--fresh]
"""

import math
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
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
REPEATS = {("3m", "equal"): 5, ("3m", "ragged"): 3, ("25m", "equal"): 3, ("25m", "ragged"): 1}
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


@cache
def model_of(size: str) -> Qwen3ForCausalLM:
    """Built once in each process."""
    return build(size)


def run_arm(arm: str, size: str, lengths: list[int], slots: int) -> float | str:
    """One measurement, inside the arm's own process."""
    function = {"engine": run_engine, "generate": run_generate, "continuous": run_continuous}[arm]
    return function(model_of(size), lengths, slots)


def paired(
    processes: dict[str, ProcessPoolExecutor],
    size: str,
    lengths: list[int],
    slots: int,
    repeats: int,
) -> dict[str, list[float]]:
    """Run the arms in turn, `repeats` times over, after a short warm-up of each."""
    figures: dict[str, list[float]] = {arm: [] for arm in processes}
    for repeat in range(-1, repeats):
        for arm, process in processes.items():
            work = lengths if repeat >= 0 else [8] * slots
            value = process.submit(run_arm, arm, size, work, slots).result()
            if repeat >= 0:
                figures[arm].append(value)
    return figures


def shared(size: str, lengths: list[int], slots: int, repeats: int) -> dict[str, list[float]]:
    """The same pair in one process, one after the other: they then share an allocator."""
    figures: dict[str, list[float]] = {"engine": [], "generate": []}
    for _ in range(repeats):
        for arm, values in figures.items():
            values.append(float(run_arm(arm, size, lengths, slots)))
    return figures


def ratio(figures: dict[str, list[float]]) -> tuple[float, float, float]:
    """Median, least and largest of the paired ratios engine / generate."""
    ratios = [e / g for e, g in zip(figures["engine"], figures["generate"], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    """Measure, print tables, save."""
    args = arguments(__doc__.split("\n")[0])
    parts = Parts("engine", args)
    quick = args.quick
    slots = 16 if quick else 64
    cases = {
        "equal": [32] * slots if quick else [256] * 64,
        "ragged": log_normal_lengths(*((32, 24, 1.0, 64) if quick else (256, 128, 1.0, 512))),
    }
    summary: dict[str, float] = {}
    detail: dict[str, Any] = {"lengths": {name: sum(n) / len(n) for name, n in cases.items()}}
    rows, others = [], []
    context = multiprocessing.get_context("spawn")
    arms = ("engine", "generate")
    few = [64] * 32  # for continuous batching, slow on a CPU
    with ExitStack() as stack:
        processes = {
            arm: stack.enter_context(ProcessPoolExecutor(1, mp_context=context)) for arm in arms
        }
        for size in SIZES:
            for name, lengths in cases.items():
                repeats = 1 if quick else REPEATS[size, name]
                figures = parts.measure(
                    f"{name}_{size}",
                    lambda s=size, n=lengths, r=repeats: paired(processes, s, n, slots, r),
                )
                middle, low, high = ratio(figures)
                summary[f"{name}_vs_hf_{size}"] = round(middle, 3)
                detail[f"{name}_{size}"] = figures
                medians = [f"{statistics.median(figures[arm]):,.0f}" for arm in arms]
                rows.append(
                    [f"{size} {name}", *medians, f"{middle:.2f}x", f"{low:.2f} - {high:.2f}"]
                )
    for size in SIZES:
        together = parts.measure(
            f"shared_{size}", lambda s=size: shared(s, cases["equal"], slots, 1 if quick else 3)
        )
        continuous: float | str = "not measured (slow on a CPU)"
        if size == "3m" and not quick:
            continuous = parts.measure(
                f"continuous_{size}", lambda s=size: run_arm("continuous", s, few, slots)
            )
        detail |= {f"shared_{size}": together, f"continuous_equal_{size}": continuous}
        detail[f"profile_{size}"] = parts.measure(
            f"profile_{size}", lambda s=size: profile(model_of(s), 8 if quick else 128)
        )
        said = f"{continuous:,.0f}" if isinstance(continuous, float) else continuous
        others.append([size, f"{ratio(together)[0]:.2f}x", said])
    table(
        "Useful tokens per second, each arm in a process of its own",
        ["case", "engine", "generate", "median ratio", "range"],
        rows,
    )
    table(
        "Equal lengths, other ways",
        ["size", "both arms in one process", "Hugging Face continuous batching, tokens per second"],
        others,
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
