"""How a model is sampled where nothing else is said: Wan's many steps, and the recipes that few-step models were distilled for."""

import dataclasses
from dataclasses import dataclass

from fps_jax.choices import Preset, SigmaGrid, Solver
from fps_jax.sampling.flow import Grid, explicit_grid, sigma_grid


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The walk from noise to video. Either a grid and a number of steps, or the levels themselves.

    Attributes:
      sigmas, timesteps: levels by name (`flow.explicit_grid`); None for those of `sigma_grid`.
      num_inference_steps: of the grid; as many as there are levels with `sigmas` or `timesteps`.
      flow_shift: None for the checkpoint's own.
      guidance_scale: at 1 the negative prompt isn't evaluated.
    """

    solver: Solver
    sigma_grid: SigmaGrid | None = None
    num_inference_steps: int
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[float, ...] | None = None
    flow_shift: float | None = None
    guidance_scale: float

    def levels(self, shift: float) -> Grid:
        """The noise levels, for a known shift. Raises as `sigma_grid` and `explicit_grid`."""
        if self.sigma_grid is not None:
            return sigma_grid(self.solver, self.sigma_grid, self.num_inference_steps, shift)
        return explicit_grid(self.solver, shift, sigmas=self.sigmas, timesteps=self.timesteps)

    def words(self) -> str:
        """For a person: "solver lcm, timesteps 1000 757 522, flow shift 8, guidance 1"."""
        named = [
            f"{name} {' '.join(f'{level:g}' for level in own)}"
            for name, own in (("sigmas", self.sigmas), ("timesteps", self.timesteps))
            if own is not None
        ]
        steps = ", ".join(named) or f"{self.num_inference_steps} steps"
        shift = "" if self.flow_shift is None else f", flow shift {self.flow_shift:g}"
        return f"solver {self.solver}, {steps}{shift}, guidance {self.guidance_scale:g}"


PRESETS: dict[Preset, Settings] = {
    # Wan-Video/Wan2.1 generate.py.
    "wan": Settings(solver="unipc", sigma_grid="wan", num_inference_steps=50, guidance_scale=5.0),
    # Step- and guidance-distilled models and LoRAs: ModelTC/LightX2V configs/distill, lightx2v's cards: levels of 1000, 750, 500
    # and 250, shifted by 5.
    "few-step": Settings(solver="lcm", sigma_grid="wan", num_inference_steps=4, flow_shift=5.0, guidance_scale=1.0),
    # FastWan: hao-ai-lab/FastVideo, `dmd_denoising_steps` and the training shift that they are looked up with.
    "dmd": Settings(
        solver="lcm", timesteps=(1000, 757, 522), num_inference_steps=3, flow_shift=8.0, guidance_scale=1.0
    ),
    # tianweiy/CausVid configs/wan_bidirectional_dmd_from_scratch.yaml: FastWan took its numbers from here.
    "causvid": Settings(
        solver="lcm", timesteps=(1000, 757, 522), num_inference_steps=3, flow_shift=8.0, guidance_scale=1.0
    ),
}


def fill(
    preset: Preset,
    *,
    solver: Solver | None = None,
    sigma_grid: SigmaGrid | None = None,
    num_inference_steps: int | None = None,
    sigmas: tuple[float, ...] | None = None,
    timesteps: tuple[float, ...] | None = None,
    flow_shift: float | None = None,
    guidance_scale: float | None = None,
) -> Settings:
    """A preset with whatever is given in place of its own; levels that are given replace its levels.

    Raises: ValueError, in one line, for things that don't go together. What the levels are is checked by `Settings.levels`.
    """
    own = PRESETS[preset]
    given = {
        "solver": solver,
        "sigma_grid": sigma_grid,
        "num_inference_steps": num_inference_steps,
        "flow_shift": flow_shift,
        "guidance_scale": guidance_scale,
    }
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps are both given; give one of them")
    explicit = timesteps if sigmas is None else sigmas
    if explicit is not None:
        own = dataclasses.replace(own, sigma_grid=None, sigmas=sigmas, timesteps=timesteps)
        whose, fix = f"{'timesteps' if sigmas is None else 'sigmas'} are given", ""
    else:
        whose, fix = f"preset={preset!r} has timesteps of its own", ", or give preset='few-step' or 'wan'"
    levels = explicit or own.timesteps
    if levels is not None:
        if sigma_grid is not None:
            raise ValueError(f"sigma_grid={sigma_grid!r} has no place where {whose}; leave it out{fix}")
        if num_inference_steps not in (None, len(levels)):
            raise ValueError(
                f"num_inference_steps={num_inference_steps} where {whose}, {len(levels)} of them; leave it out{fix}"
            )
        given["num_inference_steps"] = len(levels)
    return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})
