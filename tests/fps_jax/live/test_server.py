"""The server as a page meets it: what it receives is the stream, who may connect, and what a wrong message does."""

import contextlib
import json
import pathlib
import re
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from fps_jax import CausalConfig, CausalPipeline
from fps_jax.live import server
from fps_jax.live.messages import MAX_MESSAGE
from fps_jax.live.server import Live
from fps_jax.media.fragments import fragmented_mp4
from tests.checkpoints import T2V
from tests.live_server import WAIT, Painted, decoded, site

BOAT, STORM = "A boat sails.", "The storm clears."
SIZE = {"height": 32, "width": 48}


def say(socket, **record) -> None:
    socket.send(json.dumps(record))


def luma(frames: np.ndarray) -> np.ndarray:
    """Brightness (BT.709): colours of noise lose most in 4:2:0."""
    return frames.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


@pytest.fixture(scope="module")
def pipe() -> CausalPipeline:
    causal = CausalConfig(frames_per_block=2, window=4, steps=(1000, 500))
    return CausalPipeline.from_pretrained(T2V, causal=causal, dtype="float32")


@pytest.fixture(scope="module")
def real(pipe):
    """A site of the tiny checkpoint's sessions."""
    with site(Live(lambda prompt: pipe.session(prompt, seed=3, **SIZE), facts={"model": "tiny"})) as running:
        yield running


@pytest.fixture
def painted():
    """A site of sessions that cost nothing, and these."""
    made: list[Painted] = []

    def make(prompt: str) -> Painted:
        made.append(Painted(prompt))
        return made[-1]

    with site(Live(make)) as running:  # pyright: ignore[reportArgumentType]
        yield running, made


def test_what_a_viewer_receives_is_the_file_of_the_session(real, pipe, tmp_path):
    """Joined, it has the frames, the times and the pictures of a file that is written from the session itself."""
    with real.client() as client:
        client.say(type="prompt", prompt=BOAT)
        client.until("block", seen=True)
        client.say(type="prompt", prompt=STORM, how="recache")
        switched = client.until("switching", seen=True)
        assert (switched["prompt"], switched["how"]) == (STORM, "recache")
        for _ in range(3):
            client.until("block", seen=True)
        client.say(type="stop")
        ended = client.until("ended", seen=True)
    blocks = client.kind("block")
    prompts = [block["prompt"] for block in blocks]
    at = prompts.index(STORM)
    assert prompts == [BOAT] * at + [STORM] * (len(prompts) - at)
    assert [block["frames"] for block in blocks][:2] == [[0, 5], [5, 13]]
    assert ended["frames"] == blocks[-1]["frames"][1]

    session = pipe.session(BOAT, seed=3, **SIZE)
    frames, path = [], tmp_path / "own.mp4"
    with fragmented_mp4(path) as writer:
        for block in blocks:
            if block["block"] == at:
                session.switch(STORM, "recache")
            frames.append(next(session).frames)
            writer.push(frames[-1])
    got, want = decoded(b"".join(client.video)), decoded(path.read_bytes())
    assert len(got) == len(want) == ended["frames"]
    for i, ((time_got, picture_got), (time_want, picture_want)) in enumerate(zip(got, want, strict=True)):
        assert time_got == time_want == pytest.approx(i / 16)
        assert np.array_equal(picture_got, picture_want)
    shown, made = (luma(np.stack(x)) for x in ([picture for _, picture in got], np.concatenate(frames)))
    apart = np.abs(shown[:, None] - made[None]).mean((2, 3))
    assert apart.argmin(1).tolist() == list(range(len(got))), "each is nearest to the session's own frame"
    assert b"".join(client.video) == path.read_bytes()


def test_a_block_says_what_it_took_and_holds(real):
    with real.client(["vp09.00.40.08", "avc1.640028"]) as client:  # the page's first choice counts
        client.say(type="prompt", prompt=BOAT)
        client.until("block")
        client.say(type="stop")
        client.until("ended")
    (ready,), (video,), block = client.kind("ready"), client.kind("video"), client.kind("block")[0]
    assert (ready["model"], ready["busy"], ready["fps"]) == ("tiny", False, 16)
    assert (video["mime"], video["height"], video["width"]) == ('video/mp4; codecs="vp09.00.10.08"', 32, 48)
    assert set(block["seconds"]) == {"denoise", "decode", "encode"}
    assert block["frames_per_second"] == pytest.approx(5 / sum(block["seconds"].values()), rel=0.02)
    assert block["cache"] == {"frames": 2, "of": 4}
    assert block["memory"]["host"] > 2**20
    assert len(decoded(b"".join(client.video))) == client.kind("ended")[0]["frames"]


def test_a_prompt_that_is_too_long_is_told_and_followed(real):
    """The first one and one mid-stream; of others nothing is said."""
    first, long = ("a boat sails " * 250 + end for end in ("home", "away"))
    with real.client() as client:
        for prompt in (first, BOAT, long):
            client.say(type="prompt", prompt=prompt)
            while client.until("block", seen=True)["prompt"] != prompt:
                pass
        client.say(type="stop")
        client.until("ended", seen=True)
    notes = [note["text"] for note in client.kind("note")]
    assert len(notes) == 2
    assert all(
        re.fullmatch(r"prompt 'a boat .*'... has \d+ tokens more than the 512 that the .* its end is cut.*", n)
        for n in notes
    )
    assert not client.kind("error")


def test_a_viewer_that_lags_is_waited_for(painted):
    running, made = painted
    with running.client() as client:
        client.say(type="prompt", prompt=BOAT)
        for _ in range(9):
            client.until("block")
        assert client.receive() is None
        client.silence()  # 4.5 s of video are on their way
        assert made[0].asked == 9
        client.say(type="buffered", seconds=4.5, blocks=9)  # all there, nothing shown
        client.silence()
        client.say(type="buffered", seconds=3.9, blocks=9)
        client.until("block")
        assert client.receive() is None
        client.say(type="buffered", seconds=3.4, blocks=9)  # and the tenth on its way: 3.9 s
        client.until("block")
        assert client.receive() is None
        client.silence()
        assert made[0].asked == 11


def test_paused_asks_for_no_block(painted):
    running, made = painted
    with running.client() as client:
        client.say(type="prompt", prompt=BOAT)
        client.until("block")
        client.say(type="pause")
        client.until("paused")
        with contextlib.suppress(TimeoutError):  # the block that was being made
            while client.receive(0.3) is None or client.said[-1]["type"] == "block":
                pass
        blocks = len(client.kind("block"))
        assert blocks == made[0].asked
        client.say(type="buffered", seconds=0, blocks=blocks)
        client.silence()
        client.say(type="prompt", prompt=STORM, how="cut")  # may be said meanwhile
        client.until("switching")
        client.say(type="resume")
        client.until("resumed")
        assert client.until("block")["prompt"] == STORM
        assert made[0].switches == [(STORM, "cut")]


def test_the_next_viewer_is_refused_until_the_first_has_left(painted):
    running, made = painted
    with running.client() as first:
        first.say(type="prompt", prompt=BOAT)
        first.until("block")
        with running.client() as second:
            assert second.kind("ready")[0]["busy"]
            second.say(type="prompt", prompt=STORM)
            assert "somebody else is watching" in second.until("refused")["text"]
            first.say(type="stop")
            first.until("ended")
            second.say(type="prompt", prompt=STORM)
            assert second.until("block")["prompt"] == STORM
            first.say(type="prompt", prompt=BOAT)
            first.until("refused")
    assert [session.prompt for session in made] == [BOAT, STORM]


def test_a_prompt_just_after_stop_is_heard_of_when_the_last_block_has_come():
    """Else what the page is told of the end of the one would count for the other."""
    hold, in_block = threading.Event(), threading.Event()

    class Slow(Painted):
        def __next__(self):
            in_block.set()
            hold.wait(WAIT)
            return super().__next__()

    with site(Live(Slow)) as running, running.client() as client:  # pyright: ignore[reportArgumentType]
        client.say(type="prompt", prompt=BOAT)
        assert in_block.wait(WAIT)
        client.say(type="stop")
        client.say(type="prompt", prompt=STORM)
        client.say(type="buffered", seconds=9, blocks=7)  # the page's last words on the first
        client.say(type="prompt", prompt="")
        client.until("error")
        hold.set()
        for _ in range(2):
            client.until("ended" if not client.kind("ended") else "block", seen=True)
        kinds = [record["type"] for record in client.said if record["type"] not in ("ready", "error", "video")]
        assert kinds == ["starting", "waiting", "block", "ended", "starting", "block"]
        assert client.until("block", seen=True)["prompt"] == STORM


def test_a_viewer_that_never_reads_is_left(monkeypatch):
    """It says that it has all of it, so the stream goes on: into memory, if nothing bounded it."""
    monkeypatch.setattr(server, "_MOST_BYTES", 2**20)
    noise = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), np.uint8)

    class Noisy(Painted):
        def __next__(self):
            return super().__next__()._replace(frames=noise)

    with site(Live(Noisy)) as running, socket.socket() as sock:  # pyright: ignore[reportArgumentType]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        sock.connect(("127.0.0.1", running.port))
        with connect(f"ws://127.0.0.1:{running.port}/watch", sock=sock, max_queue=1, max_size=None) as deaf:
            say(deaf, type="hello", codecs=["avc1.640028"])
            say(deaf, type="prompt", prompt=BOAT)
            end = time.monotonic() + WAIT
            while running.live.current is None or running.live.current.wanted:
                assert time.monotonic() < end, "it goes on for nobody"
                say(deaf, type="buffered", seconds=0, blocks=10**6)
                time.sleep(0.01)
            with pytest.raises(ConnectionClosed) as closed:
                list(iter(lambda: deaf.recv(timeout=WAIT), None))
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, "doesn't take what is sent" in closed.value.rcvd.reason) == (1008, True)
        with running.client() as client:
            client.say(type="prompt", prompt=STORM)
            assert client.until("block")["prompt"] == STORM


def test_a_long_wrong_value_is_not_sent_back_whole(painted):
    running, _ = painted
    with running.client() as client:
        client.say(type="prompt", prompt=BOAT, how="a" * 50000)
        assert len(client.until("error")["text"]) == 500


def test_a_tab_that_is_closed_ends_the_work(painted):
    running, made = painted
    with running.client() as client:
        client.say(type="prompt", prompt=BOAT)
        client.until("block")
        stream = running.live.current
    assert stream.join(30)
    asked = made[0].asked
    time.sleep(0.2)
    assert made[0].asked == asked
    assert not running.live.busy


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("no JSON", "not a message in JSON: 'no JSON'"),
        (b"\x00", "a message is text: JSON"),
        ("[" * 10**4, "not a message in JSON"),
        ("[]", "an object with 'type'"),
        ('{"type": "dance"}', "type='dance' is not one of hello, prompt, buffered, pause, resume, stop"),
        ('{"type": ["stop"]}', r"type=\['stop'\] is not one of"),
        ('{"type": "hello", "codecs": "avc1"}', "codecs is not a list"),
        ('{"type": "prompt", "prompt": "  "}', "the prompt is empty; give a few words"),
        ('{"type": "prompt", "prompt": 3}', "the prompt is empty"),
        ('{"type": "prompt", "prompt": "%s"}' % ("a" * 8001), "has 8001 characters, more than 8000"),
        ('{"type": "prompt", "prompt": "\\ud800"}', "is not valid text"),
        ('{"type": "prompt", "prompt": "a", "how": "fade"}', "how='fade' is not one of 'continue', 'recache', 'cut'"),
        ('{"type": "prompt", "prompt": "a", "how": ["cut"]}', "is not one of 'continue'"),
        ('{"type": "buffered", "seconds": NaN, "blocks": 1}', "buffered needs seconds"),
        ('{"type": "buffered", "seconds": true, "blocks": 1}', "buffered needs seconds"),
        ('{"type": "buffered", "seconds": 1, "blocks": -1}', "buffered needs seconds"),
        ('{"type": "buffered", "seconds": 1%s, "blocks": 1}' % ("0" * 400), r"in 0 to 1e\+09"),
        ('{"type": "buffered", "seconds": 1, "blocks": 1%s}' % ("0" * 400), r"in 0 to 1e\+09"),
        ('{"type": "buffered", "seconds": 1%s, "blocks": 1}' % ("0" * 5000), "not a message in JSON"),
    ],
)
def test_a_wrong_message_is_answered_and_the_stream_goes_on(painted, message, said):
    running, _ = painted
    with running.client() as client:
        client.say(type="prompt", prompt=BOAT)
        client.until("block")
        client.socket.send(message)
        assert re.search(said, client.until("error")["text"])
        client.say(type="buffered", seconds=0, blocks=len(client.kind("block")))
        client.until("block")


def test_what_comes_in_the_wrong_order_is_answered(painted):
    running, _ = painted
    with running.client(None) as client:
        client.say(type="prompt", prompt=BOAT)
        assert "say hello first" in client.until("error")["text"]
        client.say(type="hello", codecs=["theora"])
        assert "plays neither H.264 nor VP9" in client.until("error")["text"]
        client.say(type="hello", codecs=["avc1.640028"])
        client.until("ready")
        client.say(type="pause")
        assert "no stream is running" in client.until("error")["text"]


def test_a_message_beyond_the_bound_ends_the_connection(painted):
    running, _ = painted
    with running.client() as client:
        client.socket.send("a" * (MAX_MESSAGE + 1))
        with pytest.raises(ConnectionClosed) as closed:
            client.until("error")
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1", "http://elsewhere.example"),
        ("127.0.0.1", "null"),
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("localhost", "http://127.0.0.1"),
        ("elsewhere.example", "http://elsewhere.example:{port}"),  # its name was made to point here
        ("elsewhere.example", None),
    ],
)
def test_pages_of_others_get_no_stream(painted, host, origin):
    running, made = painted
    origin = origin and origin.format(port=running.port)
    with socket.create_connection(("127.0.0.1", running.port)) as sock:
        url = f"ws://{host}:{running.port}/watch"
        with pytest.raises(InvalidStatus) as refused, connect(url, sock=sock, origin=origin):
            pass
    assert refused.value.response.status_code == 403
    assert not made


def test_the_servers_own_page_may_connect(painted):
    running, _ = painted
    with running.client(origin=running.url.rstrip("/")):
        pass


def test_the_page_is_there_under_the_servers_names_alone(painted):
    running, _ = painted
    for path, kind in (("", "text/html"), ("page.js", "text/javascript"), ("style.css", "text/css")):
        with urllib.request.urlopen(running.url + path) as answer:
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.read()
    request = urllib.request.Request(running.url, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    with contextlib.closing(refused.value) as answer:
        assert (answer.code, b"give --allow-host" in answer.read()) == (403, True)


def test_the_loop_answers_while_a_block_and_a_prompt_take_their_time():
    """A session that stands still in a block, and then in a prompt: the server's page is there all the same."""
    hold, made = threading.Event(), []

    class Slow(Painted):
        def __next__(self):
            hold.wait(30)
            return super().__next__()

        def switch(self, prompt, how="continue"):
            hold.wait(30)
            super().switch(prompt, how)

    def make(prompt: str) -> Slow:
        made.append(Slow(prompt))
        return made[-1]

    with site(Live(make)) as running, running.client() as client:  # pyright: ignore[reportArgumentType]
        client.say(type="prompt", prompt=BOAT)
        client.until("starting")
        client.say(type="prompt", prompt=STORM)
        client.say(type="prompt", prompt="")
        assert "the prompt is empty" in client.until("error")["text"]
        with urllib.request.urlopen(running.url) as answer:
            assert answer.read()
        assert not made[0].asked
        hold.set()
        client.until("block")


def test_the_page_asks_for_nothing_from_elsewhere():
    import fps_jax.live.server as module

    for file in (pathlib.Path(module.__file__).parent / "web").iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text.replace("location.protocol", "")
        assert "https://" not in text
