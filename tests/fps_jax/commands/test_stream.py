"""fps-stream: a file that is written as blocks are made, prompts by a script, and what is refused before anything is loaded."""

import json

import pytest

from fps_jax.commands.stream import main, read_script
from tests.checkpoints import T2V


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_a_video_is_written_block_after_block(tmp_path, capsys):
    import av

    script, output = tmp_path / "prompts.json", tmp_path / "boat.mp4"
    script.write_text(json.dumps([{"at": 0.5, "prompt": "The storm clears.", "how": "recache"}]))
    small = ("--height", 32, "--width", 48, "--dtype", "float32", "--preset", "causvid-3", "--window", 6)
    status, err = run(capsys, T2V, "--prompt", "A boat.", "--blocks", 2, "--script", script, "--output", output, *small)
    assert status == 0, err
    assert "block 1: 9 frames" in err
    assert "block 2: 21 frames" in err
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "out.avi"), "output='out.avi' must end in .mp4"),
        (("--output", "nowhere/out.mp4"), "doesn't exist; make it first"),
        (("--blocks", 0), "blocks=0 is not 1 or more; leave it out"),
        (("--prompt", " "), "prompt=' ' is not a text"),
        (("--fps", 0), "fps=0.0 must be above 0"),
        (("--script", "nowhere.json"), "script='nowhere.json' doesn't exist"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    status, err = run(capsys, "nowhere", "--prompt", "A boat.", *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({}, "is not a list of prompts"),
        ([{"at": 1}], "entry 0: give an object of 'at', 'prompt'"),
        ([{"at": 1, "prompt": "a", "fade": 2}], "entry 0: give an object"),
        ([{"at": -1, "prompt": "a"}], "at=-1 is not a number of seconds"),
        ([{"at": True, "prompt": "a"}], "at=True is not a number"),
        ([{"at": 2, "prompt": "a"}, {"at": 2, "prompt": "b"}], "entry 1: at=2 is not after the entry before it, at 2"),
        ([{"at": 2, "prompt": ""}], "prompt='' is not a text"),
        ([{"at": 2, "prompt": "a", "how": "fade"}], "how='fade' is not one of 'continue', 'recache', 'cut'"),
    ],
)
def test_bad_scripts_are_refused(tmp_path, script, message):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(script))
    with pytest.raises(ValueError, match=message):
        read_script(path)
    path.write_text("no JSON")
    with pytest.raises(ValueError, match="is not a JSON file"):
        read_script(path)
