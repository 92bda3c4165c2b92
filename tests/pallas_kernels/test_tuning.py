"""Tuning configs: what doesn't fit a multiprocessor is refused before it is launched."""

import dataclasses
import json

import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import ForwardConfig, TuningKey

KEY = TuningKey(head_dim=128, density="sparse", scales=1)
FP8_BLOCK = {"operand_bytes": 1, "output_bytes": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": 3}, "stages=3 is not 2, 4 or 8"),
        ({"cluster": 3}, "cluster=3 is not 1 or 2"),
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
    assert tuning.launch_registers() == 168
    ForwardConfig(consumer_registers=232, producer_registers=40)
    ForwardConfig(consumer_registers=240, producer_registers=24)


def test_a_config_that_needs_too_much_shared_memory_is_refused():
    with pytest.raises(
        ValueError, match=r"stages=8 at head dim 128 needs .* bytes of shared memory, a block has 232448"
    ):
        tuning.check_fits(ForwardConfig(stages=8), head_dim=128, **FP8_BLOCK)
    tuning.check_fits(ForwardConfig(stages=4), head_dim=128, **FP8_BLOCK)


def test_candidates_fit_and_cover_both_cluster_sizes():
    found = tuning.candidates(head_dim=128, blocks_per_tile=2, **FP8_BLOCK)
    assert {(c.stages, c.cluster) for c in found} == {(2, 1), (4, 1), (2, 2), (4, 2)}
    assert all(c.cluster == 1 for c in tuning.candidates(head_dim=128, blocks_per_tile=3, **FP8_BLOCK))


def test_keys_tell_density_and_granularity_apart():
    key = tuning.tuning_key(head_dim=128, density=0.2, tokens_per_scale=256)
    assert key == KEY
    assert tuning.tuning_key(head_dim=128, density=1.0, tokens_per_scale=256).density == "dense"
    assert tuning.tuning_key(head_dim=128, density=0.2, tokens_per_scale=64).scales == 2
    assert tuning.tuning_key(head_dim=128, density=0.2, tokens_per_scale=192).scales == 2  # the middle block has both
    assert tuning.tuning_key(head_dim=128, density=0.2, tokens_per_scale=None).scales == 0


def test_a_key_nobody_measured_gets_a_safe_config():
    key = dataclasses.replace(KEY, density="nobody measured this")
    assert tuning.choose_config(key, blocks_per_tile=2, **FP8_BLOCK) == ForwardConfig(stages=4, cluster=1)
    wide = tuning.choose_config(key, operand_bytes=2, output_bytes=2, blocks_per_tile=2)
    assert wide == ForwardConfig(stages=2, cluster=1)


def test_the_tuned_table_is_used_and_survives_its_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    table = {KEY: ForwardConfig(stages=2, cluster=2)}
    tuning.write_tuned_table(table, measured_on="NVIDIA H200, jax 0.11.2", path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]
    assert json.loads(path.read_text())["measured_on"] == "NVIDIA H200, jax 0.11.2"
    monkeypatch.setattr(tuning, "TUNED_TABLE", path)
    tuning.tuned_table.cache_clear()
    try:
        assert tuning.tuned_table() == table
        assert tuning.choose_config(KEY, blocks_per_tile=2, **FP8_BLOCK) == table[KEY]
        # A cluster of two needs tiles of two blocks.
        assert tuning.choose_config(KEY, blocks_per_tile=3, **FP8_BLOCK).cluster == 1
    finally:
        tuning.tuned_table.cache_clear()


def test_every_shipped_config_fits():
    for key, config in tuning.tuned_table().items():
        tuning.check_fits(config, head_dim=key.head_dim, operand_bytes=1 if key.scales else 2, output_bytes=2)
