"""What a call takes that is no field of a request: several videos of a prompt, a callback, and names from elsewhere."""

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from fps_jax import WanPipeline
from fps_jax.config import WAN_I2V_14B, WAN_T2V_14B
from fps_jax.foreign import FOREIGN, option_answer
from fps_jax.sampling import pipeline
from fps_jax.sampling.request import Request


def asked(**arguments) -> Request:
    """The request that a call makes."""
    pipe = object.__new__(WanPipeline)
    pipe.sample = lambda request, *_: request  # pyright: ignore[reportAttributeAccessIssue]
    return pipe(**arguments)


def test_several_videos_of_a_prompt_are_prompts_of_their_own():
    one = asked(prompt="a", num_videos_per_prompt=3, seed=5)
    assert (one.prompt, one._seeds(), one.negative_prompt) == (["a"] * 3, [5, 6, 7], None)
    first, second = np.zeros((32, 48, 3), np.float32), np.ones((32, 48, 3), np.float32)
    for image in ([first, second], np.stack([first, second])):
        request = asked(
            prompt=["a", "b"], negative_prompt=["c", "d"], image=image, num_videos_per_prompt=2, height=32, width=48
        )
        assert request.prompt == ["a", "a", "b", "b"]
        assert request.negative_prompt == ["c", "c", "d", "d"]
        frames = request.frames(WAN_I2V_14B)[0]
        np.testing.assert_array_equal(frames.mean((1, 2, 3)), [0, 0, 1, 1])
    two = asked(prompt="a", image="a.png", num_videos_per_prompt=2)
    assert (two.prompt, two.image) == (["a", "a"], "a.png")  # an image for all
    assert asked(prompt="a", num_videos_per_prompt=1).prompt == "a"  # as it was given
    assert len(asked(prompt="a", num_videos_per_prompt=1000).prompt) == 1000
    for count, message in (
        (1001, "num_videos_per_prompt=1001 is above 1,000, more than a call is made for"),
        (0, "num_videos_per_prompt=0 is less than 1"),
        (2.0, "num_videos_per_prompt=2.0 is not a whole"),
    ):
        with pytest.raises(ValueError, match=message):
            asked(prompt="a", num_videos_per_prompt=count)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sample_steps", "sample_steps is no argument of a WanPipeline; use num_inference_steps"),
        ("generator", "; use seed: a whole number, or one for each video"),
        ("ckpt_dir", "; leave it out: the checkpoint's folder is the first argument, of WanPipeline.from_pretrained"),
        ("torch_dtype", "; use dtype, 'bfloat16' or 'float32', of WanPipeline.from_pretrained and fps-sample"),
        ("enable_model_cpu_offload", "; leave it out: the text encoder is on the device"),
        ("guidence_scale", "; did you mean guidance_scale\\?"),
        ("zzzz", "zzzz is no argument of a WanPipeline$"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(name, said):
    with pytest.raises(TypeError, match=said):
        asked(prompt="a", **{name: 1})


def test_names_from_elsewhere_at_loading_and_methods_are_answered_too(tmp_path):
    with pytest.raises(TypeError, match=r"^torch_dtype is no argument of WanPipeline.from_pretrained; use dtype, "):
        WanPipeline.from_pretrained(tmp_path, torch_dtype="bfloat16")
    with pytest.raises(TypeError, match=r"^unet_name is no argument of WanPipeline.from_files; use dit of"):
        WanPipeline.from_files(dit="a", vae="b", text_encoder="c", unet_name="a")
    pipe: Any = object.__new__(WanPipeline)
    for name, said in (
        ("to", "; leave it out: parameters are on JAX's default device"),
        ("enable_model_cpu_offload", "; leave it out: the text encoder is on the device"),
        ("load_lora_weights", r"; use load_lora\(file, scale\)$"),
        ("zzzz", "'WanPipeline' object has no attribute 'zzzz'$"),
    ):
        assert not hasattr(pipe, name)
        with pytest.raises(AttributeError, match=said):
            getattr(pipe, name)
    pipe.dtype = "float32"
    for made in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert made.dtype == "float32"


def test_a_command_answers_with_options_that_it_has():
    assert option_answer("--frame-num", {"model", "num_frames"}) == "use --num-frames"
    assert option_answer("--steps", {"model", "prompt"}) is None  # fps-stream's steps are its preset's
    assert option_answer("--task", {"prompt"}) is None  # not about this command at all
    assert option_answer("--task", {"model"}) == "leave it out: it is told by the checkpoint"


def test_what_is_answered_isnt_an_argument_of_ours():
    assert not FOREIGN.keys() & inspect.signature(WanPipeline.__call__).parameters.keys()


def test_a_callback_is_given_what_diffusers_gives_it(monkeypatch):
    from types import SimpleNamespace

    def denoise(*_, seen, **__):
        for step in (0, 1):
            seen(step, np.full((1, 16, 1, 2, 2), step, np.float32))
        return np.zeros((1, 16, 1, 2, 2), np.float32)

    monkeypatch.setattr(pipeline, "denoise", denoise)
    pipe: Any = object.__new__(WanPipeline)
    pipe.config, pipe.params, pipe.dtype, pipe.show_progress = WAN_T2V_14B, {"dit": {}}, np.float32, False
    table = SimpleNamespace(timestep=np.array([999.0, 500.0], np.float32))
    pipe.prepare = lambda request: pipeline.Prepared(None, table, 1.0, None, False)  # pyright: ignore[reportArgumentType]
    told = []
    pipe("a", output_type="latent", callback_on_step_end=lambda *arguments: told.append(arguments))
    assert [(who is pipe, step, timestep) for who, step, timestep, _ in told] == [(True, 0, 999.0), (True, 1, 500.0)]
    assert [float(keywords["latents"].mean()) for *_, keywords in told] == [0.0, 1.0]
