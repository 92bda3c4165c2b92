"""What processes of one run agree on before its first step. With real ones: test_hosts."""

import json

import jax
import pytest

from fps_train import agreement, run
from fps_train.data import open_data
from fps_train.run import run_facts
from fps_train.setup import prepare
from tests.fps_train.sample_data import write_data


@pytest.fixture
def two_processes(monkeypatch):
    """This process is the second of two; what the first says is put into the list."""
    first: list[dict] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_exchange", lambda said: [first[0], json.loads(json.dumps(said))])
    return first


def test_what_only_some_processes_see_is_said_by_all(two_processes, tmp_path):
    def missing():
        raise FileNotFoundError(2, "No such file or directory", "/data/samples")

    two_processes.append({"facts": {}})
    with pytest.raises(FileNotFoundError):  # where it is missing
        agreement.together(missing)
    two_processes[0] = {"error": "data '/data/samples' doesn't exist"}
    with pytest.raises(ValueError, match=r"^process 0 of 2: data '/data/samples' doesn't exist$"):
        agreement.together(lambda: 1)
    two_processes[0] = {"facts": {"seed": 0, "the data (its fingerprint)": "a"}}
    with pytest.raises(
        ValueError, match=r"processes disagree on the data \(its fingerprint\): 'a' on process 0, 'b' on"
    ):
        agreement.together(lambda: 1, lambda _: {"seed": 0, "the data (its fingerprint)": "b"})
    assert agreement.together(lambda: 1, lambda _: {"seed": 0, "the data (its fingerprint)": "a"}) == 1


def test_a_run_s_facts_are_its_options_its_code_and_its_files(options):
    found = agreement.option_facts(options)
    assert {"seed", "optimizer.b2", "validation.every", "the versions of code"} <= set(found)
    assert not {"data", "output"} & set(found)  # paths
    setup = prepare(options)
    record = (options, setup.model, setup.parts, setup.schedule, setup.data.fingerprint)
    json.dumps(found | run_facts(*record))
    assert run_facts(*record)["the data (its fingerprint)"] == setup.data.fingerprint


def test_a_folder_that_only_process_0_sees_is_no_folder_for_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_SHARED_SECONDS", 0)
    with pytest.raises(
        FileNotFoundError, match="the run that process 0 began is not seen from here; give a folder that all"
    ):
        run.see_run(tmp_path)


def test_other_validation_prompts_are_another_run(tmp_path):
    folders = [tmp_path / "some", tmp_path / "none"]
    sizes = {"64x64x5": 2}
    some, none = (
        open_data(write_data(folder, sizes, prompts=prompts))
        for folder, prompts in zip(folders, (True, False), strict=True)
    )
    assert some.fingerprint == none.fingerprint
    assert some.prompts_fingerprint != none.prompts_fingerprint
