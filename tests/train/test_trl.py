"""Loss and gradient are those of TRL's GRPOTrainer, constructed and fed the same tokens.

    average = "sequence"   loss_type="grpo": mean over each completion's tokens, then over
                           completions
    average = "token"      loss_type="bnpo": sum over tokens / tokens of the batch; and "dapo": the
                           same with the tokens of all microbatches (`num_items_in_batch`), which
                           is what makes microbatches add up

TRL's `use_bias_correction_kl`, which multiplies the KL term by the ratio (DeepSeek-V3.2), is off:
the KL term here is that of the GRPO paper.
"""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from reroll.train.batch import Credited
from reroll.types import Rollout
from tests.tiny import tiny
from tests.train.batches import (
    assert_same,
    flat_gradient,
    gradients,
    group,
    make_trainer,
    store,
)

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPERATURE, CLIP_LOW, CLIP_HIGH = 0.8, 0.2, 0.28


def batch() -> list[Credited]:
    """Two groups of three, stale tokens whose old log-probs are off, some tokens not trained on."""
    groups = [
        group(0, [0.0, 1.0, 0.5], [6, 11, 3], version=-9),
        group(1, [1.0, 0.0, 0.25], [7, 7, 9], prompt=6, version=-9, prefix=2),
    ]
    groups[0].rollouts[1].completion.loss_mask[4:7] = [False] * 3
    # not centred, so that the loss is not a small difference of large terms
    credited = list(zip(groups, ([0.5, 2.0, -1.0], [1.5, -0.75, 1.0]), strict=True))
    store(tiny("llama", torch.float32), credited, noise=0.6, temperature=TEMPERATURE)
    return credited


def make_trl(project_folder, folder, *, microbatches: int = 1, **settings):
    """A GRPOTrainer on the same policy; its reference is another tiny model, read from `folder`."""
    tiny("llama", torch.float32, seed=1).save_pretrained(folder / "reference")
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    model.load_state_dict(tiny("llama", torch.float32).state_dict())
    config = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=6 // microbatches,
        gradient_accumulation_steps=microbatches,
        num_generations=3,
        temperature=TEMPERATURE,
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        use_bias_correction_kl=False,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1", "2"]}),
        processing_class=AutoTokenizer.from_pretrained(project_folder / "policy"),
    )
    trainer.model.train()
    # what the training loop sets before it computes losses
    trainer.current_gradient_accumulation_steps = microbatches
    return trainer


def trl_inputs(credited: list[Credited], reference=None) -> dict[str, torch.Tensor]:
    """The batch as TRL holds it: prompts padded on the left, completions on the right."""
    rows: list[tuple[Rollout, float]] = [
        pair
        for made, advantages in credited
        for pair in zip(made.rollouts, advantages, strict=True)
    ]
    completions = [r.completion for r, _ in rows]

    def padded(lists, dtype=torch.long, side="right"):
        tensors = [torch.tensor(x, dtype=dtype) for x in lists]
        return pad_sequence(tensors, batch_first=True, padding_side=side)

    prompts = [r.prompt.token_ids for r, _ in rows]
    return {
        "prompt_ids": padded(prompts, side="left"),
        "prompt_mask": padded([[1] * len(p) for p in prompts], side="left"),
        "completion_ids": padded([c.token_ids for c in completions]),
        "completion_mask": padded([[1] * len(c.token_ids) for c in completions]),
        "tool_mask": padded([c.loss_mask for c in completions]),
        "advantages": torch.tensor([advantage for _, advantage in rows]),
        "old_per_token_logps": padded([c.logprobs for c in completions], torch.float32),
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


CASES = [
    ("sequence", "grpo", 0.0, 0.0),
    ("sequence", "grpo", 0.3, 0.0),
    ("token", "bnpo", 0.0, 0.0),
    ("token", "bnpo", 0.3, 0.0),
    ("token", "dapo", 0.0, 0.0),
    ("token", "dapo", 0.3, 0.0),
    # TRL's bonus is a mean over tokens whatever the loss type, as ours is under "token"
    ("token", "dapo", 0.3, 0.1),
]


@pytest.mark.parametrize("average, loss_type, kl, entropy", CASES)
def test_loss_and_gradient_are_those_of_trl(
    average, loss_type, kl, entropy, project_folder, tmp_path
):
    credited = batch()
    theirs = make_trl(project_folder, tmp_path, loss_type=loss_type, beta=kl, entropy_coef=entropy)
    inputs = trl_inputs(credited)
    if kl:
        inputs = with_reference(theirs, inputs)
    loss = theirs.compute_loss(theirs.model, inputs)
    loss.backward()

    ours = make_ours(average, kl, entropy)
    (gradient,), metrics, _ = gradients(ours, credited)
    assert abs(loss.item()) > 1e-3
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(gradient, flat_gradient(theirs.model), 1e-5)

    logged = theirs._metrics["train"]
    (clipped,) = logged["clip_ratio/region_mean"]
    assert metrics["clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    # it binds on some tokens, on either side
    assert logged["clip_ratio/low_mean"][0] > 0 < logged["clip_ratio/high_mean"][0]
    if kl:
        assert metrics["kl"] == pytest.approx(logged["kl"][0], rel=1e-5)
        assert metrics["kl"] > 0.1
    if entropy:
        assert metrics["entropy_exact"] == pytest.approx(logged["entropy"][0], rel=1e-5)


def make_ours(average: str, kl: float, entropy: float, **train):
    algo = dict(average=average, kl_coef=kl, entropy_coef=entropy)
    return make_trainer(
        tiny("llama", torch.float32),
        algo=algo | dict(clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
        temperature=TEMPERATURE,
        reference=tiny("llama", torch.float32, seed=1) if kl else None,
        **train,
    )


def test_accumulated_microbatches_are_those_of_trl(project_folder, tmp_path):
    # two microbatches of one group each, of different token counts
    credited = batch()
    theirs = make_trl(project_folder, tmp_path, loss_type="dapo", beta=0.3, microbatches=2)
    whole = trl_inputs(credited)["num_items_in_batch"]
    total = 0.0
    for part in (credited[:1], credited[1:]):
        inputs = with_reference(theirs, trl_inputs(part)) | {"num_items_in_batch": whole}
        loss = theirs.compute_loss(theirs.model, inputs)
        loss.backward()
        total += loss.item()
    ours = make_ours("token", 0.3, 0.0, microbatch_tokens=1)
    passes = []
    ours.model.register_forward_pre_hook(lambda *_: passes.append(1))
    (gradient,), metrics, _ = gradients(ours, credited)
    assert len(passes) == 2
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    assert_same(gradient, flat_gradient(theirs.model), 1e-5)


def test_the_comparison_can_fail(project_folder, tmp_path):
    # the other normaliser, and a clip range off by a little
    credited = batch()
    theirs = make_trl(project_folder, tmp_path, loss_type="grpo", beta=0.0)
    loss = theirs.compute_loss(theirs.model, trl_inputs(credited))
    loss.backward()
    expected = flat_gradient(theirs.model)
    ours = make_ours("token", 0.0, 0.0)
    (gradient,), metrics, _ = gradients(ours, credited)
    assert metrics["loss"] != pytest.approx(loss.item(), rel=1e-3)
    with pytest.raises(AssertionError):
        assert_same(gradient, expected, 1e-3)
    moved = copy.deepcopy(credited)
    moved[0][0].rollouts[0].completion.logprobs[1] += 0.01
    (gradient,), _, _ = gradients(make_ours("sequence", 0.0, 0.0), moved)
    with pytest.raises(AssertionError):
        assert_same(gradient, expected, 1e-5)
