"""Reward shaping: what an algorithm takes off a graded reward before it becomes credit."""


def soft_overlong(length: int, limit: int, buffer: int) -> float:
    """DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13: 0 down to -1.

    0 up to limit - buffer tokens, then falling linearly to -1 at the limit. buffer = 0: none.
    """
    if buffer == 0:
        return 0.0
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))
