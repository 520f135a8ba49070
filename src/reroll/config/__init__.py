"""The typed run configuration: TOML file, then `--section.key value` flags, then checks."""

from reroll.config.algo import (
    ALGORITHMS,
    GROUP_ADVANTAGES,
    AlgoSection,
    CorrectSection,
    CriticSection,
    LoraSection,
    TrainSection,
)
from reroll.config.load import Config, describe, differences, load_config, save_config, settings
from reroll.config.prefix import CollectSection, PrefixSection, SftSection
from reroll.config.prune import PruneSection
from reroll.config.reuse import ReuseSection, StoreSection
from reroll.config.schedule import ScheduleSection
from reroll.config.sections import (
    CheckpointSection,
    EngineSection,
    EvalSection,
    GraderSection,
    GradingSection,
    LogSection,
    ModelSection,
    RolloutSection,
    RunSection,
    Section,
    TaskSection,
)

__all__ = [
    "ALGORITHMS",
    "GROUP_ADVANTAGES",
    "AlgoSection",
    "CheckpointSection",
    "CollectSection",
    "Config",
    "CorrectSection",
    "CriticSection",
    "EngineSection",
    "EvalSection",
    "GraderSection",
    "GradingSection",
    "LogSection",
    "LoraSection",
    "ModelSection",
    "PrefixSection",
    "PruneSection",
    "ReuseSection",
    "RolloutSection",
    "RunSection",
    "ScheduleSection",
    "Section",
    "SftSection",
    "StoreSection",
    "TaskSection",
    "TrainSection",
    "describe",
    "differences",
    "load_config",
    "save_config",
    "settings",
]
