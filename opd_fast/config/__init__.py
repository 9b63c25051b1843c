"""What a run is: settings, their forms, and what they may not say. Nothing here imports torch."""

from opd_fast.config.schema import DETERMINISTIC as DETERMINISTIC
from opd_fast.config.schema import CheckpointConfig as CheckpointConfig
from opd_fast.config.schema import Config as Config
from opd_fast.config.schema import EngineConfig as EngineConfig
from opd_fast.config.schema import EvaluationConfig as EvaluationConfig
from opd_fast.config.schema import LoggingConfig as LoggingConfig
from opd_fast.config.schema import ModelConfig as ModelConfig
from opd_fast.config.schema import ObjectiveConfig as ObjectiveConfig
from opd_fast.config.schema import ParallelConfig as ParallelConfig
from opd_fast.config.schema import RewardModelsConfig as RewardModelsConfig
from opd_fast.config.schema import RLConfig as RLConfig
from opd_fast.config.schema import SamplerConfig as SamplerConfig
from opd_fast.config.schema import SFTConfig as SFTConfig
from opd_fast.config.schema import Solver as Solver
from opd_fast.config.schema import StudentConfig as StudentConfig
from opd_fast.config.schema import TeacherConfig as TeacherConfig
from opd_fast.config.schema import TrainConfig as TrainConfig
