"""The native library in this process: that of the wheel, or built on first use (`python -m flexmoe.kernels.native` builds it
ahead of time).

Its threads are those of the OpenMP runtime that torch has already loaded (its `GOMP_parallel` is handed over as a pointer,
nothing is linked): a second runtime would keep a second pool of spinning threads on the same cores. Calls release the
GIL.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import logging
import os
import re
from pathlib import Path

import torch

from flexmoe.kernels.native.build import SETS, BuildError, build
from flexmoe.kernels.native.portable import prebuilt

logger = logging.getLogger(__name__)

#: How the C functions are told the dtype.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Build and load the library once per process.

    Returns:
        The library, or None when it is disabled (FLEXMOE_NATIVE=0) or cannot be built; the reason is logged once. With the
        name of a set of instructions (`build.SETS`) in FLEXMOE_NATIVE it is compiled for these.
    """
    wanted = os.environ.get("FLEXMOE_NATIVE")
    if wanted == "0":
        return None
    try:
        if wanted not in (None, "", "1", *SETS):
            raise BuildError(f"FLEXMOE_NATIVE is {wanted!r}; it may be 0 or one of {', '.join(SETS)}")
        library = ctypes.CDLL(str(build(wanted) if wanted in SETS else prebuilt() or build()))
    except (BuildError, OSError) as error:
        logger.warning("The CPU computes attention, products and norms in torch, slower than in native code: %s", error)
        return None
    _declare(library)
    library.flexmoe_set_parallel(gomp_parallel())
    return library


def available() -> bool:
    """Whether the native functions can be called; builds the library on first use."""
    return load() is not None


def has_tiles() -> bool:
    """Whether the library multiplies bf16 in tiles of AMX: it was compiled for it, and CPU and system have it."""
    library = load()
    return library is not None and bool(library.flexmoe_has_tiles())


def required() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it is not available (ask `available()` first).
    """
    library = load()
    if library is None:
        raise RuntimeError("native code is disabled or could not be built; call available() first")
    return library


def _declare(library: ctypes.CDLL) -> None:
    """The arguments and results of the C functions, as `attention.cpp` has them."""
    pointer, int64, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.flexmoe_set_parallel.argtypes = [pointer]
    library.flexmoe_set_parallel.restype = None
    library.flexmoe_has_tiles.restype = integer
    queries, pools = (integer, integer, integer, pointer, int64, int64), (pointer, pointer, int64, int64)
    tables, sizes = (pointer, int64, int64, pointer, pointer), (integer,) * 6
    library.flexmoe_attention.argtypes = (
        *queries,
        *pools,
        *tables,
        pointer,
        pointer,
        integer,
        pointer,
        *sizes,
        ctypes.c_float,
        integer,
    )
    library.flexmoe_attention.restype = integer
    library.flexmoe_products.argtypes = [integer, pointer, int64, *[pointer] * 3, *[integer] * 3, pointer, integer]
    library.flexmoe_products.restype = integer
    library.flexmoe_unpack.argtypes = [pointer, pointer, *[integer] * 3, pointer, integer]
    library.flexmoe_unpack.restype = integer
    library.flexmoe_packed_products.argtypes = [
        pointer,
        pointer,
        integer,
        pointer,
        int64,
        *[pointer] * 2,
        *[integer] * 2,
    ]
    library.flexmoe_packed_products.restype = integer
    library.flexmoe_largest.argtypes = [integer, pointer, int64, pointer, *[integer] * 3]
    library.flexmoe_largest.restype = None
    library.flexmoe_winners.argtypes = [pointer, int64, *[pointer] * 2, *[integer] * 3]
    library.flexmoe_winners.restype = None


def gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime of this process, None where there is none."""
    candidates: list[str] = []
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        candidates += re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)
    except OSError:
        pass
    package = Path(torch.__file__).parent
    candidates += glob.glob(str(package / "lib" / "libgomp*.so*")) + glob.glob(f"{package}.libs/libgomp*.so*")
    for path in dict.fromkeys([*candidates, "libgomp.so.1"]):
        try:
            # This also loads LLVM's and Intel's runtimes, which export the same entry point.
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
