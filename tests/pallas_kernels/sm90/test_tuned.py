"""The tuned table: its file, its errors, and the config that a call gets."""

import dataclasses
import json

import pytest

from pallas_kernels.sm90 import tuned
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import TunedEntry, TuningKey

KEY = TuningKey(head_dim=128, density="sparse", scales=1)
CALL = CallShape(head_dim=128, dtype="bfloat16", tile_size=256, tokens_per_scale=256, table_density=0.2)


def test_keys_tell_density_and_granularity_apart():
    def key(**change) -> TuningKey:
        return TuningKey.of(dataclasses.replace(CALL, **change))

    assert key() == KEY
    assert key(table_density=1.0).density == "dense"
    assert key(tokens_per_scale=64).scales == 2
    assert key(tokens_per_scale=None).scales == 0


def test_a_key_nobody_measured_gets_a_safe_config(tmp_path, monkeypatch):
    tuned.write_tuned_table({}, path=tmp_path / "empty.json")
    monkeypatch.setenv("FPS_TUNED_TABLE", str(tmp_path / "empty.json"))
    assert tuned.choose_config(CALL) == ForwardConfig(stages=4, cluster=1)
    wide = dataclasses.replace(CALL, tokens_per_scale=None)
    assert tuned.choose_config(wide) == ForwardConfig(stages=2, cluster=1)


def entry(seconds: float = 0.1, tflops: float = 1000.0, gpu: str = "NVIDIA H200", **config) -> TunedEntry:
    return TunedEntry(
        config=ForwardConfig(**config), seconds=seconds, tflops=tflops, measured_on={"gpu": gpu, "grid": [21, 45, 80]}
    )


def test_the_tuned_table_is_used_and_survives_its_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    table = {KEY: entry(stages=2, cluster=2), dataclasses.replace(KEY, scales=2): entry(tflops=900, gpu="NVIDIA H100")}
    tuned.write_tuned_table(table, path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]
    assert tuned.read_tuned_table(path) == table
    monkeypatch.setenv("FPS_TUNED_TABLE", str(path))
    assert tuned.table_path() == path
    assert tuned.tuned_entries() == table
    assert tuned.tuned_table() == {key: e.config for key, e in table.items()}
    assert tuned.choose_config(CALL) == table[KEY].config
    # A cluster of two needs tiles of two blocks.
    assert tuned.choose_config(dataclasses.replace(CALL, tile_size=384)).cluster == 1
    # Nor are configs tuned with V's scales in groups, with which some spill.
    assert tuned.choose_config(dataclasses.replace(CALL, value_groups=True)) == ForwardConfig()
    # What this process writes, it reads.
    tuned.write_tuned_table({}, path=path)
    assert tuned.tuned_table() == {}


def test_without_the_variable_the_package_has_its_own_table(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("FPS_TUNED_TABLE", raising=False)
        if value is not None:
            monkeypatch.setenv("FPS_TUNED_TABLE", value)
        assert tuned.table_path() == tuned.TUNED_TABLE


def _damaged(**changes) -> str:
    record = {"key": dataclasses.asdict(KEY), **dataclasses.asdict(entry()), **changes}
    return json.dumps({"version": 1, "entries": [{k: v for k, v in record.items() if v is not None}]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "doesn't exist; run fps-tune to write it, or unset FPS_TUNED_TABLE"),
        ("{", "is broken: Expecting property name"),
        ("[]", "is broken: list indices"),
        ("{}", "is broken: it has no 'version'"),
        ('{"version": 2, "entries": []}', "is broken: version=2 is not 1"),
        (_damaged(seconds=None), "is broken: it has no 'seconds'"),
        (_damaged(seconds=0), "is broken: seconds=0 is not a positive number"),
        (_damaged(tflops="many"), "is broken: tflops='many' is not a positive number"),
        (_damaged(measured_on={}), "is broken: measured_on={} doesn't name the 'gpu'"),
        (_damaged(config={"stages": 3}), "is broken: stages=3 is not 2, 4 or 8"),
        (_damaged(config={"speed": 3}), "is broken: .* unexpected keyword argument 'speed'"),
    ],
)
def test_a_missing_or_broken_table_is_an_error_that_names_the_file(content, words, tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("FPS_TUNED_TABLE", str(path))
    with pytest.raises((FileNotFoundError, ValueError), match=words) as error:
        tuned.choose_config(CALL)
    assert str(path) in str(error.value)
    assert "FPS_TUNED_TABLE" in str(error.value)


def test_a_table_that_is_a_folder_is_an_error_too(tmp_path):
    with pytest.raises(OSError, match=f"tuned table '{tmp_path}' can't be read: Is a directory; unset FPS_TUNED_TABLE"):
        tuned.read_tuned_table(tmp_path)
    with pytest.raises(OSError, match=f"can't write '{tmp_path}': "):
        tuned.write_tuned_table({KEY: entry()}, path=tmp_path)
    assert [p for p in tmp_path.parent.iterdir() if p.suffix == ".part"] == []


def test_the_fastest_right_config_of_each_key_is_kept():
    def result(stages: int, seconds, ok: bool = True, key: TuningKey = KEY) -> dict:
        return {
            "key": dataclasses.asdict(key),
            "config": dataclasses.asdict(ForwardConfig(stages=stages)),
            "ok": ok,
            "seconds": seconds,
            "tflops": seconds if isinstance(seconds, str) else 100 / seconds,
            "measured_on": {"gpu": "NVIDIA H200"},
        }

    other = dataclasses.replace(KEY, density="dense")
    results = [
        result(4, 0.3),
        result(2, 0.2),
        result(8, 0.1, ok=False),
        result(8, "not measured"),
        result(4, 0.5, key=other),
    ]
    hung = {"config": dataclasses.asdict(ForwardConfig()), "ok": False, "failed": "HUNG"}
    best = tuned.fastest([*results, hung])
    assert {key: (e.config.stages, e.seconds, e.tflops) for key, e in best.items()} == {
        KEY: (2, 0.2, 500.0),
        other: (4, 0.5, 200.0),
    }


def test_medians_count_and_of_configs_that_are_alike_the_simplest():
    def result(seconds: float, **config) -> dict:
        return {
            "key": dataclasses.asdict(KEY), "config": dataclasses.asdict(ForwardConfig(**config)), "ok": True,
            "seconds": seconds, "tflops": 1.0, "measured_on": {"gpu": "NVIDIA H200"},
        }  # fmt: skip

    lucky_once = [result(s, stages=2) for s in (0.5, 1.2, 1.3)]
    alike = [result(0.998, cluster=2, take_turns=True), result(1.0, cluster=2), result(1.02)]
    [best] = tuned.fastest([*lucky_once, *alike]).values()
    assert (best.config, best.seconds) == (ForwardConfig(cluster=2), 1.0)


def test_every_shipped_config_fits():
    for key, config in tuned.tuned_table().items():
        call = dataclasses.replace(CALL, head_dim=key.head_dim, tokens_per_scale=256 if key.scales else None)
        call.check_fits(config)
