"""fps-stream: a file that is written as blocks are made, prompts by a script, and what is refused before anything is loaded."""

import io
import json
import os
import re
import types

import numpy as np
import pytest

from fps_jax.commands.stream import main, read_script, take_due
from fps_jax.files import MAX_JSON
from fps_jax.media.video import save_video
from tests.as_written import watch_writes
from tests.checkpoints import T2V


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_a_video_is_written_block_after_block(tmp_path, capsys, monkeypatch):
    """And plays at every moment: what has been written are the first frames of what will be."""
    import av

    script, output = tmp_path / "prompts.json", tmp_path / "boat.mp4"
    script.write_text(json.dumps([{"at": 0.5, "prompt": "The storm clears.", "how": "recache"}]))
    seen = watch_writes(monkeypatch, output)
    status, err = run(capsys, T2V, "--prompt", "A boat.", "--blocks", 2, "--script", script, "--output", output, *SMALL)
    assert status == 0, err
    assert "block 1: 9 frames" in err
    assert "block 2: 21 frames" in err

    def frames(content: bytes) -> list[np.ndarray]:
        with av.open(io.BytesIO(content)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    so_far, whole = [frames(content) for content in seen], frames(output.read_bytes())
    assert [len(part) for part in so_far] == [8, 20, 21], "each block, but for the last frame, and then that"
    assert len(whole) == 21
    assert all(np.array_equal(a, b) for part in so_far for a, b in zip(part, whole, strict=False))


def test_a_clip_is_gone_on_with(tmp_path, capsys):
    """The file begins with what the VAE makes of the clip's last frames."""
    import av

    t, y, x = np.mgrid[0:20, 0:64, 0:96].astype(np.float32)
    frames = np.stack([np.sin(x / 19 + t / 9), np.cos(y / 17 - t / 9), np.sin((x + y) / 31)], axis=-1) / 2 + 0.5
    clip, output = tmp_path / "clip.mp4", tmp_path / "boat.mp4"
    save_video(frames, clip)
    argv = (T2V, "--prompt", "A boat.", "--blocks", 1, "--output", output, "--video", clip, *SMALL)
    status, err = run(capsys, *argv)
    assert (status, err.count("\n")) == (2, 1), err
    assert (
        "given has 20 frames, and this model's blocks end at 9, 21, 33, ... of them; give the last 9 of them (--vi"
        in err
    )
    status, err = run(capsys, *argv, "--video-frames", 9)
    assert status == 0, err
    assert "block 1 (given): 9 frames" in err
    assert "block 2: 21 frames" in err
    with av.open(str(output)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21


def test_a_picture_begins_the_video(tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / "boat.png"
    Image.fromarray(np.full((32, 48, 3), 128, np.uint8)).save(picture)
    argv = (T2V, "--prompt", "A boat.", "--blocks", 1, "--output", tmp_path / "boat.mp4", "--image", picture, *SMALL)
    status, err = run(capsys, *argv)
    assert (status, err.count("\n")) == (2, 1), err
    assert (
        "given is one frame, which is one latent frame, and this model's first block has 3; give first_frame_al" in err
    )
    status, err = run(capsys, *argv, "--first-frame-alone")
    assert status == 0, err
    assert "block 1 (given): 1 frames" in err
    assert "block 2: 13 frames" in err


def test_no_memory_left_is_no_defect(tmp_path, capsys, monkeypatch):
    import jax.numpy as jnp

    from fps_jax.sampling import rollout

    monkeypatch.setattr(rollout, "_denoise_block", lambda *args, **kwargs: jnp.zeros(2**50, jnp.uint8))
    output = tmp_path / "boat.mp4"
    status, err = run(capsys, T2V, "--prompt", "A boat.", "--blocks", 2, "--output", output, *SMALL)
    assert status == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: a stream of 32 x 48 pixels: no memory left on a device, which has ")
    assert last.endswith("bytes.); use a window below 6 latent frames or kv_cache='fp8' or a smaller height and width")
    assert not output.exists()


def test_a_profile_says_where_the_time_goes_and_changes_nothing(tmp_path, capsys):
    from fps_jax.sampling import rollout

    plain, out, profile = tmp_path / "plain.mp4", tmp_path / "out.mp4", tmp_path / "profile"
    arguments = (T2V, "--prompt", "A boat.", "--blocks", 2, *SMALL)
    assert run(capsys, *arguments, "--output", plain)[0] == 0
    programs = rollout._denoise_block._cache_size()
    status, err = run(capsys, *arguments, "--output", out, "--profile", profile)
    assert status == 0, err
    assert f"wrote {profile / 'profile.html'}" in err
    assert out.read_bytes() == plain.read_bytes()
    assert rollout._denoise_block._cache_size() == programs
    record = json.loads((profile / "profile.json").read_text())
    assert set(record["stages"]) == {"load", "prepare", "encode text", "denoise", "decode", "write"}
    for name in ("denoise", "decode", "write"):
        assert [span["block"] for span in record["spans"] if span["stage"] == name] == [0, 1]
        assert f"{name}, block by block" in (profile / "profile.html").read_text()
    assert record["stages"]["denoise"]["compile_seconds"] == 0
    # What a block is said to take is its stages' time, but for what lies between them.
    said = [float(seconds) for seconds in re.findall(r"denoise ([0-9.]+) s", err)]
    assert said == pytest.approx([s["seconds"] for s in record["spans"] if s["stage"] == "denoise"], abs=0.1)


SMALL = ("--height", 32, "--width", 48, "--dtype", "float32", "--preset", "causvid-3", "--window", 6)


@pytest.mark.parametrize(("first", "blocks", "status"), [(2, (), 0), (1, (), 130), (2, ("--blocks", 5), 130)])
def test_ctrl_c_is_the_end_of_a_video_without_end(tmp_path, capsys, monkeypatch, first, blocks, status):
    """Before the first block nothing is touched; where an end was asked for it isn't reached."""
    import av

    from fps_jax.sampling.block import Block
    from fps_jax.sampling.stream import CausalPipeline

    output, made, switches = tmp_path / "boat.mp4", iter(range(1, first)), []
    output.write_bytes(b"an earlier video")

    class Session:
        """Of blocks that cost nothing; Ctrl-C comes while one is made."""

        begun_frames = 0

        def switch(self, prompt, how):
            switches.append(prompt)

        def ahead(self, before):
            before()
            for _ in made:
                yield Block(0, np.zeros((9, 32, 48, 3), np.uint8), np.zeros((16, 3, 4, 6)), "A boat.", {"decode": 0.0})
                before()
            raise KeyboardInterrupt

    loaded = types.SimpleNamespace(session=lambda *args, **kwargs: Session())
    monkeypatch.setattr(CausalPipeline, "from_pretrained", lambda *args, **kwargs: loaded)
    script = tmp_path / "prompts.json"
    entries = [
        {"at": 0, "prompt": "A storm."},
        {"at": 0.5, "prompt": "It clears."},
        {"at": 60, "prompt": "Night falls."},
    ]
    script.write_text(json.dumps(entries))
    argv = (T2V, "--prompt", "A boat.", "--output", output, "--overwrite", "--script", script, *blocks, *SMALL)
    got, err = run(capsys, *argv)
    assert got == status
    assert ("9 frames in" in err) == (status == 0)
    assert ("script: 2 entries were not reached, the first at 0.5 s" in err) == (status == 0)
    assert switches == ["A storm.", "It clears."][:first], "a block was begun with the second, and is in no file"
    if first == 1:
        assert output.read_bytes() == b"an earlier video"
    else:
        with av.open(str(output)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "doesn't say how it makes blocks; give causal='self-forcing'"),
        (("--guidance-scale", 5), "error: --guidance-scale: leave it out: guidance is distilled into the model"),
        (("--negative_prompt", "blurred"), "error: --negative_prompt: leave it out: guidance is distilled into the"),
        (("--sample-guide-scale=5",), "error: --sample-guide-scale: leave it out: guidance is distilled into the mo"),
        (("--preset", "causvid-3", "--window", 2), "window=2 is less than frames_per_block=3"),
        (("--preset", "causvid-3", "--sink", 3), "sink=3 without a window"),
        (("--preset", "causvid-3", "--height", 40), "height=40 is not a positive multiple of 16"),
        (("--preset", "causvid-3", "--seed", -1), "seed=-1 is not in"),
        (("--preset", "causvid-3", "--video", "nowhere.mp4"), "video='nowhere.mp4' doesn't exist; check the path"),
        (("--preset", "causvid-3", "--video", __file__), "can't be read as a video ("),
        (("--preset", "causvid-3", "--video", T2V), "can't be read as a video ("),
        (("--preset", "causvid-3", "--image", "nowhere.png"), "image='nowhere.png' doesn't exist; check the path"),
        (("--preset", "causvid-3", "--image", __file__), "can't be read as an image"),
    ],
)
def test_what_the_config_tells_is_told_before_weights_are_read(tmp_path, capsys, monkeypatch, arguments, message):
    from fps_jax.sampling.pipeline import WanPipeline

    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    status, err = run(capsys, T2V, "--prompt", "A boat.", "--output", tmp_path / "out.mp4", *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err


def test_what_exists_is_kept_unless_overwrite_is_given(tmp_path, capsys):
    output = tmp_path / "boat.mp4"
    output.write_bytes(b"an earlier video")
    status, err = run(capsys, "nowhere", "--prompt", "A boat.", "--output", output)
    assert status == 2
    assert "boat.mp4' exists; give another --output, or --overwrite" in err
    status, err = run(capsys, "nowhere", "--prompt", "A boat.", "--output", output, "--overwrite")
    assert status == 2
    assert "checkpoint 'nowhere' doesn't exist" in err
    assert output.read_bytes() == b"an earlier video"


def test_of_what_is_due_together_the_newest_prompt_counts_and_the_strongest_way():
    hows = ("continue", "cut", "recache", "continue", "recache")
    script = [{"at": at, "prompt": f"prompt {at}", "how": how} for at, how in enumerate(hows)]
    assert take_due(script, -1) is None
    assert take_due(script, 2.5) == {"at": 2, "prompt": "prompt 2", "how": "cut"}
    assert take_due(script, 2.5) is None
    assert take_due(script, 4) == {"at": 4, "prompt": "prompt 4", "how": "recache"}
    assert not script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "a" * 250 + ".mp4"), "bytes too long for a file's name; choose a shorter one"),
        (("--output", "out.avi"), "output='out.avi' must end in .mp4"),
        (("--output", "nowhere/out.mp4"), "doesn't exist; make it first"),
        (("--blocks", 0), "blocks=0 is not 1 or more; leave it out"),
        (("--prompt", " "), "prompt=' ' is not a text"),
        (("--fps", 0), "fps=0.0 is not a number in 1 to 1000"),
        (("--script", "nowhere.json"), "script='nowhere.json' doesn't exist"),
        (("--image", "a.png", "--video", "a.mp4"), "image='a.png' and video='a.mp4' were given; give one of them"),
        (("--video-frames", 9), "video_frames=9 is of --video, which isn't given"),
        (("--video", "a.mp4", "--video-frames", 0), "video_frames=0 is not 1 or more"),
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
        ([{"at": 10**400, "prompt": "a"}], "at=10+ is not a number of seconds, 0 to 1e\\+09"),
        ([{"at": 1, "prompt": "\ud800"}], "is not valid text"),
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
    for content in ("no JSON", f'[{{"at": {"9" * 5000}, "prompt": "a"}}]', "[" * 10**5):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a JSON file"):
            read_script(path)
    with path.open("wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(ValueError, match="bytes, more than the"):
        read_script(path)
    path.unlink()
    os.mkfifo(path)  # whose reader would wait for ever
    with pytest.raises(ValueError, match="is not a JSON file"):
        read_script(path)
