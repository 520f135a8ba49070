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
