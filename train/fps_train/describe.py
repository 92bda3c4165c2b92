"""What a run would do, in words: `fps-train --dry-run`."""

from fps_jax.attention.attend import PlannedAttention
from fps_jax.attention.sharded import on_one_device
from fps_jax.models.dit import build_dit
from fps_jax.models.params import abstract_params, flatten
from fps_train.setup import Setup


def describe(setup: Setup) -> str:
    """Model, data, sizes with their regimes, and the programs to compile; a line each."""
    options, config = setup.options, setup.config
    count = sum(leaf.size for _, leaf in flatten(abstract_params(build_dit(config.dit))))
    trained = f"adapters of rank {options.lora.rank}" if options.lora.rank else "its weights"
    samples = sum(bucket.num_samples for bucket in setup.data.buckets)
    seen = options.steps * options.batch_size * options.accumulate
    flow, shift = options.flow, setup.sampling_shift
    lines = [
        f"model: {options.model}, {config.task}, {count:,} parameters; {trained} will be trained in {options.dtype}",
        f"data: {options.data}, {samples} samples, {options.validation.samples} of them held out",
        f"steps: {options.steps} of {options.accumulate} x {options.batch_size} samples: {seen} samples",
        f"noise levels: {flow.distribution}, training shift {flow.training_shift:g}, sampling shift {shift:g}",
    ]
    programs = 1
    for bucket in setup.buckets:
        programs += len(bucket.attentions)
        lines.append(f"latents {bucket.latent_shape}, tokens {bucket.grid}:")
        for regime in bucket.regimes:
            attention = on_one_device(regime.attention)
            what = attention.plan.brief() if isinstance(attention, PlannedAttention) else "dense"
            lines.append(
                f"  {regime.name}: progress {regime.start:g} to {regime.end:g}, {regime.probability:.1%} of the samples, {what}"
            )
    lines.append(f"programs to compile: {programs}")
    if setup.mesh.size > 1:
        axes = ", ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items() if size > 1)
        lines.append(f"devices: {setup.mesh.size} ({axes})")
    return "\n".join(lines)
