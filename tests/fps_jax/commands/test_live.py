"""fps-live: what is refused before anything is loaded, and the demo from its first line to Ctrl-C."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from websockets.sync.client import connect

from fps_jax.commands import live
from fps_jax.live import demo
from tests.checkpoints import T2V

ROOT = pathlib.Path(__file__).parents[3]


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        live.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", 70000), "port=70000 is not in 0 to 65535; 0 takes a free one"),
        (("--prompt", " "), "prompt=' ' is not a text"),
        (("--fps", 0), "fps=0.0 is not a number in 1 to 1000"),
        (("--allow-host", ""), "allow_host='' is not a host's name"),
        (("--allow-host", "a.org:80"), "allow_host='a.org:80' is not a host's name, such as gpu7.example.org, without"),
        (("--host", "no such host"), "host='no such host' is no address of this machine"),
        (("--host", "192.0.2.1", "--port", 0), "host='192.0.2.1', port=0 can't be listened on"),
        ((), "doesn't say how it makes blocks; give causal='self-forcing'"),
        (("--guidance-scale", 5), "error: --guidance-scale: leave it out: guidance is distilled into the model"),
        (("--negative_prompt", "blurred"), "error: --negative_prompt: leave it out: guidance is distilled into the"),
        (("--sample-guide-scale=5",), "error: --sample-guide-scale: leave it out: guidance is distilled into the mo"),
        (("--preset", "causvid-3", "--window", 2), "window=2 is less than frames_per_block=3"),
        (("--preset", "causvid-3", "--height", 40), "height=40 is not a positive multiple of 16"),
    ],
)
def test_bad_arguments_are_one_line(capsys, monkeypatch, arguments, message):
    from fps_jax.sampling.pipeline import WanPipeline

    monkeypatch.setattr(WanPipeline, "from_pretrained", None)
    status, err = run(capsys, T2V, *(() if "--port" in arguments else ("--port", 0)), *arguments)
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err


def test_a_port_that_is_taken_is_told_before_a_model_is_looked_for(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, err = run(capsys, "nowhere", "--port", taken.getsockname()[1])
    assert (status, err.count("\n")) == (2, 1), err
    assert "can't be listened on (Address already in use); give another --port, 0 for a free one" in err


def test_without_the_extra_a_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(live, "_EXTRA", ("starlette", "no_such_package"))
    status, err = run(capsys, "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "fps-live needs no_such_package; pip install 'fps-jax[live]'" in err


def test_other_hosts_than_this_machine_are_warned_of(capsys, monkeypatch):
    monkeypatch.setattr(live, "_load", lambda options: None)
    monkeypatch.setattr("fps_jax.live.serve.serve", lambda *arguments: None)
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        status, err = run(capsys, "nowhere", "--port", 0, "--host", host)
        assert status == 0
        assert ("anyone who can reach this machine" in err) == warned
        assert re.search(r"open http://(127\.0\.0\.1|localhost):\d+/ in a browser; Ctrl-C ends it", err)


def test_the_demo_is_of_a_world_that_its_model_knows():
    assert demo.FACTS["prompt"] in demo.FACTS["examples"]
    assert (demo.MODEL / "model_index.json").is_file()
    assert "wasn't trained for block diffusion" in demo.FACTS["note"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_is_watched_and_ended_by_a_signal(number):
    command = [sys.executable, "-c", "from fps_jax.commands.live import main; main()", "demo", "--port", "0"]
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "convert", ROOT / "train"))
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://\S+/", line)))
            with urllib.request.urlopen(url) as page:
                assert b"fps-live" in page.read()
            with connect(f"{url.replace('http', 'ws')}watch") as socket:
                socket.send(json.dumps({"type": "hello", "codecs": ["avc1.640028"]}))
                ready = json.loads(socket.recv(timeout=60))
                assert (ready["type"], ready["model"], ready["note"]) == ("ready", "demo", demo.FACTS["note"])
                socket.send(json.dumps({"type": "prompt", "prompt": ready["prompt"]}))
                if number == signal.SIGINT:
                    while True:
                        record = socket.recv(timeout=300)
                        if isinstance(record, str) and json.loads(record)["type"] == "block":
                            break
                process.send_signal(number)
                assert process.wait(60) == 0
            assert "error" not in "".join(lines)
        finally:
            process.kill()
