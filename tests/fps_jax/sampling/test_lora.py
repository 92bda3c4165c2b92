"""LoRAs in a pipeline: merged, several, taken out again to the bit; a LoRA that can't be merged changes nothing."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fps_jax import WanPipeline
from fps_jax.models.params import flatten
from tests.checkpoints import T2V
from tests.lora_spellings import CASES, draw


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request):
    return WanPipeline.from_pretrained(T2V, dtype=request.param)


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.unload_lora()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """`file(case)`: one of tests/lora_spellings.py."""
    folder = tmp_path_factory.mktemp("loras")

    def save(case: str):
        save_file({key: np.asarray(value) for key, value in CASES[case][0].items()}, folder / f"{case}.safetensors")
        return folder / f"{case}.safetensors"

    return save


def weights(pipe) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in flatten(pipe.params["dit"])}


def assert_same_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert (got[path].dtype, got[path].tobytes()) == (leaf.dtype, leaf.tobytes()), path


DOWN = "blocks/mlp/down/kernel"
DELTA = (draw("blocks.2.ffn.2.B", 64, 4).astype(np.float64) @ draw("blocks.2.ffn.2.A", 4, 128)).T  # of layer 2


def test_several_are_merged_from_the_weights_as_loaded_and_unloading_restores_every_bit(pipe, file):
    before = weights(pipe)
    record = pipe.load_lora(file("ours"), 0.5)
    assert record.report["alpha_over_rank"] == [1.5]
    first = weights(pipe)
    pipe.load_lora(str(file("partial")), -1.0)
    both = weights(pipe)
    # In units in the last place of the larger addends, which is what one rounding can cost.
    epsilon = float(jnp.finfo(before[DOWN].dtype).eps)
    for got, amount in ((first, 0.5 * 1.5), (both, 0.5 * 1.5 - 1.0)):
        want = before[DOWN][2].astype(np.float64) + amount * DELTA
        np.testing.assert_allclose(got[DOWN][2].astype(np.float64), want, rtol=epsilon, atol=4e-7)
        assert got[DOWN].dtype == before[DOWN].dtype
    np.testing.assert_array_equal(first[DOWN][0], both[DOWN][0])  # "partial" has no layer 0
    pipe.unload_lora()
    assert_same_bits(weights(pipe), before)
    assert pipe.loras == []


def test_the_device_and_layout_of_a_weight_stay(pipe, file):
    before = {path: (leaf.sharding, leaf.shape, leaf.dtype) for path, leaf in flatten(pipe.params["dit"])}
    pipe.load_lora(file("kohya"))
    assert {path: (leaf.sharding, leaf.shape, leaf.dtype) for path, leaf in flatten(pipe.params["dit"])} == before


def test_one_that_cannot_be_merged_changes_nothing(pipe, file, tmp_path):
    pipe.load_lora(file("ours"))
    before = weights(pipe)
    too_large = {"diffusion_model.blocks.0.self_attn.q.diff_b": np.full(64, 3e38, np.float32)}
    save_file(too_large, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"q/bias of layer 0 has NaN or inf as .*large\.safetensors merged"):
        pipe.load_lora(tmp_path / "large.safetensors", 10.0)
    with pytest.raises(ValueError, match=r"--lora-partial \(partial=True\) leaves it out"):
        pipe.load_lora(file("image"))
    with pytest.raises(FileNotFoundError, match="doesn't exist; give a"):
        pipe.load_lora(tmp_path / "none.safetensors")
    assert_same_bits(weights(pipe), before)
    assert len(pipe.loras) == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.5", True])
def test_a_scale_is_a_finite_number(pipe, file, scale):
    with pytest.raises(ValueError, match="of a LoRA is not a finite number"):
        pipe.load_lora(file("ours"), scale)


def test_partial_leaves_out_what_this_model_has_no_place_for(pipe, file, tmp_path):
    image = CASES["image"][0] | CASES["partial"][0]
    save_file({key: np.asarray(value) for key, value in image.items()}, tmp_path / "image.safetensors")
    record = pipe.load_lora(tmp_path / "image.safetensors", partial=True)
    assert record.report["left_out"]
    assert DOWN in record.report["changed"]
