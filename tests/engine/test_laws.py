"""What is sampled with drafts on, against laws written out: lossless has none, lenient a bias.

A policy writes texts, is trained on some of them by a real optimizer, and is then sampled with its
old texts as drafts. Vocabulary and limit are so small that all texts can be listed, with their
chances under the old law p and the new law q. float32, as training is.

`n` independent texts of law P have counts with E|count / n - P(x)| <= sqrt(P(x) (1 - P(x)) / n),
so the total variation between their shares and P has mean at most half the sum of these. One text
more or less moves it by 1 / n, so (McDiarmid) it exceeds its mean by sqrt(log(1e6) / (2 n)) with a
chance of at most 1e-6. `noise` is the sum of the two.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM

from reroll.algo.noise import make_key
from reroll.engine.local import LocalEngine, Speculation
from reroll.types import Completion, Draft, Lenience, Request, Sampling
from tests.algo.laws import fits
from tests.engine.helpers import finish
from tests.tiny import SERVED

SIZE, STOP, PROMPT = 6, 5, (1, 4, 2)
LAW = Sampling(3, stop_ids=(STOP,))
COUNT = 20_000
Text = tuple[int, ...]
Conditional = dict[Text, np.ndarray]
"""law of the next token after each unfinished text"""


def small_policy():
    kind, settings = SERVED["llama"]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**settings, "vocab_size": SIZE})
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def complete(text: Text) -> bool:
    return len(text) == LAW.max_tokens or text[-1:] == (STOP,)


def conditional(model) -> Conditional:
    """Enumerated by plain forwards."""
    found, level = {}, [()]
    while level:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*PROMPT, *text] for text in level])).logits
        laws = logits[:, -1].double().softmax(-1).numpy()
        found.update(zip(level, laws, strict=True))
        longer = [(*text, token) for text in level for token in range(SIZE)]
        level = [text for text in longer if not complete(text)]
    return found


def law_of_texts(law: Conditional) -> dict[Text, float]:
    """Chance of each complete text."""
    chances = {}
    for text, nexts in law.items():
        before = math.prod(law[text[:n]][token] for n, token in enumerate(text))
        for token, chance in enumerate(nexts):
            if complete((*text, token)):
                chances[*text, token] = float(before * chance)
    return chances


def lenient_law(p: Conditional, q: Conditional, factor: float) -> dict[Text, float]:
    """Of a draft by p and new texts by q, as SPEC-RL has them.

    The draft's first tokens are all kept with chance prod min(p, factor * q), summed over what it
    was; the rest of the time the text leaves it at some token, that one drawn by q, and all after.
    """
    chances = dict.fromkeys(law_of_texts(q), 0.0)

    def plainly(text: Text, mass: float) -> None:
        for token, chance in enumerate(q[text]):
            longer = (*text, token)
            if complete(longer):
                chances[longer] += mass * chance
            else:
                plainly(longer, mass * chance)

    def kept(text: Text, mass: float) -> None:
        if complete(text):
            chances[text] += mass
            return
        going = np.minimum(p[text], factor * q[text])
        plainly(text, mass * (1 - going.sum()))
        for token, chance in enumerate(going):
            kept((*text, token), mass * chance)

    kept((), 1.0)
    return chances


class Case(NamedTuple):
    engine: LocalEngine
    p: Conditional
    q: Conditional
    drafts: list[Draft]
    """`COUNT` independent texts of p"""


def sample(engine: LocalEngine, requests: list[Request]) -> list[Completion]:
    done = {}
    for start in range(0, len(requests), 500):
        done |= finish(engine, requests[start : start + 500])
    return [done[i] for i in range(len(requests))]


def fresh_requests(visit: int, **how) -> list[Request]:
    """Keys of their own for every visit."""
    return [Request(i, PROMPT, make_key(0, "train", 5, i, visit), LAW, **how) for i in range(COUNT)]


@pytest.fixture(scope="module")
def case() -> Case:
    model = small_policy()
    engine = LocalEngine(
        model, slots=500, capacity=8, prefill_rows=500, speculation=Speculation(gate=False)
    )
    p = conditional(model)
    old = sample(engine, fresh_requests(0))
    drafts = [Draft(c.token_ids, c.logprobs, c.versions) for c in old]
    train_on(model, old[:8])
    engine.load_weights(1)
    return Case(engine, p, conditional(model), drafts)


def train_on(model, texts: list[Completion]) -> None:
    """Policy gradient on the very texts that are offered later: low tokens are rewarded."""
    rewards = torch.tensor([-sum(c.token_ids) / len(c.token_ids) for c in texts])
    advantages = (rewards - rewards.mean()) / rewards.std()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for _ in range(4):
        loss = torch.zeros(())
        for text, advantage in zip(texts, advantages, strict=True):
            ids = torch.tensor([[*PROMPT, *text.token_ids]])
            logits = model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]
            picked = logits.log_softmax(-1).gather(-1, ids[0, len(PROMPT) :, None])
            loss = loss - advantage * picked.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def distance(first: dict[Text, float], second: dict[Text, float]) -> float:
    """Total variation."""
    return sum(abs(first[text] - second[text]) for text in second) / 2


def beginnings(law: dict[Text, float], size: int) -> dict[Text, float]:
    """The law of the first tokens."""
    out: dict[Text, float] = {}
    for text, chance in law.items():
        out[text[:size]] = out.get(text[:size], 0.0) + chance
    return out


def noise(law: dict[Text, float]) -> float:
    """See the module."""
    chance = np.array(list(law.values()))
    mean = np.sqrt(chance * (1 - chance) / COUNT).sum() / 2
    return float(mean + math.sqrt(math.log(1e6) / (2 * COUNT)))


def observed(done: list[Completion], law: dict[Text, float], size: int) -> Counter:
    counts = Counter(tuple(c.token_ids[:size]) for c in done)
    assert set(counts) <= set(law) and counts.total() == COUNT
    return Counter({text: counts[text] for text in law})


def check_follows(done: list[Completion], law: dict[Text, float]) -> None:
    """The first token, the first two and whole texts are draws of this law."""
    for size in (1, 2, 3):
        part = beginnings(law, size)
        counts = observed(done, part, size)
        shares = {text: count / COUNT for text, count in counts.items()}
        assert distance(shares, part) < noise(part)
        expected = torch.tensor(list(part.values()))
        assert fits(torch.tensor(list(counts.values())), expected)


def rejects(done: list[Completion], law: dict[Text, float], size: int) -> float:
    """p-value of chi-square against a law, texts of fewer than 10 expected in one cell."""
    part = beginnings(law, size)
    counts = observed(done, part, size)
    pairs = [(counts[text], chance * COUNT) for text, chance in part.items()]
    cells = [pair for pair in pairs if pair[1] >= 10]
    rare = [pair for pair in pairs if pair[1] < 10]
    if sum(pair[1] for pair in rare) >= 10:
        cells.append(tuple(map(sum, zip(*rare, strict=True))))
        rare = []
    scale = sum(c for c, _ in cells) / sum(e for _, e in cells)
    return float(chisquare([c for c, _ in cells], [e * scale for _, e in cells]).pvalue)


def test_the_case_is_what_it_should_be(case):
    p, q = law_of_texts(case.p), law_of_texts(case.q)
    assert len(p) == 5**2 * 6 + 5 + 1 and sum(p.values()) == pytest.approx(1)
    assert sum(q.values()) == pytest.approx(1)
    assert 0.1 < distance(p, q) < 0.3  # a real update, and not another policy
    assert min(q.values()) > 0
    old = [Completion(0, list(d.token_ids)) for d in case.drafts]
    check_follows(old, p)
    for draft in case.drafts[:50]:
        for n, (token, logprob) in enumerate(zip(draft.token_ids, draft.logprobs, strict=True)):
            chance = case.p[tuple(draft.token_ids[:n])][token]
            assert logprob == pytest.approx(math.log(chance), abs=1e-5)
    for factor in (0.5, 1.0, 2.0):
        assert sum(lenient_law(case.p, case.q, factor).values()) == pytest.approx(1)
    # limits: whatever is kept is p, what is never kept is q
    assert distance(lenient_law(case.p, case.q, math.inf), p) < 1e-12
    assert distance(lenient_law(case.p, case.q, 0.0), q) < 1e-12


def test_lossless_with_the_texts_that_were_trained_on_is_exact(case):
    """Exact even given the drafts: eight fixed ones, which the weights have seen; fresh keys."""
    drafts = tuple(case.drafts[:8])
    before = case.engine.stats().tokens_reused
    done = sample(case.engine, fresh_requests(1, drafts=drafts))
    check_follows(done, law_of_texts(case.q))
    # and most of it came off the tree
    assert case.engine.stats().tokens_reused - before > 0.5 * COUNT
    assert {version for c in done for version in c.versions} == {1}


def test_lossless_with_a_text_of_the_old_policy_each_is_exact(case):
    requests = fresh_requests(2)
    requests = [
        Request(r.id, r.prompt_ids, r.key, r.sampling, drafts=(draft,))
        for r, draft in zip(requests, case.drafts, strict=True)
    ]
    done = sample(case.engine, requests)
    check_follows(done, law_of_texts(case.q))
    assert sum(c.accepted for c in done) > COUNT


@pytest.mark.parametrize("factor", [1.0, math.exp(0.5)], ids=["1", "e^0.5"])
def test_lenient_follows_its_own_law_and_not_the_policy(case, factor):
    """Every request has an old text of its own, and noise of its own."""
    theory, q = lenient_law(case.p, case.q, factor), law_of_texts(case.q)
    visit = 3 if factor == 1 else 4
    requests = [
        Request(r.id, r.prompt_ids, r.key, r.sampling, drafts=(draft,), lenience=Lenience(factor))
        for r, draft in zip(fresh_requests(visit), case.drafts, strict=True)
    ]
    done = sample(case.engine, requests)
    check_follows(done, theory)
    for size in (1, 2, 3):
        part, of_policy = beginnings(theory, size), beginnings(q, size)
        counts = observed(done, of_policy, size)
        shares = {text: count / COUNT for text, count in counts.items()}
        bias = distance(part, of_policy)
        # the bias is as large as theory has it, far beyond noise
        assert bias > 1.5 * noise(part)
        assert abs(distance(shares, of_policy) - bias) < noise(part)
        assert rejects(done, q, size) < 1e-9
    # a number in 0..3 has a standard deviation of at most 1.5
    kept = sum(c.accepted for c in done) / COUNT
    assert kept == pytest.approx(kept_tokens(case, factor), abs=5 * 1.5 / math.sqrt(COUNT))


def kept_tokens(case: Case, factor: float) -> float:
    """Expected number of kept tokens."""

    def after(text: Text, mass: float) -> float:
        if complete(text):
            return 0.0
        going = mass * np.minimum(case.p[text], factor * case.q[text])
        return going.sum() + sum(after((*text, t), m) for t, m in enumerate(going))

    return float(after((), 1.0))
