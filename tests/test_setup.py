import torch

from reroll.setup import _extractor, prepare
from tests.project import Project


def test_the_parts_of_a_run(project: Project) -> None:
    config = project.config(engine__slots=3, algo__kl_coef=0.1, rollout__max_tokens=9)
    with prepare(config, None, None) as parts:
        assert (len(parts.task.train), len(parts.task.held_out)) == (10, 4)
        longest = max(len(p.token_ids) for p in [*parts.task.train, *parts.task.held_out])
        assert parts.engine.cache.slots == 3
        assert parts.engine.cache.capacity == longest + 9
        assert parts.engine.runner.model is parts.trainer.model is parts.model
        assert parts.sampling.max_tokens == 9
        assert parts.sampling.stop_ids == (parts.tokenizer.eos_token_id,)
        assert parts.decode([*parts.tokenizer.encode("12 + x"), 0]) == "12 + x"
        reference = parts.trainer.reference
        assert reference is not None
        assert reference is not parts.model
        for ours, theirs in zip(parts.model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert not theirs.requires_grad
        assert any("10 training and 4 held-out problems" in note for note in parts.notes)
        assert any(f"{parts.model.num_parameters():,} parameters" in note for note in parts.notes)
        graders = parts.graders._processes
        assert graders
    assert not graders  # ended with the block


def test_without_kl_there_is_no_reference(project: Project) -> None:
    with prepare(project.config(), None, None) as parts:
        assert parts.trainer.reference is None
        assert parts.trainer.critic is None
        assert len(parts.trainer.parameters) == len(list(parts.model.parameters()))
        assert parts.trainer.passes == 3


def test_adapters_and_their_base_are_one_module(project: Project) -> None:
    config = project.config(lora__rank=3, lora__alpha=6, run__seed=5, algo__kl_coef=0.1)
    with prepare(config, None, None) as parts:
        assert parts.trainer.reference is parts.trainer.model is parts.engine.runner.model
        names = [n for n, p in parts.model.named_parameters() if p.requires_grad]
        assert list(parts.trainer.parameters) == names
        assert len(names) == 2 * 2 * 7  # two factors, two layers
        assert all("lora_" in name for name in names)
        assert parts.trainer.passes == 2
        first = {n: p.clone() for n, p in parts.trainer.parameters.items()}
    for seed, same in ((5, True), (6, False)):
        with prepare(project.config(lora__rank=3, run__seed=seed), None, None) as parts:
            assert parts.trainer.reference is None
            begun = [n for n, p in parts.trainer.parameters.items() if torch.equal(p, first[n])]
        # the second factor is zero for any seed
        assert len(begun) == (len(names) if same else len(names) / 2)


def test_a_critic_where_the_advantage_wants_one(project: Project) -> None:
    for trunk in ("own", "shared"):
        config = project.config(algo__name="ppo", critic__trunk=trunk, critic__learning_rate=0.5)
        with prepare(config, None, None) as parts:
            critic = parts.trainer.critic
            assert critic is not None
            assert (critic.trunk is None) == (trunk == "shared")
            assert critic.head.weight.shape == (1, 32)
            assert not critic.head.weight.any()
            assert critic.optimizer.param_groups[0]["lr"] == 0.5
            # the policy's own optimizer leaves the critic alone
            ours = {id(p) for p in parts.trainer.parameters.values()}
            assert not ours & {id(p) for p in critic.parameters()}
            if critic.trunk is not None:
                for mine, policys in zip(
                    critic.trunk.parameters(), parts.model.base_model.parameters(), strict=True
                ):
                    assert torch.equal(mine, policys)


def test_the_answer_that_votes_count() -> None:
    numbers = _extractor(r"(-?\d+)")
    assert numbers("first 3, then -14.") == "-14"
    assert numbers("none") is None
    optional = _extractor(r"so (-?\d+)( apples)?")
    assert optional("so 3 apples") == "3"
    assert _extractor(r"(?:a(\d)|b)")("b") is None
    plain = _extractor("")
    assert plain("some work\n  the end  \n") == "the end"
    assert plain("<answer> 1 </answer> no: <answer>\n2</answer> so") == "2"
    assert plain(" \n ") is None
