"""Builds the libraries that a wheel carries: `python -m qexp_kernels.for_wheel [LEVEL...] [cuda]`.

It stands apart from `build`, which the package itself imports: Python warns where it runs such a module as a program.
"""

import logging
import shutil
import sys

from . import build
from .toolkit import known_capabilities


def main() -> None:
    """Builds the libraries that a wheel carries, or copies them from the cache: for each processor level named, and for `cuda`."""
    allowed = (*build.LEVELS.values(), "cuda") if build.level().startswith("x86-64-") else (build.level(), "cuda")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build.CARRIED.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [n for n in allowed if n != "cuda"]:
        if name not in allowed:
            sys.exit(f"{name} is not allowed; use {', '.join(allowed)}")
        kind = "cuda" if name == "cuda" else "cpp"
        capabilities = [c for c in build.CAPABILITIES if c in known_capabilities()] if kind == "cuda" else []
        target = build.CARRIED / build.library_name(kind, name, capabilities)
        for old in build.CARRIED.glob(f"{'-'.join(target.name.split('-')[: 2 if kind == 'cuda' else -1])}-*.so"):
            if old != target:
                old.unlink()
        kept = build.cache_folder() / target.name
        if not target.exists() and kept.exists():
            shutil.copy(kept, target)
        elif not target.exists():
            build.compile_library(kind, target, name, capabilities)
        print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
