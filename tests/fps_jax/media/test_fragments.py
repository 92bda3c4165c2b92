"""An mp4 that is written while it is made: at every moment what is there plays, and at the end all of it."""

import io
import re
import signal
import subprocess
import sys

import av
import numpy as np
import pytest

from fps_jax.media.fragments import CODECS, Fragments, fragmented_mp4, mime_type, split_head
from tests.as_written import watch_writes


def clip(frames: int) -> np.ndarray:
    """Frames whose brightness tells their number."""
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8
    return np.broadcast_to(shades, (frames, 32, 48, 3)).copy()


def brightness(content: bytes) -> list[float]:
    with av.open(io.BytesIO(content)) as container:
        return [float(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]


def test_a_file_plays_while_it_is_written(tmp_path):
    path, frames = tmp_path / "out.mp4", clip(21)
    with fragmented_mp4(path) as writer:
        writer.push(frames[:9])
        so_far = brightness(path.read_bytes())
        assert len(so_far) >= 8, "the last frame waits for the next"
        writer.push(frames[9:])
        with pytest.raises(ValueError, match="frames have 16x48 pixels; this video has 32x48"):
            writer.push(frames[:, :16])
    whole = brightness(path.read_bytes())
    assert len(whole) == 21
    np.testing.assert_allclose(whole, frames.mean((1, 2, 3)), atol=2)  # 4:2:0, 8 bits, crf 18
    np.testing.assert_allclose(so_far, whole[: len(so_far)], atol=0)


def test_each_write_adds_whole_frames(tmp_path, monkeypatch):
    """Also of frames that are larger than FFmpeg's buffers: who reads beside the writer finds no torn one."""
    path = tmp_path / "out.mp4"
    seen = watch_writes(monkeypatch, path)
    noise = np.random.default_rng(0).integers(0, 256, (9, 192, 256, 3), np.uint8)
    with fragmented_mp4(path) as writer:
        for part in (noise[:4], noise[4:5], noise[5:]):
            writer.push(part)
    whole = brightness(seen[-1])
    assert len(whole) == 9
    assert [brightness(content) for content in seen[:-1]] == [whole[:3], whole[:4], whole[:8]]


def test_what_a_killed_process_leaves_plays(tmp_path):
    code = """if True:
        import signal, sys
        import numpy as np
        from fps_jax.media.fragments import fragmented_mp4

        with fragmented_mp4(sys.argv[1]) as writer:
            for seed in range(3):
                writer.push(np.random.default_rng(seed).integers(0, 256, (4, 64, 96, 3), np.uint8))
            print("three blocks", flush=True)
            signal.pause()
    """
    path, whole = tmp_path / "out.mp4", tmp_path / "whole.mp4"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        process.kill()
    assert (told, process.returncode) == (b"three blocks\n", -signal.SIGKILL)
    with fragmented_mp4(whole) as writer:
        for seed in range(3):
            writer.push(np.random.default_rng(seed).integers(0, 256, (4, 64, 96, 3), np.uint8))
    assert brightness(path.read_bytes()) == brightness(whole.read_bytes())[:-1]


def test_what_was_written_stays_when_the_work_is_broken_off(tmp_path):
    path = tmp_path / "out.mp4"

    def broken_off():
        with fragmented_mp4(path, fps=24) as writer:
            writer.push(clip(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert len(brightness(path.read_bytes())) == 5
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 24


def test_a_file_is_opened_when_its_first_frames_are_there(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"an earlier video")
    with fragmented_mp4(path):
        pass
    assert path.read_bytes() == b"an earlier video"
    with fragmented_mp4(path) as writer:
        writer.push(clip(2))
    assert len(brightness(path.read_bytes())) == 2


def test_bad_files_are_refused(tmp_path):
    for arguments, message in (
        ({"path": tmp_path / "a.mkv"}, "must end in .mp4"),
        ({"path": tmp_path / "a.mp4", "fps": 0}, "fps=0 is not a number in 1 to 1000"),
        ({"path": tmp_path / "a.mp4", "crf": 60}, "crf=60 must be in 0"),
    ):
        with pytest.raises(ValueError, match=message), fragmented_mp4(**arguments):
            pass
    with pytest.raises(FileNotFoundError), fragmented_mp4(tmp_path / "nowhere" / "a.mp4"):
        pass


@pytest.mark.parametrize("codec", CODECS)
def test_fragments_in_memory_are_a_file(codec):
    """Joined they play, a block can be played without those before it, and the head says what a browser calls the video."""
    packed, frames = Fragments(16, codec), clip(21)
    parts = [packed.push(frames[:1]), packed.push(frames[1:9]), packed.push(frames[9:]), packed.close()]
    assert packed.frames == 21
    whole = b"".join(parts)
    np.testing.assert_allclose(brightness(whole), frames.mean((1, 2, 3)), atol=2)
    with av.open(io.BytesIO(whole)) as container:
        decoded = list(container.decode(video=0))
    assert [frame.time for frame in decoded] == pytest.approx([i / 16 for i in range(21)])
    assert all(decoded[i].key_frame for i in (0, 1, 9))
    head, rest = split_head(parts[0])
    assert (head[4:8], rest) == (b"ftyp", b""), "a single frame waits for the next"
    assert split_head(head + parts[1]) == (head, parts[1])
    first = int.from_bytes(parts[2][:4], "big")  # the last frame of the block before: moof and mdat
    first += int.from_bytes(parts[2][first : first + 4], "big")
    np.testing.assert_allclose(brightness(head + parts[2][first:] + parts[3]), frames[9:].mean((1, 2, 3)), atol=2)
    want = {"avc1": r"avc1\.64000a", "vp09": r"vp09\.00\.10\.08"}[codec]  # High, level 1; profile 0, level 1, 8 bits
    assert re.fullmatch(f'video/mp4; codecs="{want}"', mime_type(head))


def test_a_head_of_another_video_has_no_name():
    with pytest.raises(ValueError, match=r"no H\.264 and no VP9"):
        mime_type(b"ftyp")


def test_what_is_written_in_memory_is_what_is_written_to_a_file(tmp_path):
    packed, frames = Fragments(16), clip(21)
    with fragmented_mp4(tmp_path / "out.mp4") as writer:
        parts = []
        for part in (frames[:9], frames[9:]):
            writer.push(part)
            parts.append(packed.push(part))
    assert b"".join([*parts, packed.close()]) == (tmp_path / "out.mp4").read_bytes()


def test_a_disk_that_is_full_is_told_with_the_file_which_plays_to_there(tmp_path):
    code = """if True:
        import resource, signal, sys
        import numpy as np
        from fps_jax.media.fragments import fragmented_mp4

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        noise = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), np.uint8)
        try:
            with fragmented_mp4(sys.argv[1]) as writer:
                for _ in range(6):
                    writer.push(noise)
        except OSError as error:
            print(error)
    """
    path = tmp_path / "noise.mp4"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 27] File too large: '{path}'\n", done.stderr
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    assert len(packets) >= 2
