"""fps-tune: what it tries, what it keeps, and that a config which hangs, fails or computes nonsense costs only itself."""

import json
import subprocess
import sys
import time

import pytest

from fps_jax.commands import tune
from fps_jax.tuning import autotune, autotune_run
from pallas_kernels.sm90 import tuned
from pallas_kernels.sm90.call_shape import CallShape
from pallas_kernels.sm90.config import ForwardConfig
from pallas_kernels.sm90.tuned import TunedEntry, TuningKey

SMALL = ["--grid", "7", "18", "8", "--heads", "1", "--density", "0.4"]  # of (7, 9, 4): 4 tiles
SPARSE, DENSE = (TuningKey(head_dim=128, density=d, scales=1) for d in ("sparse", "dense"))


@pytest.fixture(autouse=True)
def shipped(tmp_path_factory, monkeypatch):
    """An empty table in the shipped one's place, which a new table starts from."""
    path = tmp_path_factory.mktemp("shipped") / "tuned_sm90.json"
    tuned.write_tuned_table({}, path=path)
    monkeypatch.setattr(tuned, "TUNED_TABLE", path)
    return path


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of fps-tune."""
    with pytest.raises(SystemExit) as stop:
        tune.main([str(a) for a in argv])
    return stop.value.code, *capsys.readouterr()


def pretend(monkeypatch, **fates: object) -> None:
    """The sweep's processes are those of tuning_child, and configs are four: 2 or 4 stages, clusters of 1 or 2."""
    found = [ForwardConfig(stages=stages, cluster=cluster) for cluster in (1, 2) for stages in (2, 4)]
    monkeypatch.setattr(CallShape, "candidates", lambda _: found)
    monkeypatch.setattr(autotune_run, "CHILD", ("-m", "tests.fps_jax.tuning.tuning_child", json.dumps(fates)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "0", "4", "4"], "grid=(0, 4, 4) is not three positive whole numbers"),
        (["--grid", "1", "1", "1"], "grid=(1, 1, 1) has no tile of 128 stored tokens"),
        (["--heads", "0"], "heads=0 is not a positive whole number"),
        (["--head-dim", "96"], "head dim 96 is not 64 or 128"),
        (["--density", "0.9"], "is not 'sparse' to the tuned table; choose a lower density"),
        (["--density", "2"], "density=2.0 is not a number in (0, 1]"),
        (["--classes"], "classes and scales name no key"),
        (["--scales", "4"], "--scales"),
        (["--deadline", "0"], "deadline=0.0 is not in 1 to 3600 seconds"),
        (["--output", "no/such/folder/table.json"], "doesn't exist; make it first"),
        (["--output", "."], "is a folder; name a file"),
        (["--dry-run", "--output", "no/such/folder/table.json"], "doesn't exist; make it first"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_a_process_starts(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(autotune_run, "_start", None)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


def test_an_output_that_is_no_table_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(autotune_run, "_start", None)
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    code, _, err = run(capsys, "--output", path)
    assert (code, path.read_text()) == (2, '{"mine": 1}')
    assert f"tuned table '{path}' is broken" in err


def test_without_a_hopper_gpu_it_says_so(tmp_path, capsys):
    code, out, err = run(capsys, "--output", tmp_path / "t.json")
    assert (code, out) == (2, "")
    assert err == (
        "error: fps-tune needs an NVIDIA GPU of compute capability 9.0 (H100, H200), found cpu; "
        "--dry-run lists what it would measure there\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fate", "deadline", "words"),
    [("hang", 1, "no answer in 1 s"), ("crash", 60, "RuntimeError: no such instruction")],
)
def test_a_gpu_that_does_not_answer_is_one_line_too(fate, deadline, words, tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, device=fate)
    code, _, err = run(capsys, *SMALL, "--output", tmp_path / "t.json", "--deadline", deadline)
    assert (code, err) == (2, f"error: the GPU can't be used: {words}\n")


def test_a_dry_run_lists_every_config_and_touches_no_device():
    code = (
        "from fps_jax.commands.tune import main\n"
        "try: main(['--dry-run', '--output', 'mine.json'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends"  # a process that held the GPU's memory would leave the sweep none
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "grid 21 x 45 x 80, 40 heads of 128, tiles of (7, 9, 4)" in said
    tasks = autotune.tasks((21, 45, 80), heads=40)
    assert said.count("bytes of shared memory") == sum(len(t.candidates) for t in tasks)
    for task in tasks:
        for config in task.candidates:
            assert f"{autotune.brief(config):40} {task.call.shared_memory_bytes(config):9,} bytes" in said
    assert said.rstrip().endswith("mine.json")


def test_it_writes_the_fastest_right_config_of_each_key(tmp_path, capsys, monkeypatch):
    pretend(
        monkeypatch,
        **{"4x1": 0.5, "2x1": 0.4, "4x2": 0.25, "2x2": "wrong", "dense/1 4x2": "crash", "dense/1 2x2": 0.125},
    )
    path = tmp_path / "tuned.json"
    kept = TuningKey(head_dim=64, density="sparse", scales=0)
    again = TunedEntry(config=ForwardConfig(), seconds=9.0, tflops=9.0, measured_on={"gpu": "an older one"})
    tuned.write_tuned_table({kept: again, SPARSE: again}, path=path)
    code, out, err = run(capsys, *SMALL, "--scales", 1, "--output", path)
    assert code == 0
    table = tuned.read_tuned_table(path)
    assert table[kept] == again
    assert {key: (e.config, e.seconds, e.tflops) for key, e in table.items() if key != kept} == {
        SPARSE: (ForwardConfig(stages=4, cluster=2), 0.25, 400.0),
        DENSE: (ForwardConfig(stages=2, cluster=2), 0.125, 800.0),  # in a second process, after the one that failed
    }
    # The second process of a key is told the best of the first.
    assert table[SPARSE].measured_on == {"gpu": "Pretended H200", "grid": [7, 18, 8], "best_before": 0.4}
    assert "WRONG: relative L2 nan from the safe config's output" in err
    assert "stages=4 cluster=2             failed: RuntimeError: no such instruction" in err
    assert "[  8/8]" in err
    lines = {line[:16].strip(): line[16:].split() for line in out.splitlines()}
    assert lines["sparse, 1 scale"] == ["stages=4", "cluster=2", "250.000", "400", "1.60", "3", "1"]
    assert lines["dense, 1 scale"] == ["stages=2", "cluster=2", "125.000", "800", "3.20", "3", "1"]
    assert f"wrote {path}" in out
    assert f"FPS_TUNED_TABLE={path}" in out


def test_the_default_output_is_the_table_that_attention_reads_and_starts_with_what_is_shipped(
    tmp_path, capsys, monkeypatch, shipped
):
    pretend(monkeypatch)
    entry = TunedEntry(config=ForwardConfig(), seconds=9.0, tflops=9.0, measured_on={"gpu": "NVIDIA H200"})
    tuned.write_tuned_table({SPARSE: entry}, path=shipped)
    path = tmp_path / "named.json"
    monkeypatch.setenv("FPS_TUNED_TABLE", str(path))  # not there yet
    code, out, _ = run(capsys, *SMALL, "--scales", 1, "--classes", "dense")
    assert code == 0
    assert set(tuned.tuned_table()) == {SPARSE, DENSE}
    assert set(tuned.read_tuned_table(shipped)) == {SPARSE}
    assert "is set" not in out


def test_a_hang_ends_and_nothing_more_of_that_cluster_size_is_tried(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, **{"sparse/1 2x1": "hang", "4x2": 0.25, "2x2": 0.5})
    start = time.monotonic()
    code, out, err = run(capsys, *SMALL, "--scales", 1, "--output", tmp_path / "t.json", "--deadline", 5)
    assert time.monotonic() - start < 60
    assert code == 0
    table = tuned.read_tuned_table(tmp_path / "t.json")
    assert {key: e.config for key, e in table.items()} == dict.fromkeys(
        (SPARSE, DENSE), ForwardConfig(stages=4, cluster=2)
    )
    assert "stages=2 cluster=1             HUNG: no answer in 5 s" in err
    # Of the dense key, two configs with cluster=1.
    assert err.count("not run: cluster=1 hung") == 2
    assert [line.split()[-2:] for line in out.splitlines()[1:3]] == [["3", "1"], ["2", "2"]]


def test_a_key_whose_process_fails_before_any_config_is_given_up_alone(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, **{"sparse/1 start": "crash"})
    code, _, err = run(capsys, *SMALL, "--scales", 1, "--output", tmp_path / "t.json")
    assert code == 2
    assert set(tuned.read_tuned_table(tmp_path / "t.json")) == {DENSE}
    assert err.count("not run: the process didn't come to it (RuntimeError: no such instruction)") == 4
    assert err.rstrip().endswith(
        "error: no config measured for sparse, 1 scale: see above; what the table had for them it still has"
    )


def test_the_real_processes_measure_real_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(autotune_run, "CHILD", ("-m", "tests.fps_jax.tuning.tuning_child", "interpret"))
    monkeypatch.setenv("NPROC", "12")  # warpgroups wait for each other in XLA's thread pool
    monkeypatch.setattr(CallShape, "candidates", lambda _: [ForwardConfig(), ForwardConfig(stages=2)])
    arguments = ["--grid", 2, 8, 16, "--heads", 1, "--classes", "dense", "--scales", 1, "--output", tmp_path / "t.json"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    ((key, entry),) = tuned.read_tuned_table(tmp_path / "t.json").items()
    assert (key, entry.config, entry.seconds) == (DENSE, ForwardConfig(), 1.0)
    assert entry.measured_on["heads"] == 1
    assert out.splitlines()[1].split()[-2:] == ["2", "0"]
