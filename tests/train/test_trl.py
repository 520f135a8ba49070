"""Advantages, loss and gradient are those of TRL's trainers, constructed and fed the same tokens.

Ours are built from `algo.name`, theirs from what TRL calls the same. What they divide by:

    grpo     loss_type="grpo": mean over each completion's tokens, then over completions
    dr_grpo  loss_type="dr_grpo": sum over tokens / (completions * max_completion_length)
    dapo     loss_type="dapo": sum over tokens / tokens of the whole batch of all microbatches
             (`num_items_in_batch`), which is what makes microbatches add up; "bnpo" is the same
             with the tokens of one microbatch
    gspo     importance_sampling_level="sequence" under loss_type="grpo": the ratio is the mean of
             the tokens' log-ratios; the clip range is wider here than the preset's, so that it
             binds on some sequences and leaves others alone
    rloo     RLOOTrainer: ratio and clip of the whole completion, mean over completions

TRL's `use_bias_correction_kl` is `algo.kl_unbiased`: the KL times the ratio, as in DeepSeek-V3.2.
Under GSPO it is compared without: there TRL multiplies by the sequence's ratio, which is another
formula. The KL of RLOO is in the reward on either side, so it is part of the advantages.

Advantages are TRL's own, out of `_generate_and_score_completions` with generation put aside: what
it returns is said to have been generated. REINFORCE++ and PPO's per-token advantages have no
counterpart in TRL; `test_credit.py` has them by hand.
"""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from reroll.train.credit import Credit
from reroll.types import Group, Rollout
from tests.tiny import tiny
from tests.train.batches import (
    assert_same,
    flat_gradient,
    gradients_of,
    group,
    make_trainer,
    store,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPERATURE, MAX_TOKENS = 0.8, 13
GIVEN = [0.5, 2.0, -1.0, 1.5, -0.75, 1.0]
"""advantages; not centred, so that the loss is no small difference of large float32 terms"""


def batch(whole: bool = False) -> list[Group]:
    """Two groups of three, stale tokens whose old log-probs are off, some tokens not trained on.

    whole: for RLOO. All tokens are trained on (TRL has no mask of its own there), and there are
    few of them: TRL takes the difference of two float32 sums of log-probs.
    """
    if whole:
        groups = [
            group(0, [0.0, 1.0, 0.5], [5, 5, 3], version=-9),
            group(1, [1.0, 0.0, 0.25], [4, 3, 5], prompt=6, version=-9),
        ]
    else:
        groups = [
            group(0, [0.0, 1.0, 0.5], [6, 11, 3], version=-9),
            group(1, [1.0, 0.0, 0.25], [7, 7, 9], prompt=6, version=-9, prefix=2),
        ]
        groups[0].rollouts[1].completion.loss_mask[4:7] = [False] * 3
    store(tiny("llama", torch.float32), groups, noise=0.6, temperature=TEMPERATURE)
    return groups


def rollouts(groups: list[Group]) -> list[Rollout]:
    return [r for made in groups for r in made.rollouts]


def credited(trainer, groups: list[Group]) -> list[list[Credit]]:
    """With the advantages GIVEN."""
    found, _ = trainer.credit(groups)
    for one, advantage in zip((one for part in found for one in part), GIVEN, strict=True):
        one.advantages.fill_(advantage)
    return found


def make_trl(project_folder, folder, kind="GRPO", *, size: int = 6, microbatches: int = 1, **given):
    """A trainer on the same policy; its reference is another tiny model, read from `folder`."""
    tiny("llama", torch.float32, seed=1).save_pretrained(folder / "reference")
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    model.load_state_dict(tiny("llama", torch.float32).state_dict())
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "out"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size // microbatches,
        gradient_accumulation_steps=microbatches,
        num_generations=3,
        temperature=TEMPERATURE,
        **given,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=lambda completions, **_: REWARDS,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1", "2", "3"]}),
        processing_class=AutoTokenizer.from_pretrained(project_folder / "policy"),
    )
    trainer.model.train()
    # what the training loop sets before it computes losses
    trainer.current_gradient_accumulation_steps = microbatches
    return trainer


def trl_inputs(groups: list[Group], given: list[float]) -> dict[str, torch.Tensor]:
    """The batch as TRL holds it: prompts padded on the left, completions on the right."""
    rows = rollouts(groups)
    completions = [r.completion for r in rows]

    def padded(lists, dtype=torch.long, side="right"):
        tensors = [torch.tensor(x, dtype=dtype) for x in lists]
        return pad_sequence(tensors, batch_first=True, padding_side=side)

    prompts = [r.prompt.token_ids for r in rows]
    return {
        "prompt_ids": padded(prompts, side="left"),
        "prompt_mask": padded([[1] * len(p) for p in prompts], side="left"),
        "completion_ids": padded([c.token_ids for c in completions]),
        "completion_mask": padded([[1] * len(c.token_ids) for c in completions]),
        "tool_mask": padded([c.loss_mask for c in completions]),
        "advantages": torch.tensor(given),
        # one tensor of each trainer: the other does not look at it
        "old_per_token_logps": padded([c.logprobs for c in completions], torch.float32),
        "old_logps": torch.tensor([sum(c.logprobs) for c in completions]),
        "num_items_in_batch": torch.tensor(sum(sum(c.loss_mask) for c in completions)),
    }


def with_reference(trainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the reference's log-probs, as TRL computes them."""
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.ref_model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
        )
    return inputs | {"ref_per_token_logps": logprobs}


def make_ours(algo: dict, **train):
    return make_trainer(
        tiny("llama", torch.float32),
        algo=algo,
        temperature=TEMPERATURE,
        max_tokens=MAX_TOKENS,
        reference=tiny("llama", torch.float32, seed=1) if algo.get("kl_coef") else None,
        **train,
    )


ALGORITHMS = {
    "grpo": (dict(name="grpo"), dict(loss_type="grpo", epsilon=0.2)),
    "dr_grpo": (
        dict(name="dr_grpo"),
        dict(loss_type="dr_grpo", epsilon=0.2, max_completion_length=MAX_TOKENS),
    ),
    "dapo": (dict(name="dapo"), dict(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)),
    "bnpo": (dict(name="dapo"), dict(loss_type="bnpo", epsilon=0.2, epsilon_high=0.28)),
    "gspo": (
        dict(name="gspo", clip_low=0.04, clip_high=0.06),
        dict(
            loss_type="grpo",
            importance_sampling_level="sequence",
            epsilon=0.04,
            epsilon_high=0.06,
        ),
    ),
}
KL = {
    "no KL": (dict(), dict(beta=0.0)),
    "KL": (dict(kl_coef=0.2), dict(beta=0.2, use_bias_correction_kl=False)),
    "unbiased KL": (
        dict(kl_coef=0.2, kl_unbiased=True),
        dict(beta=0.2, use_bias_correction_kl=True),
    ),
    # TRL's bonus is a mean over tokens whatever the loss type, as ours is under "token"
    "KL and entropy": (
        dict(kl_coef=0.2, entropy_coef=0.1),
        dict(beta=0.2, use_bias_correction_kl=False, entropy_coef=0.1),
    ),
}


@pytest.mark.parametrize(
    "name, kl",
    [
        *((name, kl) for name in ALGORITHMS for kl in ("no KL", "KL")),
        *((name, "unbiased KL") for name in ("grpo", "dr_grpo", "dapo")),
        ("dapo", "KL and entropy"),
    ],
)
def test_loss_and_gradient_are_those_of_grpo(name, kl, project_folder, tmp_path):
    (algo, settings), (ours_kl, theirs_kl) = ALGORITHMS[name], KL[kl]
    groups = batch()
    theirs = make_trl(project_folder, tmp_path, **settings, **theirs_kl)
    inputs = trl_inputs(groups, GIVEN)
    if ours_kl:
        inputs = with_reference(theirs, inputs)
    loss = theirs.compute_loss(theirs.model, inputs)
    loss.backward()

    ours = make_ours(algo | ours_kl)
    (gradient,), metrics = gradients_of(ours, credited(ours, groups))
    assert abs(loss.item()) > 0.1
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(gradient, flat_gradient(theirs.model), 1e-5)

    logged = theirs._metrics["train"]
    (clipped,) = logged["clip_ratio/region_mean"]
    assert 0 < clipped < 1
    if name != "gspo":  # there TRL's share is one of sequences, ours one of tokens
        assert metrics["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    # it binds on either side
    assert logged["clip_ratio/low_mean"][0] > 0 < logged["clip_ratio/high_mean"][0]
    if kl in ("KL", "KL and entropy"):  # with the correction TRL logs it corrected
        assert metrics["kl"] == pytest.approx(logged["kl"][0], rel=1e-5)
        assert metrics["kl"] > 0.1
    if "entropy" in kl:
        assert metrics["entropy_exact"] == pytest.approx(logged["entropy"][0], rel=1e-5)


def test_loss_and_gradient_are_those_of_rloo(project_folder, tmp_path):
    groups = batch(whole=True)
    theirs = make_trl(project_folder, tmp_path, "RLOO", epsilon=0.2, beta=0.0)
    loss = theirs.compute_loss(theirs.model, trl_inputs(groups, GIVEN))
    loss.backward()
    ours = make_ours(dict(name="rloo"))
    (gradient,), metrics = gradients_of(ours, credited(ours, groups))
    assert abs(loss.item()) > 0.1
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(gradient, flat_gradient(theirs.model), 1e-5)
    logged = theirs._metrics["train"]
    assert logged["clip_ratio/low_mean"][0] > 0 < logged["clip_ratio/high_mean"][0]
    assert logged["clip_ratio/region_mean"][0] < 1


def test_accumulated_microbatches_are_those_of_trl(project_folder, tmp_path):
    # two microbatches of one group each there, of one rollout each here
    groups = batch()
    settings = ALGORITHMS["dapo"][1] | KL["KL"][1]
    theirs = make_trl(project_folder, tmp_path, microbatches=2, **settings)
    whole = trl_inputs(groups, GIVEN)["num_items_in_batch"]
    total = 0.0
    for part, given in ((groups[:1], GIVEN[:3]), (groups[1:], GIVEN[3:])):
        inputs = with_reference(theirs, trl_inputs(part, given)) | {"num_items_in_batch": whole}
        loss = theirs.compute_loss(theirs.model, inputs)
        loss.backward()
        total += loss.item()
    ours = make_ours(dict(name="dapo", kl_coef=0.2), microbatch_tokens=1)
    ready = credited(ours, groups)
    passes = []
    ours.model.register_forward_pre_hook(lambda *_: passes.append(1))
    (gradient,), metrics = gradients_of(ours, ready)
    assert len(passes) == 6
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert_same(gradient, flat_gradient(theirs.model), 1e-5)


def test_the_comparison_can_fail(project_folder, tmp_path):
    # each algorithm against each other one's trainer, and a log-prob off by a little
    groups = batch(whole=True)
    expected = {}
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo"):
        kind = "RLOO" if name == "rloo" else "GRPO"
        settings = dict(epsilon=0.2) if name == "rloo" else ALGORITHMS[name][1]
        theirs = make_trl(project_folder, tmp_path, kind, beta=0.0, **settings)
        theirs.compute_loss(theirs.model, trl_inputs(groups, GIVEN)).backward()
        expected[name] = flat_gradient(theirs.model)
    moved = copy.deepcopy(groups)
    moved[0].rollouts[0].completion.logprobs[1] += 0.01
    for name in expected:
        algo = dict(name="rloo") if name == "rloo" else ALGORITHMS[name][0]
        ours = make_ours(algo)
        (gradient,), _ = gradients_of(ours, credited(ours, groups))
        assert_same(gradient, expected[name], 1e-5)
        for other in expected.keys() - {name}:
            with pytest.raises(AssertionError):
                assert_same(gradient, expected[other], 1e-3)
    for name in ("grpo", "dapo"):
        ours = make_ours(dict(name=name))
        (gradient,), _ = gradients_of(ours, credited(ours, moved))
        with pytest.raises(AssertionError):
            assert_same(gradient, expected[name], 1e-5)


# --- advantages ---------------------------------------------------------------------------------


REWARDS = [0.0, 1.0, 0.25, 2.0, None, -1.0, None, 0.5, None, 0.7, 0.7, 0.7]
"""a whole group, one with an ungraded rollout, one of a single graded rollout, one all equal"""


def scored_by_trl(trainer, groups: list[Group], kind: str) -> list[float]:
    """TRL's advantages of what it is told to have generated."""
    rows = rollouts(groups)
    prompts = [list(r.prompt.token_ids) for r in rows]
    completions = [r.completion.token_ids for r in rows]
    texts = [""] * len(rows)
    if kind == "RLOO":
        trainer._generate = lambda _: (prompts, completions, texts)
    else:
        trainer._generate = lambda _: (prompts, completions, None, texts, None, {}, None, None)
    scored = trainer._generate_and_score_completions([{"prompt": "1"} for _ in rows])
    return scored["advantages"].tolist()


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("grpo", "GRPO", dict(scale_rewards="group")),
        ("dr_grpo", "GRPO", dict(scale_rewards="none")),
        ("rloo", "RLOO", dict(beta=0.0)),
        ("rloo", "RLOO", dict(beta=0.2)),
    ],
)
def test_advantages_are_those_of_trl(name, kind, settings, project_folder, tmp_path):
    groups = [
        group(row, REWARDS[3 * row : 3 * row + 3], [6, 11, 3], prompt=4 + row) for row in range(4)
    ]
    store(tiny("llama", torch.float32), groups, noise=0.0, temperature=TEMPERATURE)
    theirs = make_trl(project_folder, tmp_path, kind, size=12, **settings)
    expected = scored_by_trl(theirs, groups, kind)

    beta = settings.get("beta", 0.0)
    ours = make_ours(dict(name=name, kl_coef=beta))
    found, metrics = ours.credit(groups)
    got = {id(one.rollout): one.advantages for part in found for one in part}
    compared = 0
    for r, advantage in zip(rollouts(groups), expected, strict=True):
        if r.reward is None:
            assert advantage == 0.0 and id(r) not in got
            continue
        assert got[id(r)].tolist() == pytest.approx(
            [advantage] * len(r.completion.token_ids), rel=1e-5, abs=1e-5
        )
        compared += abs(advantage) > 0.1
    assert compared >= 5
    assert metrics["small_groups"] == 1.0
    if beta:
        assert metrics["kl"] > 0.1
