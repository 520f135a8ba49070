"""Adapters inside the module: what they leave alone, what they change, what is kept of them."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from reroll.config import AlgoSection, LoraSection, TrainSection
from reroll.errors import UserError
from reroll.model.logprobs import token_logprobs
from reroll.model.lora import adapters_off, add_lora
from reroll.train import checkpoint
from reroll.train.trainer import Trainer
from reroll.types import Completion, Finish, Group, Prompt, Rollout
from tests.tiny import tiny

NAMES = ["qwen3", "gpt2", "llama"]
PAIRS = [((3, 1, 4), [1, 5, 9, 2]), ((6,), [5, 3]), ((5, 8, 9, 7, 9), [3, 2, 3, 8, 4, 6])]
RANK_4 = LoraSection(rank=4)


@pytest.fixture(autouse=True)
def quiet_conv1d() -> Iterator[None]:
    """What peft says of GPT-2's layers has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        yield


def logprobs(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return token_logprobs(model, PAIRS).logprobs


def adapted(
    name: str, dtype: torch.dtype | None = None, config: LoraSection = RANK_4, seed: int = 0
) -> PreTrainedModel:
    model = tiny(name, dtype)
    add_lora(model, config, seed)
    return model


def adapters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def base(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All other weights, by the names that they have without adapters."""
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }


def stir(model: PreTrainedModel, seed: int = 1) -> None:
    """Give the adapters something to say: the second factor is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys() and ours
    return all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)


def groups(model: PreTrainedModel) -> list[Group]:
    """Two groups of two rollouts with unequal rewards, as if drawn from the model."""
    made = []
    for row in range(2):
        prompt = Prompt(row, f"p{row}", (row + 1, row + 2))
        rollouts = []
        for sample in range(2):
            ids = [(7 * row + 5 * sample + 3 * i) % 60 for i in range(3 + sample)]
            with torch.no_grad():
                logs = token_logprobs(model, [(prompt.token_ids, ids)]).logprobs.tolist()
            n = len(ids)
            completion = Completion(0, ids, logs, list(logs), [0] * n, [True] * n, Finish.STOP)
            rollouts.append(Rollout(prompt, sample, 0, completion, reward=float(sample)))
        made.append(Group(prompt, rollouts))
    return made


def make_trainer(
    model: PreTrainedModel, checkpointing: bool = False, kl_coef: float = 0.0
) -> Trainer:
    settings = TrainSection(learning_rate=1e-2, gradient_checkpointing=checkpointing)
    return Trainer(
        model,
        AlgoSection(kl_coef=kl_coef),
        settings,
        temperature=1.0,
        max_tokens=8,
        reference=model if kl_coef else None,
    )


def step(trainer: Trainer) -> dict[str, float]:
    return trainer.step(trainer.credit(groups(trainer.model))[0])


# --- fresh --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_change_no_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    before, weights = logprobs(model), base(model)
    kind, names = type(model), [n for n, _ in model.named_modules()]
    add_lora(model, RANK_4, 0)
    assert torch.equal(logprobs(model), before)
    assert equal(base(model), weights)
    assert type(model) is kind  # the engine knows the class, and not peft's wrapper
    assert set(names) < {n for n, _ in model.named_modules()}
    assert not model.training
    # bfloat16 adapters would not notice small optimizer steps
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {p.dtype for p in adapters(model).values()} == {wide}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_every_linear_layer_but_the_head_gets_one(name: str, layers: set[str]) -> None:
    trainable = [n for n, p in adapted(name).named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in trainable)
    assert {n.split(".lora_")[0].split(".")[-1] for n in trainable} == layers
    per_layer = 4 if name == "gpt2" else 7  # gpt2 has two c_proj
    assert len(trainable) == 2 * 2 * per_layer  # two factors, two layers


def test_layers_can_be_chosen() -> None:
    model = adapted("llama", config=LoraSection(rank=3, targets=["q_proj", "down_proj"]))
    found = adapters(model)
    assert len(found) == 2 * 2 * 2
    assert {n.split(".lora_")[0].split(".")[-1] for n in found} == {"q_proj", "down_proj"}
    assert {min(p.shape) for p in found.values()} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_init(name: str) -> None:
    one, same, other = (adapters(adapted(name, seed=seed)) for seed in (1, 1, 2))
    assert equal(one, same)
    first = [n for n in one if "lora_A" in n]
    assert first and not any(torch.equal(one[n], other[n]) for n in first)
    assert all(one[n].std() > 0.01 for n in first)
    assert not any(one[n].any() for n in one if "lora_B" in n)
    model = tiny(name)
    state = torch.get_rng_state()
    add_lora(model, RANK_4, 9)
    assert torch.equal(torch.get_rng_state(), state)  # no one else's luck is touched


def test_they_add_alpha_over_rank_times_their_product() -> None:
    model = adapted("qwen3", config=LoraSection(rank=4, alpha=6.0))
    stir(model)
    merged = tiny("qwen3")
    named, factors = dict(merged.named_parameters()), adapters(model)
    with torch.no_grad():
        for name in factors:
            if ".lora_A." in name:
                product = factors[name.replace(".lora_A.", ".lora_B.")] @ factors[name]
                named[name.replace(".lora_A.default", "")].add_(6.0 / 4 * product)
    # products summed in another order: float64 keeps 15 digits of logits around 10
    torch.testing.assert_close(logprobs(model), logprobs(merged), rtol=0, atol=1e-10)
    assert (logprobs(model) - logprobs(tiny("qwen3"))).abs().max() > 0.1


# --- trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_adapters_and_nothing_else(name: str, checkpointing: bool) -> None:
    model = adapted(name)
    stir(model)
    weights, before = base(model), adapters(model)
    trainer = make_trainer(model, checkpointing, kl_coef=0.1)
    metrics = step(trainer)
    assert metrics["grad_norm"] > 1e-3
    assert equal(base(model), weights)
    assert not any(torch.equal(p, before[n]) for n, p in adapters(model).items())
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in parameter_name), parameter_name
    moments = trainer.state()["moments"]
    assert {key.partition("/")[2] for key in moments} == set(before)
    assert trainer.passes == 2 + checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(name)
        stir(model)
        step(make_trainer(model, checkpointing))
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for n, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[n], rtol=1e-9, atol=1e-12)


# --- off ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_with_adapters_off_it_is_the_base(name: str, dtype: torch.dtype) -> None:
    model, untouched = adapted(name, dtype), tiny(name, dtype)
    trainer = make_trainer(model, kl_coef=0.1)
    for _ in range(2):
        step(trainer)
    with_adapters = logprobs(model)
    with adapters_off(model):
        without = logprobs(model)
    assert torch.equal(without, logprobs(untouched))
    assert (with_adapters - without).abs().max() > 1e-3
    assert torch.equal(logprobs(model), with_adapters)


def test_adapters_are_on_again_whatever_happens() -> None:
    model = adapted("qwen3")
    stir(model)
    before = logprobs(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        assert not torch.equal(logprobs(model), before)
        raise ZeroDivisionError
    assert torch.equal(logprobs(model), before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    step(make_trainer(model))
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


def test_the_reference_of_a_trainer_is_the_base() -> None:
    """The KL of a LoRA run is against the policy that training began with."""
    model = adapted("qwen3")
    stir(model)
    trainer = make_trainer(model, kl_coef=0.1)
    made = groups(model)
    credited, _ = trainer.credit(made)
    untouched = tiny("qwen3")
    for one in [one for members in credited for one in members]:
        rollout = one.rollout
        pair = (rollout.prompt.token_ids, rollout.completion.token_ids)
        with torch.no_grad():
            expected = token_logprobs(untouched, [pair]).logprobs
        # rows are padded to the batch's longest, which rounds sums differently
        torch.testing.assert_close(one.reference, expected, rtol=0, atol=1e-12)
        now = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
        assert (now - expected).abs().max() > 0.1
    metrics = trainer.step(credited)
    assert metrics["kl"] > 0.01


# --- saved --------------------------------------------------------------------------------------


def saved(trainer: Trainer, folder: Path) -> Path:
    tokenizer = SimpleNamespace(save_pretrained=lambda path: None)
    return checkpoint.save(folder, 3, trainer, tokenizer, {"held_out_reward": None})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_goes_on_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    trainer = make_trainer(adapted(name, dtype))
    step(trainer)
    folder = saved(trainer, tmp_path)
    model = tiny(name, dtype)
    add_lora(model, RANK_4, seed=99, folder=folder)
    again = make_trainer(model)
    checkpoint.load(folder, again)
    assert equal(adapters(model), adapters(trainer.model))
    assert equal(base(model), base(trainer.model))
    assert torch.equal(logprobs(model), logprobs(trainer.model))
    assert list(again.parameters) == list(trainer.parameters)
    assert not model.training
    assert equal(again.state()["moments"], trainer.state()["moments"])
    assert step(again) == step(trainer)
    assert equal(adapters(model), adapters(trainer.model))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_an_adapter_as_others_know_it(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer = make_trainer(adapted(name, torch.float32, LoraSection(rank=4, alpha=6.0)))
    step(trainer)
    folder = saved(trainer, tmp_path)
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert "model.safetensors" not in files
    wrapped = PeftModel.from_pretrained(tiny(name, torch.float32), folder).eval()
    plain = tiny(name, torch.float32)
    plain.load_adapter(str(folder))
    expected = logprobs(trainer.model)
    assert (expected - logprobs(tiny(name, torch.float32))).abs().max() > 1e-3
    with torch.no_grad():
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        outputs = [m(input_ids=ids).logits for m in (trainer.model, wrapped, plain)]
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


# --- mistakes -----------------------------------------------------------------------------------


def mistake(model: PreTrainedModel, config: LoraSection, folder: Path | None = None) -> str:
    with pytest.raises(UserError) as raised:
        add_lora(model, config, 0, folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("targets", [["q_prj"], ["q_proj", "v_prj"], ["norm"], [""]])
def test_targets_that_are_no_layers(targets: list[str]) -> None:
    message = mistake(tiny("qwen3"), LoraSection(rank=2, targets=targets))
    assert message.startswith(f"lora.targets = {targets}: ")
    assert repr(targets[-1]) in message and "q_proj" in message.partition(": ")[2]


def test_without_peft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for folder in (None, tmp_path):
        message = mistake(tiny("llama"), LoraSection(rank=7), folder)
        assert message == "lora.rank = 7: needs the package peft; pip install 'reroll[peft]'"


@pytest.mark.parametrize("damage", ["cut", "no weights", "no settings", "of another rank"])
def test_a_damaged_adapter_names_its_folder(damage: str, tmp_path: Path) -> None:
    folder = saved(make_trainer(adapted("llama")), tmp_path)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "cut":
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "no weights":
        file.unlink()
    elif damage == "no settings":
        settings.unlink()
    else:
        settings.write_text(settings.read_text().replace('"r": 4', '"r": 8'))
    assert mistake(tiny("llama"), RANK_4, folder).startswith(f"{folder}: its adapters cannot be ")


@pytest.mark.parametrize("name", [*NAMES, "phi3", "gemma2", "opt", "qwen2_moe"])
def test_nothing_is_said_about_layers_of_any_kind(name: str) -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error", UserWarning)
        add_lora(tiny(name), RANK_4, 0)
