"""reroll: reinforcement learning with verifiable rewards on language models, made cheap."""

__version__ = "0.2.0"
