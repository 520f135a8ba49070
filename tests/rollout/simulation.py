"""Collector and schedules on a virtual clock, with lengths that a test states."""

from collections.abc import Callable, Sequence

from reroll.engine.clock import Linear
from reroll.engine.simulated import SimulatedEngine
from reroll.rollout.buffer import Buffer
from reroll.rollout.collect import Collector
from reroll.rollout.collected import Collected, CollectSpec
from reroll.rollout.decisions import Decisions, Graded
from reroll.rollout.policies import Schedule
from reroll.types import Prompt, Purpose, Request, Rollout, Sampling

CAP = 1 << 30


class NoGraders:
    """Nothing is graded: the rewards are known."""

    pending = 0

    def submit(self, job: object) -> None:
        raise AssertionError("nothing is to be graded")

    def poll(self, wait: bool = False) -> list[object]:
        return []


class Simulation:
    """A run of collects without training. length: of a request whose prompt is `(row,)`."""

    def __init__(
        self,
        schedule: Schedule,
        length: Callable[[Request], int],
        *,
        batch: int,
        samples: int = 1,
        slots: int,
        b0: float,
        prompts: int = 1 << 40,
        apart: bool = False,
    ) -> None:
        self.engine = SimulatedEngine(length, Linear(1.0, 1 / b0), slots=slots)
        self.buffer = Buffer(batch, 1 if apart else samples, slots, patience=schedule.patience)
        spec = CollectSpec(Purpose.TRAIN, 0, samples, Sampling(CAP), apart=apart)
        self.collector = Collector(
            self.engine, NoGraders(), lambda ids: "", self.source, spec, schedule, self.buffer,
            Decisions(grade=lambda rollout: Graded(0.0, {})),
        )  # fmt: skip
        self.prompts = prompts
        self.batches: list[Collected] = []
        self.times: list[float] = []

    def source(self, start: int, count: int) -> tuple[list[Prompt], list[int]]:
        """A prompt for each place, up to the last one."""
        places = range(start, min(start + count, self.prompts))
        return [Prompt(i, "", (i,)) for i in places], [0 for _ in places]

    def run(self, updates: int) -> "Simulation":
        """So many batches, each followed by an update of the policy."""
        for _ in range(updates):
            self.batches.append(self.collector.next())
            self.times.append(self.engine.clock)
            keep = bool(self.buffer.running)
            self.engine.load_weights(self.engine.policy_version + 1, keep=keep)
        return self

    def trained(self) -> list[list[Rollout]]:
        """Rollouts of each batch, in its order."""
        return [[r for g in one.trained() for r in g.rollouts] for one in self.batches]


def cycle(lengths: Sequence[int]) -> Callable[[Request], int]:
    """The length of a request is that of its prompt's place, round and round."""
    return lambda request: lengths[request.prompt_ids[0] % len(lengths)]
