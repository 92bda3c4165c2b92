"""Configs: what is out of range or would hang a multiprocessor is refused before it is launched."""

import pytest

from pallas_kernels.sm90.config import ForwardConfig, launch_registers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": 3}, "stages=3 is not 2, 4 or 8"),
        ({"cluster": 3}, "cluster=3 is not 1 or 2"),
        ({"promote_every": 3}, "promote_every=3 is not 1, 2, 4 or 8; use 1"),
        ({"polynomial_columns": 24}, "polynomial_columns=24 is not 0, 16, 32 or 48; use 0"),
        ({"consumer_registers": 230}, "consumer_registers=230 is not a multiple of 8 from 24 to 256"),
        ({"producer_registers": 16}, "producer_registers=16 is not a multiple of 8 from 24 to 256"),
        # 240 twice and 40 pass ptxas and interpret mode, and wait for ever on a GPU.
        (
            {"producer_registers": 40},
            "are 520, more than the 504 of the launch, and would hang the GPU; use 240 and 24",
        ),
    ],
)
def test_a_wrong_config_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ForwardConfig(**change)


def test_the_register_budget_allows_what_the_message_recommends():
    assert launch_registers() == 168
    ForwardConfig(consumer_registers=232, producer_registers=40)
    ForwardConfig(consumer_registers=240, producer_registers=24)
