"""The claim's commands, its model's vocabulary, and how samples are judged. Nothing is trained."""

import numpy as np
import pytest

from benchmarks.claim import __main__ as chain
from benchmarks.claim import export, judge, measure, vae_gate, world
from benchmarks.claim.__main__ import _arguments
from benchmarks.claim.model import CONFIG, TEXT_LEN, write_tokenizer
from benchmarks.claim.steps import RECIPES, STAGES, STEPS
from fps_jax.models.tokenizer import Tokenizer
from fps_jax.sizes import latent_grid, token_grid
from fps_train.config import TrainConfig


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_configs(recipe):
    assert TrainConfig.load(recipe).optimizer.kind == "muon"


def test_each_step_reads_what_an_earlier_one_wrote():
    written = set()
    for step in STEPS:
        assert step.stage in STAGES
        inputs = {a[1:] for a in step.arguments if a.startswith("@")} - {step.output, ""}  # "": the whole folder
        assert {path.split("/")[0] for path in inputs} <= written, step
        written.add(step.output)


def test_a_run_that_was_stopped_is_resumed_without_a_start(tmp_path):
    long = next(step for step in STEPS if step.output == "long")
    assert "--init-from" in _arguments(long, tmp_path)
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "run.json").write_text("{}")
    again = _arguments(long, tmp_path)
    assert again[-1] == "--resume"
    assert "--init-from" not in again


def test_a_run_that_stops_early_ends_the_chain(tmp_path, monkeypatch):
    """A run that is told to stop saves and exits with 0; what comes after it must not start from a part of it."""
    ran = []
    monkeypatch.setattr(chain.subprocess, "run", lambda command, **_: ran.append(command))
    with pytest.raises(InterruptedError, match="images was stopped before its end; the same command goes on with it"):
        chain._main(["--folder", str(tmp_path), "--stages", "dit"])
    assert "images.toml" in " ".join(ran[-1])


def test_all_of_the_grammar_is_in_the_vocabulary(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.vocab_size <= CONFIG.text_encoder.vocab_size
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = tokenizer.ids(world.caption(world.draw(rng, held_out=False), rng))
        assert tokenizer.unk_id not in ids
        assert len(ids) < TEXT_LEN  # the end token too
    assert tokenizer.ids("a Red circle") == tokenizer.ids("a red  circle")
    assert tokenizer.unk_id in tokenizer.ids("a red cat")


def test_the_model_s_grid_has_a_dozen_real_tiles_of_sixteen_tokens():
    grid = token_grid(latent_grid(world.HEIGHT, world.WIDTH, world.FRAMES), CONFIG.dit.patch_size)
    assert np.prod(grid) >= 12 * 16


def test_true_clips_are_judged_right_and_others_not(tmp_path):
    facts, texts = judge.captions(12, 5)
    assert all(world.is_held_out(f.colour, f.shape, f.motion) for f in facts)
    videos = [world.render(f, np.random.default_rng(i)) for i, f in enumerate(facts)]
    right = judge.judge(facts, texts, videos)
    assert right.whole.all()
    assert right.record()["whole"] == {"right": 1.0, "interval": [1.0, 1.0]}
    reversed_ = judge.judge(facts, texts, [video[::-1] for video in videos])
    wrong = {f.motion for f, ok in zip(facts, reversed_.right[:, judge.FACTS.index("motion")], strict=True) if not ok}
    assert wrong == {f.motion for f in facts} - {"stays still"}
    judge.write_strips(right, tmp_path / "strips.png", count=3)
    assert (tmp_path / "strips.png").stat().st_size > 0


@pytest.mark.parametrize("command", [judge._main, measure._main, vae_gate._main])
@pytest.mark.parametrize(("name", "value"), [("clips", 0), ("clips", 10**9), ("batch-size", 0), ("seed", -1)])
def test_numbers_that_no_measurement_has_are_refused_before_a_model_is_looked_for(command, name, value, tmp_path):
    data = ["--data", "nowhere"] if command is measure._main else []
    with pytest.raises(ValueError, match=rf"{name.replace('-', '_')}={value} is not in \d to \d+"):
        command(["nowhere", "--output", str(tmp_path / "o"), *data, f"--{name}", str(value)])
    assert not list(tmp_path.iterdir())


def test_the_demo_s_models_come_from_a_claim_that_ran(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no .*; run the claim's stages first"):
        export._main([str(tmp_path), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
