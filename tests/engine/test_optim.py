"""Learning rates over the steps."""

import pytest
from pydantic import ValidationError

from jpo_ray.config_training import SFTConfig
from jpo_ray.engine.optim import learning_rate, warmup_steps


def test_a_warm_up_is_a_number_of_steps_or_a_share_of_them() -> None:
    by_share, by_steps = SFTConfig(warmup_steps=0.1), SFTConfig(warmup_steps=11)
    assert [warmup_steps(config, 105) for config in (by_share, by_steps)] == [
        11,
        11,
    ]  # rounded up, as transformers does
    rates = [[learning_rate(config, step, 105) for step in range(105)] for config in (by_share, by_steps)]
    assert rates[0] == rates[1]
    assert rates[0][0] == 0
    assert rates[0][11] == by_share.learning_rate == max(rates[0])
    assert warmup_steps(SFTConfig(warmup_steps=0), 105) == 0


def test_whole_numbers_stay_whole_and_others_are_refused() -> None:
    assert repr(SFTConfig(warmup_steps=100.0).warmup_steps) == "100"
    with pytest.raises(ValidationError, match="whole number of steps, or below 1 a share"):
        SFTConfig(warmup_steps=1.5)
