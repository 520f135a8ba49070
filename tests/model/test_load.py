"""Models are loaded as asked for, or refused with a line that names the setting."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reroll.config import ModelSection
from reroll.errors import UserError
from reroll.model.load import (
    load_model,
    load_tokenizer,
    pick_autocast,
    pick_device,
    stop_ids,
    switch_off_dropout,
)
from tests.tiny import SERVED, VOCABULARY


@pytest.fixture
def policy(project_folder):
    return project_folder / "policy"


@pytest.fixture
def broken(policy, tmp_path):
    """A copy of the policy to break."""
    return shutil.copytree(policy, tmp_path / "broken")


def section(path, **changes) -> ModelSection:
    return ModelSection(path=str(path), **{"device": "cpu"} | changes)


# --- what works ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_loads_in_the_dtype_asked_for(policy, dtype):
    model = load_model(section(policy, dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training and model.device.type == "cpu"
    saved = AutoModelForCausalLM.from_pretrained(policy)
    for got, expected in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(got, expected.to(got.dtype))


def test_a_folder_stands_in_for_the_path(policy):
    model = load_model(section("no/such/model"), policy)
    assert model.config.model_type == "qwen3"


def test_loads_the_tokenizer(policy):
    tokenizer = load_tokenizer(section(policy))
    assert tokenizer.decode(tokenizer.encode("2 + 3 =")) == "2 + 3 ="


# --- devices ------------------------------------------------------------------------------------


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    "name, devices, reason",
    [
        ("cuda:7", 2, r"not there \(2 CUDA devices found\); use auto or cpu"),
        ("cuda:2", 2, r"not there \(2 CUDA devices found\)"),
        ("cuda", 0, r"not there \(0 CUDA devices found\)"),
        ("mps", 2, "reroll runs on cpu and cuda"),
        ("meta", 2, "reroll runs on cpu and cuda"),
        ("gpu", 2, "not a device; use auto, cpu, cuda or cuda:N"),
        ("cuda:one", 2, "not a device"),
        ("", 2, "not a device"),
    ],
)
def test_devices_that_are_not_there(name, devices, reason, monkeypatch, policy):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(UserError, match=rf"^model\.device = {name!r}: {reason}"):
        load_model(section(policy, device=name))


def test_pick_autocast(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_autocast("bfloat16", cpu) == torch.bfloat16
    assert pick_autocast("auto", cpu) is None
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able: able)
        assert pick_autocast("auto", cuda) == (torch.bfloat16 if able else None)
        assert pick_autocast("off", cuda) is None


# --- what does not work -------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_is_not_there(load, tmp_path):
    for path in (tmp_path / "missing", "nobody/no-such-model"):
        with pytest.raises(UserError, match=rf"^model\.path = '{path}': no such folder"):
            load(section(path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_folder_that_is_no_model(load, tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    with pytest.raises(UserError, match=rf"^model\.path = '{tmp_path}': cannot be loaded: ."):
        load(section(tmp_path))


def test_a_model_that_is_no_language_model(broken):
    (broken / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=rf"^model\.path = '{broken}': cannot be loaded: ."):
        load_model(section(broken))


def test_an_architecture_that_nobody_knows(broken):
    (broken / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(UserError, match=rf"^model\.path = '{broken}': cannot be loaded: ."):
        load_model(section(broken))


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_truncated_weights(broken, size):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"^model\.path = '{broken}': cannot be loaded: ."):
        load_model(section(broken))


def test_weights_that_are_not_safetensors(broken):
    model = AutoModelForCausalLM.from_pretrained(broken)
    (broken / "model.safetensors").unlink()
    torch.save(model.state_dict(), broken / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"^model\.path = '{broken}': cannot be loaded: ."):
        load_model(section(broken))


def test_a_broken_checkpoint_is_named_itself(policy, broken):
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match=rf"'{broken}': cannot be loaded"):
        load_model(section(policy), broken)


def test_a_tokenizer_without_end_of_text(broken):
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"its tokenizer has no end-of-text token to stop at"):
        load_tokenizer(section(broken))


# --- stop ids and dropout -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "of_model, of_tokenizer, expected",
    [(7, 7, (7,)), (None, 7, (7,)), ([9, 8], 7, (7, 8, 9)), ([7, 8], 7, (7, 8)), (0, 5, (0, 5))],
)
def test_stop_ids(of_model, of_tokenizer, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=of_model))
    assert stop_ids(model, SimpleNamespace(eos_token_id=of_tokenizer)) == expected


def test_stop_ids_of_a_model_without_generation_configuration():
    model = SimpleNamespace(generation_config=None)
    assert stop_ids(model, SimpleNamespace(eos_token_id=3)) == (3,)


RANDOM = ("drop", "jitter")


def with_noise(name: str):
    """A tiny model with every dropout, layer drop and router jitter of its kind at one half."""
    kind, settings = SERVED[name]
    known = AutoConfig.for_model(kind, **settings).to_dict()
    rates = {
        key: 0.5
        for key, value in known.items()
        if isinstance(value, float) and any(word in key for word in RANDOM)
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **rates))


@pytest.mark.parametrize("name", SERVED)
def test_dropout_is_switched_off(name):
    model = with_noise(name)
    tokens = torch.arange(2 * 20).view(2, 20) % VOCABULARY
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        noisy = model.train()(input_ids=tokens).logits
        switch_off_dropout(model)
        got = model(input_ids=tokens).logits
        again = model.eval()(input_ids=tokens).logits
    assert not torch.allclose(noisy, expected, atol=1e-3)
    # float32: attention takes another kernel in training, 1e-6 apart
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(again, expected)


def test_load_model_switches_dropout_off(tmp_path):
    with_noise("gpt2").save_pretrained(tmp_path)
    model = load_model(section(tmp_path))
    assert model.config.resid_pdrop == 0.5
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates and set(rates) == {0.0}
