"""A request's fields are declared once: what is added there reaches Python, the commands, and who prepares a video."""

import ast
import dataclasses
import inspect
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fps_jax import FPSSchedule, Regime, WanPipeline
from fps_jax.commands.calibrate import Calibrate
from fps_jax.commands.compare import Compare
from fps_jax.commands.options import VideoOptions, read_request
from fps_jax.commands.sample import Sample
from fps_jax.config import WAN_T2V_14B
from fps_jax.errors import parse
from fps_jax.evaluation.compare import compare
from fps_jax.sampling import pipeline
from fps_jax.sampling.request import Request
from fps_jax.sampling.request_fields import RequestFields

FIELDS = {field.name: field for field in dataclasses.fields(Request)}
WHOLE = FPSSchedule(regimes=(Regime(until=1.0),))


def test_every_field_is_an_argument_of_the_pipeline_with_its_default():
    arguments = dict(inspect.signature(WanPipeline.__call__).parameters)
    # not of the video, or made into what is
    for name in ("self", "callback", "num_videos_per_prompt", "callback_on_step_end", "foreign"):
        del arguments[name]
    assert arguments.keys() == FIELDS.keys()
    for name, argument in arguments.items():
        default = FIELDS[name].default
        assert argument.default == (inspect.Parameter.empty if default is dataclasses.MISSING else default), name
        assert argument.annotation == FIELDS[name].type, name


def test_the_pipeline_passes_each_argument_on_as_its_own_field(monkeypatch):
    monkeypatch.setattr(pipeline, "Request", lambda **arguments: arguments)
    monkeypatch.setattr(WanPipeline, "sample", lambda self, request, *callbacks: (request, *callbacks))
    values = {name: object() for name in (*FIELDS, "callback", "callback_on_step_end")}
    request, callback, on_step_end = WanPipeline.__call__(object.__new__(WanPipeline), **values)  # pyright: ignore[reportArgumentType]
    assert callback is values.pop("callback")
    assert on_step_end is values.pop("callback_on_step_end")
    assert request == values


def test_every_field_is_an_option_of_fps_sample_with_its_default():
    options = {field.name: field for field in dataclasses.fields(Sample)}
    for name, field in FIELDS.items():
        assert options[name].default == field.default, name


@pytest.mark.parametrize("command", [Compare, Calibrate])
def test_other_commands_lack_only_what_they_decide_themselves(command):
    assert FIELDS.keys() - {field.name for field in dataclasses.fields(command)} == {"output_type"}


LEVELS = (
    {"solver": "euler", "sigma_grid": "diffusers", "num_inference_steps": 7, "preset": "few-step"},
    {"solver": "lcm", "sigmas": (1.0, 0.5), "num_inference_steps": 2, "preset": "dmd"},
    {"solver": "dpm++", "timesteps": (900.0, 450.0, 3.0), "num_inference_steps": 3, "preset": "causvid"},
)


@pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: levels["preset"])
def test_an_option_becomes_the_field_of_its_name(tmp_path, levels):
    np.save(tmp_path / "noise.npy", noise := np.ones((1, 16, 2, 4, 6), np.float32))
    np.save(tmp_path / "tokens.npy", tokens := np.full((1, 257, 8), 2, np.float32))
    WHOLE.save(tmp_path / "schedule.json")
    given: dict[str, Any] = {
        "prompt": "a cat", "negative_prompt": "a dog", "image": tmp_path / "a.png", "last_image": tmp_path / "b.png",
        "image_embeds": tmp_path / "tokens.npy", "height": 32, "width": 48, "num_frames": 5,
        "guidance_scale": 3.0, "flow_shift": 4.0, "seed": 9,
        "latents": tmp_path / "noise.npy", "output_type": "latent", "vae_tiling": True, "batch_guidance": True,
        "attention": "fps", "schedule": tmp_path / "schedule.json", "size": "area",
        **levels,
    }  # fmt: skip
    assert given.keys() | set().union(*LEVELS) == FIELDS.keys()  # a grid and levels exclude each other
    assert all(value != FIELDS[name].default for name, value in given.items())
    request = read_request(Sample(model="m", **given))
    np.testing.assert_array_equal(request.latents, noise)
    np.testing.assert_array_equal(request.image_embeds, tokens)
    want = (
        dict.fromkeys(FIELDS)
        | given
        | {"schedule": WHOLE, "latents": request.latents, "image_embeds": request.image_embeds}
    )
    assert {name: getattr(request, name) for name in FIELDS} == want


@pytest.mark.parametrize("kind", [Request, VideoOptions])
def test_a_field_of_both_is_declared_again_for_another_type_alone(kind):
    """And its default is the base's: what a class body says beside a type."""
    shared = {field.name: field for field in dataclasses.fields(RequestFields)}
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    again = [line for line in body.body if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) in shared]
    assert again
    for line in again:
        name = ast.unparse(line.target)
        default = None if shared[name].default is dataclasses.MISSING else f"RequestFields.{name}"
        assert (line.value and ast.unparse(line.value)) == default, name
        assert kind.__dataclass_fields__[name].type != shared[name].type, name


@dataclass(frozen=True, kw_only=True, eq=False)
class Wider(RequestFields):
    """What both would have with one option more."""

    strength: float = 1.0
    """How much of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Extended(Wider, Request):
    """As if it were in the base of all."""


@dataclass(frozen=True, kw_only=True)
class ExtendedSample(Wider, Sample):
    """As if it were in the base of all."""


def test_an_option_added_to_the_fields_alone_reaches_the_command_line_and_its_request(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(ExtendedSample, ["--help"], prog="fps-sample")
    assert "--strength FLOAT How much of it. (default: 1.0)" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("fps_jax.sampling.request.Request", Extended)
    options = parse(ExtendedSample, ["m", "--prompt", "x", "--strength", "0.5"], prog="fps-sample")
    assert read_request(options).strength == 0.5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 31}, "height=31 is not a positive multiple of 16"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is not a whole number"),
        ({"size": "area"}, "size='area' keeps the aspect of an image"),
        ({"guidance_scale": 1e9}, "guidance_scale=1000000000.0 is not a finite number"),
        ({"attention": "dense", "schedule": pathlib.Path("a.json")}, "attention='dense' follows none"),
        ({"seed": -1}, "seed=-1 is not in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_command_refuses_what_it_can_before_the_library_is_imported(monkeypatch, given, message):
    monkeypatch.setitem(sys.modules, "fps_jax.sampling.request", None)
    with pytest.raises(ValueError, match=message):
        read_request(Sample(model="m", prompt="x", **given))


def test_an_option_added_to_the_request_alone_reaches_who_prepares_it(monkeypatch):
    class SeenError(Exception):
        pass

    seen = []

    def prepare(self, request):
        seen.append(request.strength)
        raise SeenError

    monkeypatch.setattr(WanPipeline, "prepare", prepare)
    monkeypatch.setattr(WanPipeline, "needs_tiling", lambda *_: False)
    pipe, request = object.__new__(WanPipeline), Extended(prompt="x", strength=0.5)
    pipe.config, pipe.schedule = WAN_T2V_14B, None
    for run in (pipe.sample, lambda request: compare(pipe, request)):
        with pytest.raises(SeenError):
            run(request)
    assert seen == [0.5, 0.5]
