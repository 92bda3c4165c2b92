"""Two processes as one run (gloo, on this machine): the numbers of one process, and how they end together.

A run of two processes is asked to stop, and one process goes on from there. Another is begun by one process; two go on, until one
of them is killed.
"""

import dataclasses
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fps_jax.attention.schedule import FPSSchedule, Regime
from fps_jax.checkpoints.runs import read_run
from fps_jax.errors import parse
from fps_train import hosts, loop
from fps_train.commands.train import Train
from fps_train.config import CheckpointOptions, LoraOptions, TrainConfig
from fps_train.host_options import HostOptions
from fps_train.loop import train
from fps_train.metrics import read_metrics
from tests.fps_train.models import CONFIG
from tests.fps_train.one_of_several import JOINED, state_hash, tell
from tests.fps_train.sample_data import write_data
from tests.fps_train.several import PATIENCE, ROOT, Several, own_lines, steps

LOST = "error: another process of this run ended or can't be reached"


def validation(run: pathlib.Path, what: str = "raw") -> dict[int, dict[str, float]]:
    lines = [line for line in read_metrics(pathlib.Path(run) / "metrics.jsonl") if "validation" in line]
    return {line["step"]: line["validation"][what] for line in lines}


@pytest.fixture
def shared(options, tmp_path):
    """A long run on four devices."""
    data = write_data(
        tmp_path / "samples", {"64x64x5": 12}, text_len=CONFIG.text_len, text_dim=CONFIG.text_dim, prompts=True
    )
    return dataclasses.replace(
        options, data=str(data), mesh="fsdp=4", batch_size=4, accumulate=1, attention="dense", schedule=None, steps=100_000,
        validation=dataclasses.replace(options.validation, every=2, samples=4),
        checkpoint=CheckpointOptions(every=100_000, keep=3, best=0),
    )  # fmt: skip


def words(options, folder, *more: str) -> list[str]:
    options.save(folder / "config.toml")
    return ["--config", str(folder / "config.toml"), *more]


def weights(options: TrainConfig, folder: pathlib.Path) -> TrainConfig:
    """All weights trained, over both processes; each has all heads, and two microbatches a step."""
    return dataclasses.replace(options, mesh="fsdp=2,tensor=2", accumulate=2)


def adapters(options: TrainConfig, folder: pathlib.Path) -> TrainConfig:
    """FPSAttention in one regime with a teacher, adapters trained, and each sample's tokens over both processes."""
    schedule = FPSSchedule(tile=(1, 2, 4), regimes=(Regime(until=1.0, scales_per_tile=1, window=(2, 1, 1)),))
    schedule.save(folder / "one.json")
    return dataclasses.replace(
        options, attention="fps", schedule=str(folder / "one.json"), mesh="context=4", lora=LoraOptions(rank=2),
        teacher_weight=0.5,
    )  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("change", "rows", "bar", "asked", "killed"),
    # Rounded to FP8, what differs in a last bit may differ by a step of e4m3
    [(weights, "2", 1e-6, (1,), 1), (adapters, "4", 1e-4, (0, 1), 0)],
    ids=["all weights, fsdp, tensor, accumulation", "adapters, FPSAttention, context"],
)
def test_two_processes_are_one_run_whatever_ends_them(shared, tmp_path, monkeypatch, change, rows, bar, asked, killed):
    """Losses, norms and validation are one process's (gloo sums in another order), states are restored bit for bit.

    asked: which of two get a SIGTERM; under Slurm it is all. killed: which one; process 0 holds what tells the others of a death.
    """
    shared = change(shared, tmp_path)
    told: list[tuple[str, int, str]] = []
    tell(monkeypatch.setattr, lambda *words: told.append(words))

    # One process, three steps.
    alone = dataclasses.replace(shared, output=str(tmp_path / "alone"), steps=3)
    train(alone, show=False)
    ((_, saved, saved_hash),) = [words for words in told if words[0] == "saved"]

    # Two processes from the start; asked to stop.
    mine = words(shared, tmp_path)
    with Several(tmp_path / "first", mine, mine) as two:
        two.until_step(tmp_path / "run", 4)
        for number in asked:
            two.processes[number].send_signal(signal.SIGTERM)
        assert two.wait() == [0, 0], two.said()
        lead, other = two.said()
        first = two.told()
    (stopped,) = read_run(tmp_path / "run").steps()
    assert f"stopped by signal 15 after step {stopped}, which is saved; --resume goes on from there" in lead
    assert other.endswith(JOINED)  # from there on process 0 speaks for all
    assert first["read", 0] == {rows}  # of a microbatch of four
    together, one = steps(tmp_path / "run"), steps(tmp_path / "alone")
    assert list(together) == list(range(1, stopped + 1))
    for step in (1, 2, 3):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(together[step][name], one[step][name], rtol=bar, err_msg=name)
    for step in (0, 2):
        got, want = validation(tmp_path / "run")[step]["mean"], validation(tmp_path / "alone")[step]["mean"]
        np.testing.assert_allclose(got, want, rtol=bar)

    # One process goes on from what two saved, on another mesh.
    told.clear()
    train(dataclasses.replace(shared, steps=stopped + 1, mesh="data=2,fsdp=2"), resume=True, show=False)
    assert [words for words in told if words[0] == "restored"] == [("restored", stopped, *first["saved", stopped])]
    # As do sampling and conversion, which read a run in their own way.
    assert {state_hash(read_run(tmp_path / "run").trained("ema", stopped))} == first["average", stopped]

    # Two go on from what one saved, until one of them is killed.
    go_on = words(dataclasses.replace(alone, steps=100_000), tmp_path, "--resume")
    with Several(tmp_path / "second", go_on, go_on) as two:
        two.until_step(tmp_path / "alone", stopped + 1)
        two.processes[killed].kill()
        began = time.monotonic()
        status = two.processes[1 - killed].wait(60)
        assert time.monotonic() - began <= 30
        assert status not in (0, None)
        left = two.said()[1 - killed]
        assert two.told()["restored", saved] == {saved_hash}
    assert left.splitlines()[-1].startswith(LOST)
    assert len(re.findall("^error", left, re.MULTILINE)) == 1, left
    assert "stack trace" not in left
    # The same samples in both runs, whoever took them.
    for step in range(4, stopped + 2):
        got, want = steps(tmp_path / "alone")[step]["loss"], steps(tmp_path / "run")[step]["loss"]
        np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.multiprocess
def test_processes_that_slurm_started_find_each_other_and_process_0_may_be_asked_to_stop(shared, tmp_path):
    """It both holds the runtime's service and is told by it. Before that, both make the validation videos of one process."""
    videos = dataclasses.replace(shared.validation, every=1, samples=0, videos=1, steps=1)
    shared = dataclasses.replace(shared, validation=videos)
    train(dataclasses.replace(shared, output=str(tmp_path / "alone"), steps=1), show=False)
    mine = words(shared, tmp_path, "--hosts.detect")
    with Several(tmp_path / "asked", mine, mine, slurm=True) as two:
        two.until_step(tmp_path / "run", 2)
        two.processes[0].send_signal(signal.SIGTERM)
        assert two.wait() == [0, 0], two.said()
        (stopped,) = read_run(tmp_path / "run").steps()
        assert f"stopped by signal 15 after step {stopped}, which is saved" in two.said()[0]
        assert len(two.told()["saved", stopped]) == 1, "the same state"
        assert two.told()["read", 0] == {"2"}  # of a microbatch of four
    ours, theirs = (np.load(tmp_path / name / "validation" / "dense" / "0.npy") for name in ("run", "alone"))
    assert np.ptp(ours) > 50, "a picture"
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # sums over devices, in another order
    ours, theirs = (validation(tmp_path / name, "videos")[1]["psnr"] for name in ("run", "alone"))
    np.testing.assert_allclose(ours, theirs, atol=0.1)  # dB
    assert (tmp_path / "run" / "validation" / "step_00000001" / "0.mp4").stat().st_size > 0


def test_outside_of_a_slurm_step_nothing_is_found(tmp_path):
    """In a batch script, which srun did not start, the job is known and the step isn't."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "JAX_PLATFORMS": "cpu"}
    program = "from fps_train.commands.train import main; main()"
    command = [sys.executable, "-c", program, "model", "--data", "data", "--output", "run"]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "train", "convert"))
    found = subprocess.run(
        [*command, "--hosts.detect"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths} | job, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert found.returncode == 2
    (line,) = own_lines(found.stderr)
    assert line.startswith("error: hosts.detect found no Slurm step, Open MPI or Kubernetes job (")
    assert line.endswith(
        "); start with srun or mpirun, or give --hosts.coordinator-address, --hosts.num-processes and --hosts.process-id"
    )


@pytest.mark.multiprocess
def test_a_nan_in_one_process_ends_both_at_the_same_step(shared, tmp_path):
    """Each has it from the step's own numbers: a line, status 2, and what was saved before stays the newest."""
    shared = dataclasses.replace(
        shared, accumulate=2, validation=dataclasses.replace(shared.validation, every=0),
        checkpoint=dataclasses.replace(shared.checkpoint, every=1),
    )  # fmt: skip
    mine = words(shared, tmp_path)
    with Several(tmp_path / "poisoned", mine, [*mine, "poison=2"]) as two:  # the first microbatch of step 2
        assert two.wait() == [2, 2], two.said()
        for said in two.said():
            (line,) = [line for line in own_lines(said) if line.startswith("error")]
            assert line == own_lines(said)[-1]
            assert re.fullmatch(
                "error: NaN or inf at step 2 in the forward, first in the embeddings; step 1 is saved, .*", line
            )
    assert read_run(tmp_path / "run").steps() == [1]


@pytest.mark.multiprocess
def test_what_can_not_begin_is_said_before_the_first_step(shared, tmp_path):
    """Processes that disagree, and one that is alone: a line each, status 2, no folder begun."""
    mine, other = words(shared, tmp_path), words(shared, tmp_path, "--optimizer.b2", "0.99")
    with Several(tmp_path / "disagree", mine, other) as two:
        assert two.wait() == [2, 2], two.said()
        for said in two.said():
            assert own_lines(said) == [
                "error: processes disagree on optimizer.b2: 0.999 on process 0, 0.99 on process 1; start all of them with the "
                "same options, code and files"
            ]
    with Several(tmp_path / "unreachable", mine, count=2, timeout=3) as one:
        assert one.wait() == [2]
        (said,) = one.said()
        (line,) = own_lines(said)
        assert re.fullmatch(
            r"error: process 1 of 2 waited 3 s: found no coordinator at 127.0.0.1:\d+ with all .*", line
        )
    assert not pathlib.Path(shared.output).exists()


def test_ctrl_c_in_one_of_several_processes_is_a_sigterm_to_the_runtime(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    interrupt = signal.getsignal(signal.SIGINT)  # of a test runner's worker, it may be another than Python's own
    try:
        with loop._signals():
            signal.raise_signal(signal.SIGINT)
            assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


# A thread of XLA's that aborts while a process ends has nothing more to say
_TOO_LATE = "import os, threading; threading.Timer(0.3, os.write, (2, b'stack trace')).start(); hosts._exit(None, 0)"


@pytest.mark.parametrize("end", ["", "hosts._exit(None, 0)", _TOO_LATE], ids=["end", "exit", "abort"])
def test_a_process_waits_for_its_last_words(tmp_path, end):
    """Else they are lost where it is the first process of a container."""
    script = f"""
import sys, time
from fps_train import hosts
whole = hosts._filter
hosts._filter = lambda *ends: (time.sleep(1), whole(*ends))
hosts._one_line_for_fatal()
print("last words", file=sys.stderr)
{end}
"""
    with (tmp_path / "err").open("wb") as err:
        subprocess.run([sys.executable, "-c", script], stderr=err, check=True, timeout=PATIENCE)
    assert (tmp_path / "err").read_text() == "last words\n"


def test_a_lost_peer_is_said_with_what_the_collective_said(monkeypatch, tmp_path):
    error = jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: unhandled system error\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError), hosts.peers():  # alone, no peer can be lost
        raise error
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(
            ConnectionError, match=r"checkpoint \(INTERNAL: NCCL operation failed: unhandled system error\)$"
        ),
        hosts.peers(),
    ):
        raise error
    assert not hosts.lost_peer(ValueError("UNAVAILABLE: a file"))
    with (
        pytest.raises(ConnectionError, match=r"\(UNKNOWN: Gloo AllGather failed: Connection reset by peer\)$"),
        hosts.peers(),
    ):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")


def test_of_xla_s_report_of_a_lost_peer_one_line_is_left(tmp_path):
    source = tmp_path / "said"
    told = b"step 1 of 2\nF1127 21:07:16.396347 9577 client.h:86] Terminating process because the JAX distributed service detected fatal errors.\n*** Check failure stack trace: ***\n    @ 0x7f05be13d7d4\n"  # noqa: E501

    def filtered(text: bytes) -> list[str]:
        source.write_bytes(text)
        with (tmp_path / "left").open("w+b") as left:
            hosts._filter(os.open(source, os.O_RDONLY), left.fileno())
            left.seek(0)
            return left.read().decode().splitlines()

    assert filtered(told)[0] == "step 1 of 2"
    assert [line.startswith(LOST) for line in filtered(told)] == [False, True]
    mine = f"error: {hosts._LOST}\n".encode()
    assert len(filtered(mine + told)) == 2  # this process said so itself already
    assert filtered(told + mine) == filtered(told)  # or does while XLA aborts
    other = b"F1127 21:07:16.396347 9577 other.cc:1] Check failed\n*** stack trace ***\n"
    assert filtered(other) == other.decode().splitlines()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, "hosts.coordinator_address is missing; give all of"),
        ({"num_processes": 2, "process_id": 2, "coordinator_address": "a:1"}, "hosts.process_id=2 is not in 0 to 1"),
        (
            {"num_processes": 0, "process_id": 0, "coordinator_address": "a:1"},
            "hosts.num_processes=0 is not a number of 1 or",
        ),
        ({"num_processes": 2, "process_id": 0, "coordinator_address": "a"}, "coordinator_address='a' is not HOST:PORT"),
        ({"detect": True, "process_id": 0}, "hosts.detect finds coordinator_address, num_processes and process_id"),
        ({"detect": True, "timeout": 0}, "hosts.timeout=0 is not a number of seconds"),
    ],
)
def test_options_of_hosts_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        HostOptions(**given)


def test_the_page_s_scripts_give_options_that_there_are():
    page = (ROOT / "docs" / "cluster.md").read_text().split("## Several hosts")[1].replace("\\\n", " ")
    page = page.replace("$JOB_COMPLETION_INDEX", "1").replace("$RESUME", "--resume").replace("$RUN", "/runs/fps")
    lines = re.findall(r"fps-train (/shared/.*)", page)
    found = [parse(Train, shlex.split(line), prog="fps-train", default=Train()) for line in lines]
    slurm, kubernetes = (options.hosts for options in found)
    assert slurm == HostOptions(detect=True)
    assert (kubernetes.num_processes, kubernetes.process_id) == (2, 1)
    assert {options.mesh for options in found} == {"fsdp=4,context=4"}
    assert all(options.resume for options in found)
