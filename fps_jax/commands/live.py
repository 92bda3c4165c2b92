"""fps-live: an endless video in a browser while it is made, from a causal model."""

import importlib.util
import ipaddress
import pathlib
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fps_jax.choices import check_fps, check_text
from fps_jax.commands.options import StreamOptions, causal_config
from fps_jax.errors import parse, run_cli
from fps_jax.progress import Quiet, waiting

if TYPE_CHECKING:
    from fps_jax.live.server import Live

_EXTRA = ("starlette", "uvicorn", "websockets")


@dataclass(frozen=True, kw_only=True)
class Watch(StreamOptions):
    """Make a video block after block from a causal Wan2.1 checkpoint (Self-Forcing, CausVid), and show it in a browser meanwhile.

    MODEL demo is the package's own small model.
    """

    host: str = "127.0.0.1"
    """Address to listen on: this machine alone, unless another one is given (0.0.0.0: all of its own)."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allow_host: tuple[str, ...] = ()
    """Names that the page may be opened by, beside localhost, this machine's name and IP addresses."""
    prompt: str | None = None
    """What the page's prompt box begins with."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of fps-live."""
    sys.exit(run_cli(lambda args: _live(parse(Watch, args, prog="fps-live")), argv))


def _live(options: Watch) -> None:
    _check(options)
    from fps_jax.live.serve import listen, serve, url

    with listen(options.host, options.port) as sock:
        live = _load(options)
        if not _is_loopback(options.host):
            _tell(f"host={options.host!r}: anyone who can reach this machine there can watch, and write prompts")
        _tell(f"open {url(options.host, sock)} in a browser; Ctrl-C ends it")
        serve(live, sock, [*options.allow_host, options.host])


def _check(options: Watch) -> None:
    """What can be known without jax or a checkpoint."""
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise NotImplementedError(f"fps-live needs {', '.join(missing)}; pip install 'fps-jax[live]'")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"port={options.port} is not in 0 to 65535; 0 takes a free one")
    for name in options.allow_host:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
            raise ValueError(f"allow_host={name[:80]!r} is not a host's name, such as gpu7.example.org, without a port")
    if options.prompt is not None:
        if not options.prompt.strip():
            raise ValueError(f"prompt={options.prompt!r} is not a text; give a few words, or leave it out")
        check_text("prompt", options.prompt)
    check_fps(options.fps)


def _load(options: Watch) -> "Live":
    """The model, which is checked in full before its weights are read."""
    from fps_jax.checkpoints.open import open_model
    from fps_jax.live import demo
    from fps_jax.live.server import Live
    from fps_jax.sampling.stream import CausalPipeline
    from fps_jax.sampling.stream_plan import StreamPlan

    is_demo = options.model == "demo"
    model = open_model(str(demo.MODEL) if is_demo else options.model)
    causal = causal_config(options, model.config, demo.CAUSAL if is_demo else None)
    facts = {"model": options.model if is_demo else pathlib.Path(options.model).name, "prompt": "", "examples": []}
    facts |= (demo.FACTS if is_demo else {}) | ({} if options.prompt is None else {"prompt": options.prompt})
    size = (options.height, options.width)
    prompt: str = facts["prompt"] or "any"
    settings: dict[str, Any] = {"seed": options.seed, "kv_cache": options.kv_cache}
    StreamPlan.build(model.config, causal, prompt, size=size, **settings)
    _tell("loading the model")
    with waiting("loading the model"):
        pipe = CausalPipeline.from_pretrained(model.directory, causal=causal, dtype=options.dtype)
    return Live(lambda prompt: pipe.session(prompt, height=size[0], width=size[1], **settings), options.fps, facts)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tell(line: str) -> None:
    print(line, file=Quiet(sys.stderr), flush=True)
