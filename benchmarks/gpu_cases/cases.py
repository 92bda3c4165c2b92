"""Every case, most valuable first: what comes last is what a short call leaves out."""

from benchmarks.gpu_cases.runner import Case

_HERE = "benchmarks.gpu_cases"
# The last of a case's kernels is the one under test, and the one that a hang is blamed on.
_FP8, _BF16 = ("quantize", "fwd fp8"), ("fwd bf16",)
_FP8_PAIR, _BF16_PAIR = (*_FP8, "fwd fp8 cluster"), (*_BF16, "fwd bf16 cluster")
_PERSISTENT, _PERSISTENT_PAIR = (*_FP8, "fwd fp8 persistent"), (*_FP8, "fwd fp8 cluster persistent")
# JAX's share of the memory: small, so that all of it can be filled with NaN.
_SMALL = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.06"}


def _correct(group: str, kernels: tuple[str, ...], **kwargs: object) -> Case:
    return Case(
        name=f"correct {group}", stage="correct", function=f"{_HERE}.correct:forward", kernels=kernels, seconds=150,
        kwargs={"group": group, **kwargs}, environment=_SMALL,
    )  # fmt: skip


def _op(implementation: str, kernels: tuple[str, ...]) -> Case:
    return Case(
        name=f"correct op {implementation}", stage="correct", function=f"{_HERE}.correct:portable", kernels=kernels,
        kwargs={"implementation": implementation}, seconds=120, environment=_SMALL,
    )  # fmt: skip


def _baseline(name: str, function: str, size: str, **kwargs: object) -> Case:
    return Case(
        name=f"baseline {name} {size}", stage="speed", function=f"{_HERE}.baselines:{function}", baseline=True,
        kwargs={"size": size, **kwargs},
    )  # fmt: skip


def _baselines(size: str) -> list[Case]:
    return [
        _baseline("torch cudnn", "torch_sdpa", size, backend="CUDNN_ATTENTION"),
        _baseline("torch flash", "torch_sdpa", size, backend="FLASH_ATTENTION"),
        # The largest that fit: 231,544 of 232,448 bytes with three steps of 128 keys.
        _baseline("mosaic 128x2", "mosaic", size, block_kv=128, steps=2),
        _baseline("mosaic 128x3", "mosaic", size, block_kv=128, steps=3),
        _baseline("mosaic 64x4", "mosaic", size, block_kv=64, steps=4),
    ]


def _speed(size: str, density: float, scales: int | None, **options: object) -> Case:
    kind = "bf16" if scales is None else f"fp8x{scales}"
    kernels = _BF16 if scales is None else _FP8
    kwargs: dict[str, object] = {"size": size, "density": density, "scales": scales}
    name = f"speed {kind} {density:.2f} {size}"
    if options:
        name += " " + " ".join(f"{option}={value}" for option, value in options.items())
        kwargs["options"] = options
    switches = [option for option, value in options.items() if value is True]
    if switches:
        kernels = (*kernels, " ".join([kernels[-1], *switches]))
    return Case(name=name, stage="speed", function=f"{_HERE}.speed:attention", kernels=kernels, kwargs=kwargs)


def _quantization(size: str) -> Case:
    return Case(
        name=f"speed quantization {size}", stage="speed", function=f"{_HERE}.speed:quantization", kernels=("quantize",),
        kwargs={"size": size, "scales": 1},
    )  # fmt: skip


def _peer(name: str, function: str, module: str = "peers", **kwargs: object) -> Case:
    return Case(
        name=f"peer {name}", stage="peers", function=f"{_HERE}.{module}:{function}", kwargs=kwargs, kernels=(name,)
    )


def _tune(size: str, density: float, scales: int | None, cluster: int) -> Case:
    fp8, bf16 = (_FP8_PAIR, _BF16_PAIR) if cluster == 2 else (_FP8, _BF16)
    kind = "bf16" if scales is None else f"fp8x{scales}"
    return Case(
        name=f"tune {kind} {density:.2f} {size} cluster {cluster}", stage="tune", function=f"{_HERE}.tune:sweep",
        kernels=bf16 if scales is None else fp8, seconds=500, silence=90,
        kwargs={"size": size, "density": density, "scales": scales, "cluster": cluster},
    )  # fmt: skip


def all_cases() -> list[Case]:
    """In the order in which they run. Scales a tile: 1 coarse, 2 intermediate, 4 fine, as the default schedule pairs them."""
    quantization = Case(
        name="correct quantization",
        stage="correct",
        function=f"{_HERE}.correct:quantization",
        kernels=("quantize",),
        seconds=120,
        environment=_SMALL,
    )
    checker = Case(  # slow; where it doesn't end, that says nothing of the kernel
        name="correct memory checker",
        stage="correct",
        function=f"{_HERE}.correct:memory_checker",
        kernels=("fwd fp8", "compute-sanitizer"),
        seconds=240,
    )
    return [
        Case(name="facts machine", stage="facts", function=f"{_HERE}.facts:machine", seconds=120),
        _correct("first", ("fwd fp8",), fused=False),
        quantization,
        _baseline("cudnn", "cudnn", "14B"),
        _speed("14B", 0.2, 1),
        _speed("14B", 1.0, 1),
        _correct("tables", _FP8),
        _baselines("14B")[0],
        Case(name="facts matmuls", stage="facts", function=f"{_HERE}.facts:torch_matmuls"),
        _quantization("14B"),
        _correct("padding", _FP8),
        _correct("granularity", _FP8),
        *_baselines("14B")[1:],
        _speed("14B", 0.12, 1),
        _speed("14B", 0.2, 2),
        _speed("14B", 0.33, 4),
        _speed("14B", 0.33, 1),
        _correct("bf16", _BF16),
        _speed("14B", 0.2, None),
        _speed("14B", 1.0, None),
        _correct("clusters", _FP8_PAIR),
        _correct("persistent", _PERSISTENT),
        _speed("14B", 0.2, 1, persistent=True),
        _correct("turns", (*_FP8, "fwd fp8 take_turns")),
        _speed("14B", 0.2, 1, take_turns=True),
        _correct("promotion", _FP8),
        _speed("14B", 0.2, 1, promote_every=4),
        _correct("polynomials", _FP8),
        _speed("14B", 0.2, 1, polynomial_columns=16),
        _speed("14B", 0.2, 1, polynomial_columns=32),
        _op("auto", _FP8),
        _op("portable", ("portable",)),
        _correct("head dim 64", _FP8),
        _peer("cudnn fp8", "cudnn_fp8", "baselines", size="14B"),
        _baseline("cudnn", "cudnn", "1.3B"),
        _speed("1.3B", 0.2, 1),
        _speed("1.3B", 1.0, 1),
        *_baselines("1.3B"),
        _speed("1.3B", 0.12, 1),
        _speed("1.3B", 0.33, 1),
        _speed("1.3B", 0.2, None),
        _quantization("1.3B"),
        *(_speed("14B", density, None) for density in (0.33, 0.12)),
        *(_speed("1.3B", density, None) for density in (1.0, 0.33, 0.12)),
        _correct("bf16 clusters", _BF16_PAIR),
        _correct("persistent clusters", _PERSISTENT_PAIR),
        checker,
        _peer("flash-attention 3", "flash_attention_3", size="14B", dtype="bfloat16"),
        _peer("flash-attention 3 fp8", "flash_attention_3", size="14B", dtype="float8_e4m3fn"),
        _peer("sage attention", "sage_attention", size="14B"),
        _peer("sparge attention", "sparge_attention", size="14B", density=0.2),
        _peer("sliding tile attention", "sliding_tile_attention"),
        *(
            _tune(size, density, scales, cluster)
            for size in ("14B", "head64")
            for scales in (1, 4, None)
            for density in (0.2, 1.0)
            for cluster in (1, 2)
        ),
    ]
