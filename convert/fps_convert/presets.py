"""Whether a way of making blocks goes with a checkpoint."""

from fps_convert.infer import dit_sizes
from fps_convert.layouts import OFFICIAL, layout_of
from fps_convert.single_files import Given
from fps_convert.source import Source
from fps_jax.checkpoints.format import is_checkpoint
from fps_jax.choices import CausalPreset
from fps_jax.config import PRESET_MODEL, check_preset_size


def check_preset(preset: CausalPreset, source: Source, given: Given) -> None:
    """Raises ValueError where a preset, which all are of models that were made from Wan2.1-T2V-1.3B, is given for something else.

    A DiT that was given is held against the directory's own, as far as that has a config.json: they should be of one model.
    """
    dit = source.config.dit
    if dit.task != "t2v":
        raise ValueError(
            f"preset={preset!r} is of {PRESET_MODEL}, and {source.path} is a {dit.task} model; leave it out"
        )
    check_preset_size(preset, dit)
    if given.dit is None or not source.path.is_dir():
        return
    sizes = {"dim": dit.dim, "num_layers": dit.num_layers, "in_channels": dit.in_channels}
    base = dit_sizes(source.path, OFFICIAL if is_checkpoint(source.path) else layout_of(source.path))
    for name, size in sizes.items():
        if base.get(name, size) != size:
            raise ValueError(
                f"{source.path} is of a DiT with {name}={base[name]}, and {given.dit} has {size}; give the directory of the model "
                f"that it was made from, {PRESET_MODEL} for preset={preset!r}"
            )
