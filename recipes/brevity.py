"""An example of a user's own grader: shorter replies earn a little more."""


def score(prompt: str, completion: str, answer: str | None, **columns: object) -> float:
    """1 for an empty reply, falling to 0 at 2,000 characters."""
    return max(0.0, 1.0 - len(completion) / 2000)
