"""Where compiled programs are kept from one process to the next."""

import os
import pathlib


def enable_compilation_cache() -> None:
    """Keep compiled programs in ~/.cache/fps_jax/xla, unless JAX was already told where (or not) to keep them."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "fps_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
