"""Every family of cases, most valuable first: what comes last is what a short call leaves out.

A kernel is checked before it is timed.
"""

from typing import Any

from benchmarks.gpu_cases.runner import Case, Family
from benchmarks.gpu_cases.shapes import OPERATIONS, QUANTIZED, SHAPES

_HERE = "benchmarks.gpu_cases"
SWEEP = "configs "  # how names of families begin that time every config of one call
# JAX's share of the memory. Small, so that all of it can be filled with NaN; or taken as it is needed, beside other processes.
_SMALL = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.06"}
_PLAIN = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# The checks' own matmuls aren't worth the time that XLA would take to tune them.
_UNTUNED = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}


def kernels_of(scales: int | None, options: dict[str, Any]) -> tuple[str, ...]:
    """Names of what a call launches, the one under test last."""
    names = ["fwd bf16"] if scales is None else ["quantize", "fwd fp8"]
    switches = [
        *(["cluster"] if options.get("cluster", 1) > 1 else []),
        *(name for name in ("persistent", "take_turns") if options.get(name)),
    ]
    return (*names, " ".join([names[-1], *switches])) if switches else tuple(names)


def _forward(group: str, name: str, **more: Any) -> Case:
    shape = SHAPES[group][name]
    options = {"cluster": shape.cluster, "persistent": shape.persistent, "take_turns": shape.take_turns}
    kernels = kernels_of(shape.scales, options)
    if more.get("fused") is False:
        kernels = tuple(k for k in kernels if k != "quantize")
    label = " ".join(["correct", group, name, *(["plain registers"] if more.get("options") else [])])
    if more.get("fused") is False:
        label += ", quantized by XLA"
    return Case(
        name=label, function=f"{_HERE}.correct:forward", kernels=kernels, kwargs={"group": group, "name": name, **more}
    )


def _correct(name: str, *cases: Case) -> Family:
    return Family(name=name, stage="correct", cases=cases, environment={**_SMALL, **_UNTUNED})


def _group(*groups: str) -> list[Case]:
    return [_forward(group, name) for group in groups for name in SHAPES[group]]


def _ladder() -> Family:
    rungs = [
        Case(name=f"ladder {name}", function=f"{_HERE}.ladder:{name}", kernels=(f"ladder {name}",))
        for name in ("matmul", "copy", "scores", "values")
    ]
    still = {"consumer_registers": 168, "producer_registers": 168}  # as launched: no registers move
    return _correct(
        "ladder",
        *rungs,
        _forward("first", "one tile", fused=False, options=still),
        _forward("first", "one tile", fused=False),
        _quantization("ladder quantize", 128, 1, 128, "none"),
        *_group("first"),
    )


def _quantized() -> Family:
    cases = [
        _quantization(f"correct quantization {tile} x {scales} head dim {dim} {padding}", tile, scales, dim, padding)
        for tile, scales, dim, padding in QUANTIZED
    ]
    return _correct("correct quantization", *cases)


def _quantization(name: str, tile: int, scales: int, dim: int, padding: str) -> Case:
    kwargs = {"tile": tile, "scales": scales, "dim": dim, "padding": padding}
    return Case(name=name, function=f"{_HERE}.correct:quantization", kernels=("quantize",), kwargs=kwargs)


def _operations() -> Family:
    cases = [
        Case(
            name=f"correct op {implementation} {name}",
            function=f"{_HERE}.correct:operation",
            kernels=kernels_of(shape.scales, {}) if implementation == "auto" else ("portable",),
            kwargs={"implementation": implementation, "name": name},
        )
        for implementation in ("auto", "portable")
        for name, shape in OPERATIONS.items()
        if not (implementation == "auto" and name == "float32")
    ]
    return _correct("correct op", *cases)


def timed(
    size: str, density: float, scales: int | None, *, expected: str = "", quantized: bool = False, **options: Any
):
    """A forward at real size, checked there and timed."""
    kind = "bf16" if scales is None else f"fp8x{scales}"
    name = " ".join([kind, f"{density:.2f}", size, *(f"{option}={value}" for option, value in options.items())])
    kwargs: dict[str, Any] = {"size": size, "density": density, "scales": scales, "options": options}
    return Case(
        name=name, function=f"{_HERE}.attention:attention", kernels=kernels_of(scales, options), expected=expected,
        kwargs={**kwargs, "quantized": quantized},
    )  # fmt: skip


def _dense(size: str) -> Case:
    return Case(name=f"dense cudnn {size}", function=f"{_HERE}.attention:cudnn", kwargs={"size": size})


def _speed(name: str, *cases: Case, seconds: float = 60, baseline: bool = False) -> Family:
    environment = {**_PLAIN, **_UNTUNED}
    return Family(name=name, stage="speed", cases=cases, environment=environment, seconds=seconds, baseline=baseline)


def _pairs(size: str, density: float, scales: int | None, expected: str = "") -> Case:
    kind = "bf16" if scales is None else f"fp8x{scales}"
    return Case(
        name=f"pairs {kind} {density:.2f} {size}", function=f"{_HERE}.attention:pairs",
        kernels=kernels_of(scales, {}), kwargs={"size": size, "density": density, "scales": scales}, expected=expected,
    )  # fmt: skip


CONFIGS: tuple[dict[str, Any], ...] = (
    {"stages": 4},
    {"stages": 2},
    {"stages": 4, "cluster": 2},
    {"stages": 2, "cluster": 2},
    {"stages": 4, "polynomial_columns": 16},
    {"stages": 4, "cluster": 2, "polynomial_columns": 16},
    {"stages": 2, "polynomial_columns": 16},
    {"stages": 2, "cluster": 2, "polynomial_columns": 16},
    {"stages": 4, "polynomial_columns": 32},
    {"stages": 4, "take_turns": True},
    {"stages": 4, "cluster": 2, "take_turns": True},
    {"stages": 4, "persistent": True},
    {"stages": 4, "cluster": 2, "persistent": True},
    {"stages": 4, "promote_every": 4},
)
_FEWER = CONFIGS[:6]  # without what hardly can win
_BF16 = tuple(
    {**c, "stages": 2} for c in CONFIGS if c["stages"] == 4 and not {"polynomial_columns", "promote_every"} & set(c)
)


def _sweep(size: str, density: float, scales: int | None, configs: tuple[dict[str, Any], ...], expected: str) -> Family:
    """Each config on one window, then the best beside cuDNN in turns."""
    kind = "bf16" if scales is None else f"fp8x{scales}"
    cases = [timed(size, density, scales, expected=expected, **c) for c in configs]
    return _speed(f"{SWEEP}{kind} {density:.2f} {size}", *cases, _pairs(size, density, scales, expected), seconds=90)


def _torch(size: str) -> Family:
    cases = [
        Case(
            name=f"dense torch {name} {size}", function=f"{_HERE}.baselines:torch_sdpa",
            kwargs={"size": size, "backend": backend},
        )
        for name, backend in (("cudnn", "CUDNN_ATTENTION"), ("flash", "FLASH_ATTENTION"))
    ]  # fmt: skip
    matmuls = [Case(name="facts matmuls", function=f"{_HERE}.facts:torch_matmuls")] if size == "14B" else []
    return Family(name=f"torch {size}", stage="speed", cases=(*cases, *matmuls))


def _others(size: str) -> Family:
    """jax's own kernel: the largest configs that fit, 231,544 of 232,448 bytes with three steps of 128 keys; cuDNN's FP8."""
    cases = [
        Case(
            name=f"dense pallas {block_kv}x{steps} {size}", function=f"{_HERE}.baselines:mosaic",
            kwargs={"size": size, "block_kv": block_kv, "steps": steps},
        )
        for block_kv, steps in ((128, 2), (128, 3), (64, 4))
    ]  # fmt: skip
    fp8 = Case(name=f"peer cudnn fp8 {size}", function=f"{_HERE}.baselines:cudnn_fp8", kwargs={"size": size})
    return Family(name=f"others {size}", stage="speed", cases=(*cases, fp8), environment=_PLAIN)


def _peers() -> Family:
    def peer(name: str, function: str, **kwargs: Any) -> Case:
        return Case(name=f"peer {name}", function=f"{_HERE}.peers:{function}", kwargs=kwargs)

    return Family(
        name="peers",
        stage="peers",
        cases=(
            peer("flash-attention 3", "flash_attention_3", size="14B", dtype="bfloat16"),
            peer("flash-attention 3 fp8", "flash_attention_3", size="14B", dtype="float8_e4m3fn"),
            peer("sage attention", "sage_attention", size="14B"),
            peer("sparge attention", "sparge_attention", size="14B", density=0.2),
            peer("sliding tile attention", "sliding_tile_attention"),
        ),
    )


_WHOLE = 90  # seconds that XLA may take to compile a model, which it does in the family's turn


def _whole(model: str, steps: int) -> Family:
    names = {None: "dense", 0: "regime 1", 1: "regime 2", 2: "regime 3"}
    cases = [
        Case(
            name=f"velocity {names[regime]} {model}", function=f"{_HERE}.whole:velocity",
            kwargs={"model": model, "regime": regime}, kernels=() if regime is None else kernels_of(1, {}),
        )
        for regime in (None, 2, 0, 1)
    ]  # fmt: skip
    if steps:
        cases += [
            Case(
                name=f"denoise {attention} {model} {steps} steps", function=f"{_HERE}.whole:video",
                kwargs={"model": model, "steps": steps, "attention": attention},
                kernels=() if attention == "dense" else kernels_of(1, {}),
            )
            for attention in ("dense", "fps")
        ]  # fmt: skip
    return Family(name=f"whole {model}", stage="whole", cases=tuple(cases), seconds=150, environment=_PLAIN)


def _pipeline() -> Family:
    cases = [
        Case(
            name=f"pipeline {attention} {dtype}", function=f"{_HERE}.whole:pipeline",
            kwargs={"attention": attention, "dtype": dtype}, kernels=() if attention == "dense" else kernels_of(1, {}),
        )
        for attention, dtype in (("dense", "float32"), ("fps", "float32"), ("dense", "bfloat16"), ("fps", "bfloat16"))
    ]  # fmt: skip
    return Family(name="pipeline", stage="whole", cases=tuple(cases), seconds=100, environment=_PLAIN)


def _stream() -> Family:
    cases = [
        Case(
            name=f"stream 1.3B window {window}{'' if scales is None else ', FP8 cache'}", function=f"{_HERE}.stream:stream",
            kwargs={"window": window, "scales_per_tile": scales}, kernels=kernels_of(scales, {}),
        )
        for window, scales in ((12, None), (21, None), (21, 1))
    ]  # fmt: skip
    return Family(name="stream", stage="whole", cases=tuple(cases), seconds=150, environment=_PLAIN)


def _train() -> Family:
    """The regime of the narrowest window after dense: what a step costs most and least."""
    names = {None: "dense", 2: "regime 3", 0: "regime 1"}
    cases = [
        Case(
            name=f"train 1.3B {name}", function=f"{_HERE}.train:step", kwargs={"regime": regime},
            kernels=() if regime is None else kernels_of(1, {}), silence=60,  # nobody has timed plain XLA's backward there
        )
        for regime, name in names.items()
    ]  # fmt: skip
    return Family(name="train", stage="whole", cases=tuple(cases), seconds=150, environment=_PLAIN)


_TOOL = 110  # seconds of a program of NVIDIA's around a process; it is ended after 100


def _counters(density: float) -> Family:
    case = Case(
        name=f"counters {density:.2f}", function=f"{_HERE}.counters:counters",
        kwargs={"size": "14B", "density": density, "scales": 1}, silence=_TOOL,
    )  # fmt: skip
    return Family(name=case.name, stage="speed", cases=(case,), seconds=_TOOL)


def all_families() -> list[Family]:
    """In the order in which they run. Scales a tile: 1 coarse, 2 intermediate, 4 fine, as the default schedule pairs them."""
    machine = Case(name="facts machine", function=f"{_HERE}.facts:machine")
    quantization = Case(
        name="quantization 14B", function=f"{_HERE}.attention:quantization", kernels=("quantize",),
        kwargs={"size": "14B", "scales": 1},
    )  # fmt: skip
    checker = Case(
        name="correct memory checker", function=f"{_HERE}.correct:memory_checker", kernels=("compute-sanitizer",),
        silence=_TOOL,
    )  # fmt: skip
    return [
        Family(name="facts", stage="facts", cases=(machine,), environment=_PLAIN),
        _ladder(),
        _correct("correct tables", *_group("tables")),
        _correct("correct padding", *_group("padding", "head dim 64")),
        _speed(
            "headline",
            _dense("14B"),
            timed("14B", 0.2, 1, expected="8.7 to 9.4", quantized=True),
            timed("14B", 1.0, 1, expected="1.8 to 1.9", quantized=True),
            timed("14B", 0.12, 1, quantized=True),
            timed("14B", 0.33, 1, quantized=True),
            quantization,
            baseline=True,
        ),
        _correct("correct clusters", *_group("clusters", "persistent clusters")),
        _correct("correct options", *_group("turns", "persistent", "promotion", "polynomials")),
        _sweep("14B", 0.2, 1, CONFIGS, "8.7 to 9.4"),
        _sweep("14B", 1.0, 1, CONFIGS, "1.8 to 1.9"),
        _correct("correct granularity", *_group("granularity")),
        _torch("14B"),
        _correct("correct bf16", *_group("bf16", "bf16 clusters")),
        _quantized(),
        # With the window and the granularity that the default schedule pairs; at 0.12 that is the headline's.
        _speed(
            "scales", timed("14B", 0.2, 2, quantized=True), timed("14B", 0.33, 4, quantized=True), _pairs("14B", 0.2, 2)
        ),
        _sweep("14B", 0.33, 4, _FEWER, ""),
        _sweep("14B", 0.2, None, _BF16, ""),
        _speed(
            "headline 1.3B",
            _dense("1.3B"),
            timed("1.3B", 0.2, 1, quantized=True),
            timed("1.3B", 1.0, 1, quantized=True),
            timed("1.3B", 0.12, 1, quantized=True),
            timed("1.3B", 0.33, 4, quantized=True),
            timed("1.3B", 0.2, 1, cluster=2),
            timed("1.3B", 1.0, 1, cluster=2),
            baseline=True,
        ),
        _others("14B"),
        _counters(1.0),
        _operations(),
        _pipeline(),
        _whole("1.3B", 10),
        _train(),
        _stream(),
        _sweep("14B", 1.0, None, _BF16, ""),
        _sweep("14B", 1.0, 4, _FEWER, ""),
        _whole("14B", 0),
        _counters(0.2),
        Family(name="memory checker", stage="correct", cases=(checker,), seconds=_TOOL),
        _torch("1.3B"),
        _peers(),
    ]
