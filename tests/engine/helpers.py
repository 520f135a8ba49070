"""Run requests through an engine and gather what comes out."""

from reroll.engine.base import Finished, Probed
from reroll.engine.local import LocalEngine
from reroll.types import Completion, Request


def finish(engine: LocalEngine, requests: list[Request]) -> dict[int, Completion]:
    """Submit, step to the end with integrity checks, give completions by request id."""
    done, _ = finish_with_probes(engine, requests)
    return done


def finish_with_probes(
    engine: LocalEngine, requests: list[Request]
) -> tuple[dict[int, Completion], list[Probed]]:
    """The same, with the probe events."""
    for request in requests:
        engine.submit(request)
    done: dict[int, Completion] = {}
    probes: list[Probed] = []
    while len(done) < len(requests):
        for event in engine.step():
            if isinstance(event, Finished):
                assert event.completion.request_id not in done
                done[event.completion.request_id] = event.completion
            else:
                probes.append(event)
        engine.check()
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    return done, probes


def tokens(done: dict[int, Completion]) -> dict[int, list[int]]:
    """Token ids by request id."""
    return {index: completion.token_ids for index, completion in done.items()}
