"""What a caller may choose by name. Command lines are parsed by these before jax is imported, so nothing is imported here."""

from typing import Any, Literal, get_args

Dtype = Literal["bfloat16", "float32"]
Solver = Literal["unipc", "dpm++", "euler"]
SigmaGrid = Literal["wan", "diffusers"]
OutputType = Literal["np", "latent", "pil"]
Setting = Literal["dense", "fp8", "sparse", "fps"]  # of self-attention


def choices(kind: Any) -> str:
    """The names of a Literal, for a message: "'a', 'b'"."""
    return ", ".join(map(repr, get_args(kind)))


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError where the argument `name` is none of the names of a Literal."""
    if value not in get_args(kind):
        raise ValueError(f"{name}={value!r} is not one of {choices(kind)}")
