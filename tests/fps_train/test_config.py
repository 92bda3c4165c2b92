"""Options of a run: what is refused, presets, and the file that repeats a run."""

import dataclasses

import pytest

from fps_train.config import PRESETS, FlowOptions, LoraOptions, OptimizerOptions, TrainConfig


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_config_comes_back_from_its_file(config, tmp_path):
    own = dataclasses.replace(config, model="m", data="d", output="o", sampling_shift=3.0)
    own.save(tmp_path / "config.toml")
    assert TrainConfig.load(tmp_path / "config.toml") == own
    assert TrainConfig.load(tmp_path / "config.toml") != config


def test_a_file_may_name_what_differs_only(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("steps = 7\noptimizer.learning_rate = 1\n[lora]\nrank = 4\ntargets = ['q']\n")
    assert TrainConfig.load(path) == TrainConfig(
        steps=7, optimizer=OptimizerOptions(learning_rate=1.0), lora=LoraOptions(rank=4, targets=("q",))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 7", "step is no option; there are model, data, output, steps"),
        ("optimizer.lr = 1e-3", "optimizer.lr is no option; there are optimizer.kind, optimizer.learning_rate"),
        ("optimizer = 3", "optimizer=3 is not a table of options"),
        ("steps = 1.5", "steps=1.5 is not a whole number"),
        ("steps = true", "steps=True is not a whole number"),
        ("steps = '7'", "steps='7' is not a whole number"),
        ("text_dropout = 'x'", "text_dropout='x' is not a number"),
        ("from_scratch = 1", "from_scratch=1 is not true or false"),
        ("train_only = 'q'", "train_only='q' is not a list of texts"),
        ("model = 3", "model=3 is not a text"),
        ("attention = 'flash'", "attention='flash' is not one of 'dense', 'fp8', 'sparse', 'fps'"),
        ("steps = ", "is not a TOML file"),
    ],
)
def test_a_file_s_faults_are_named(text, message, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig.load(path)
    assert "c.toml" in str(error.value)
    assert "\n" not in str(error.value).replace("\\n", "")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"config='.*none.toml' doesn't exist; a run writes its own as config.toml"
    ):
        TrainConfig.load(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is not a TOML file"):
        TrainConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps=0 is not a whole number of 1 or more"),
        (lambda: TrainConfig(mesh="model=2"), "'model' is no axis; there are data, fsdp, context, tensor"),
        (lambda: TrainConfig(mesh="fsdp=2,fsdp=4"), "gives fsdp twice"),
        (lambda: TrainConfig(mesh="fsdp"), "fsdp='' is not a whole number of 1 or more"),
        (
            lambda: TrainConfig(mesh="data=2,fsdp=4", batch_size=12),
            r"batch_size=12 is not a multiple of the 8 devices.*use 16",
        ),
        (lambda: TrainConfig(batch_size=0), "batch_size=0 is not a whole number of 1 or more"),
        (lambda: TrainConfig(seed=2**32), r"seed=4294967296 is not in \[0, 2\*\*32\)"),
        (lambda: TrainConfig(text_dropout=1.5), r"text_dropout=1.5 is not a share in \[0, 1\]"),
        (lambda: TrainConfig(remat="all"), "remat='all' is not one of 'none', 'attention', 'dots', 'full'"),
        (lambda: TrainConfig(sampling_shift=0.0), "sampling_shift=0.0 is not a positive number"),
        (lambda: TrainConfig(attention="dense", schedule="s.json"), "attention='dense' follows none"),
        (lambda: TrainConfig(lora=LoraOptions(rank=2), train_only=("q",)), "which freezes the base; choose one"),
        (
            lambda: TrainConfig(from_scratch=True, teacher_weight=0.5),
            "from_scratch trains all weights and has no teacher",
        ),
        (lambda: FlowOptions(distribution="normal"), "flow.distribution='normal' is not one of 'wan', 'uniform'"),
        (lambda: FlowOptions(mean=1.0), "are for flow.distribution='logit-normal'"),
        (lambda: FlowOptions(distribution="logit-normal", std=-1.0), "flow.std=-1.0 is not a positive number"),
        (lambda: FlowOptions(shift=float("nan")), "flow.shift=nan is not a positive number"),
        (lambda: OptimizerOptions(ema=1.0), r"optimizer.ema=1.0 is not in \[0, 1\)"),
        (lambda: OptimizerOptions(warmup=-1), "optimizer.warmup=-1 is not a whole number of 0 or more"),
        (lambda: OptimizerOptions(clip=-1.0), "optimizer.clip=-1.0 is not a number of 0 or more"),
        (lambda: LoraOptions(alpha=8.0), "was given without lora.rank; give a rank"),
        (lambda: LoraOptions(rank=2, alpha=0.0), "lora.alpha=0.0 is not a positive number"),
    ],
)
def test_wrong_options_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_defaults_that_depend_on_others_are_filled_in():
    assert (FlowOptions().shift, FlowOptions(distribution="uniform").shift) == (2.0, 1.0)
    assert LoraOptions(rank=8).alpha == 8.0
