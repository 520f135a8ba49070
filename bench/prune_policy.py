"""The demo policy with rarer successes: its careful style is taught down to a small share."""

from bench.taught import taught
from recipes import demo_policy

CAREFUL = {"rare": 0.07, "scarce": 0.02}
"""share of careful replies, the only ones that are right more often than by luck"""
STEPS, SEED = 160, 77


def rare_policy(name: str) -> str:
    """The folder of the policy `rare` or `scarce`; made when it is not there."""
    careful = CAREFUL[name]
    rest = 1 - careful
    habit = {"guess": rest * 50 / 93, "quick": rest * 43 / 93, "steps": careful}
    return taught(name, lambda t: demo_policy.lessons(SEED, (5, 9), habit, t), STEPS, SEED)
