"""The configuration of a run: typed, frozen and validated. Needs no jax."""

from kd_jax.config.data import DataConfig, EvalConfig
from kd_jax.config.errors import UserError
from kd_jax.config.loss import LossConfig
from kd_jax.config.on_policy import OnPolicyConfig
from kd_jax.config.run import (
    CheckpointConfig,
    Config,
    DistributedConfig,
    HiddenConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    Remat,
    StudentConfig,
)
from kd_jax.config.teacher import Dtype, TeacherConfig
