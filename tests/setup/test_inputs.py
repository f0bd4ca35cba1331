"""What is said of a configuration's inputs."""

from dataclasses import replace

from paths import CONFIGS

from kd_jax.config import EvalConfig
from kd_jax.config.command import load_config
from kd_jax.setup.inputs import describe_no_evaluation


def test_a_split_that_nothing_reads_is_told_with_the_flag_that_evaluates_it():
    config = load_config(CONFIGS / "8b_to_1b.py")
    flag = "--eval.path PATH evaluates on its split 'train[98%:]'"
    assert describe_no_evaluation(config).endswith(flag)
    evaluated = [{"path": "held_out.jsonl"}, {"fraction": 0.1}, {"split": None}]
    for fields in evaluated:
        other = replace(config, eval=replace(EvalConfig(split="train[98%:]"), **fields))
        assert describe_no_evaluation(other) is None
