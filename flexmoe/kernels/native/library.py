"""Paged attention and grouped products (`products`) on CPU cores, in C++ compiled on first use (`python -m flexmoe.kernels.native` compiles it ahead of time).

The library is one translation unit without torch headers behind a C ABI: `attention.cpp` and the headers beside it. Its
threads are those of the OpenMP runtime that torch has already loaded (its `GOMP_parallel` is handed over as a pointer,
nothing is linked): a second runtime would keep a second pool of spinning threads on the same cores. Calls release the
GIL.

Legend: T query tokens, H query heads, G KV heads, D head size, B rows.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["available", "build", "load", "paged_attention"]

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("attention.cpp")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread", "-w")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT_LIMIT = 2**31
_STATUS_SENTENCES = {
    1: "q_starts must rise from 0 or more to at most the number of query tokens",
    2: "context_lens must count at least a row's queries and at most what its block table can hold",
    3: "block_tables names a block that k_pool does not have, at a position that a query attends to",
}


class _BuildError(Exception):
    """Why there is no library; becomes one warning."""


# ---- build --------------------------------------------------------------------------------------------------------


def _cache_directory() -> Path:
    """Return the directory for compiled libraries, created private; refuse one that others could write to."""
    chosen = os.environ.get("FLEXMOE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(chosen) if chosen else Path(base) / "flexmoe"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid() or status.st_mode & stat.S_IWOTH:
        raise _BuildError(
            f"{directory} belongs to another user or is writable by everyone; set FLEXMOE_CACHE to a private directory"
        )
    return directory


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    raise _BuildError("no C++ compiler was found; install g++ or clang++, or set CXX")


def _cpu_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
    return found.group(0) if found else ""


def _machine_flag() -> str:
    return "-mcpu=native" if os.uname().machine == "aarch64" else "-march=native"


def _cache_key(*circumstances: str) -> str:
    digest = hashlib.sha256("\0".join(circumstances).encode())
    # attention.cpp includes the headers beside it, so a change in any of them is another library.
    for path in sorted((*_SOURCE.parent.glob("*.cpp"), *_SOURCE.parent.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:24]


def build() -> Path:
    """Compile the library unless the cache has it for these sources, compiler, flags and CPU; return its path.

    Raises:
        _BuildError: no compiler, a failed compilation, or no safe cache directory.
    """
    compiler, flags = _compiler(), (*_FLAGS, _machine_flag())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    target = _cache_directory() / f"attention-{_cache_key(version, *flags, _cpu_flags())}.so"
    if target.exists():
        return target
    # Several processes may race: each compiles under its own name, the last rename wins, all are equal.
    handle, temporary = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        result = subprocess.run(
            [compiler, *flags, str(_SOURCE), "-o", temporary], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise _BuildError(f"{compiler} failed: {result.stderr.strip()[:1000]}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


# ---- load ---------------------------------------------------------------------------------------------------------


def _gomp_parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime of this process, None where there is none."""
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


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("FLEXMOE_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (_BuildError, OSError) as error:
        logger.warning("Attention on the CPU runs in torch, slower than in native code: %s", error)
        return None
    pointer, int64, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.flexmoe_set_parallel.argtypes = [pointer]
    library.flexmoe_set_parallel.restype = None
    library.flexmoe_set_parallel(_gomp_parallel())
    library.flexmoe_attention.restype = integer
    library.flexmoe_attention.argtypes = [
        integer, pointer, int64, int64, pointer, pointer, int64, int64, pointer, int64, int64, pointer, pointer,
        pointer, *[integer] * 6, ctypes.c_float, integer,
    ]  # fmt: skip
    library.flexmoe_products.restype = integer
    library.flexmoe_products.argtypes = [integer, pointer, int64, *[pointer] * 3, *[integer] * 4]
    return library


def load() -> ctypes.CDLL | None:
    """Build and load the library once per process.

    Returns:
        The library, or None when it is disabled (FLEXMOE_NATIVE=0) or cannot be built; the reason is logged once.
    """
    return _library()


def available() -> bool:
    """Return whether `paged_attention` can be called; builds the library on first use."""
    return load() is not None


# ---- call ---------------------------------------------------------------------------------------------------------


def paged_attention(
    q_THD: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    block_tables: torch.Tensor,
    q_starts: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    out: torch.Tensor | None = None,
    window: int = 0,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of ragged rows over a paged KV cache, on CPU cores.

    Row b's queries `q_THD[q_starts[b]:q_starts[b + 1]]` stand at its last positions, `context_lens[b] - 1` the last;
    their own keys and values are in the pools already. The key at position t lies in block
    `block_tables[b, t // block_tokens]` at `t % block_tokens`. Accumulation is fp32; the result of a row depends
    neither on the other rows nor on the number of threads.

    Args:
        q_THD: queries, fp32, bf16 or fp16; the token stride is free, the rest contiguous.
        k_pool, v_pool: [blocks, block_tokens, G, D], same dtype; the block stride is free, the rest contiguous.
        block_tables: int32 [B, W]; entries that no query of the row sees may be anything.
        q_starts: int32 [B + 1]. A row without queries is skipped.
        context_lens: int32 [B], tokens in the cache including this run.
        scale: factor of the scores.
        out: contiguous [T, H, D] to write to; made when absent. Tokens outside q_starts are left alone.
        window: 0, or a query at p sees keys in (p - window, p].
        num_threads: torch's number of threads when absent.

    Returns:
        `out`.

    Raises:
        ValueError: the tensors do not fit together, or an index is out of range.
        RuntimeError: the library is not available (ask `available()` first).
        MemoryError: a thread got no scratch memory.
    """
    library = load()
    if library is None:
        raise RuntimeError("native attention is disabled or could not be built; call available() first")
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format) if out is None else out
    _check(q_THD, k_pool, v_pool, out, block_tables, q_starts, context_lens, window, scale)
    tokens, heads, size = q_THD.shape
    blocks, block_tokens, kv_heads, _ = k_pool.shape
    rows, width = block_tables.shape
    if rows == 0:
        return out
    status = library.flexmoe_attention(
        DTYPE_CODES[q_THD.dtype], q_THD.data_ptr(), q_THD.stride(0), tokens,
        k_pool.data_ptr(), v_pool.data_ptr(), k_pool.stride(0), blocks,
        block_tables.data_ptr(), block_tables.stride(0), width, q_starts.data_ptr(), context_lens.data_ptr(),
        out.data_ptr(), rows, heads, kv_heads, size, block_tokens, window, scale,
        torch.get_num_threads() if num_threads is None else max(1, num_threads),
    )  # fmt: skip
    if status in _STATUS_SENTENCES:
        raise ValueError(_STATUS_SENTENCES[status])
    if status:
        raise MemoryError("native attention could not allocate its scratch memory")
    return out


def _check(q, k, v, out, tables, starts, lens, window: int, scale: float) -> None:
    """Raise ValueError unless the tensors fit together. Plain comparisons: this runs once per layer and sweep."""
    if q.dtype not in DTYPE_CODES or not q.dtype == k.dtype == v.dtype == out.dtype:
        raise ValueError(
            f"q, k_pool, v_pool and out must share fp32, bf16 or fp16, not {q.dtype}, {k.dtype}, {v.dtype}, {out.dtype}"
        )
    if not all(x.device.type == "cpu" for x in (q, k, v, out, tables, starts, lens)):
        raise ValueError("native attention takes CPU tensors only")
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or k.shape[3] != q.shape[2] or 0 in k.shape[1:]:
        raise ValueError(f"q {[*q.shape]} and pools {[*k.shape]}, {[*v.shape]} are not [T, H, D] and [N, tokens, G, D]")
    if q.shape[1] == 0 or q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[2]} KV heads evenly")
    inner = (k.shape[2] * k.shape[3], k.shape[3], 1)
    if k.stride()[1:] != inner or v.stride()[1:] != inner or k.stride(0) != v.stride(0) or k.stride(0) < 0:
        raise ValueError("each block of the pools must be contiguous, and both pools have one block stride")
    if q.stride()[1:] != (q.shape[2], 1) or out.shape != q.shape or not out.is_contiguous():
        raise ValueError("each token of q must be contiguous, and out must be contiguous with q's shape")
    if not tables.dtype == starts.dtype == lens.dtype == torch.int32:
        raise ValueError(f"index tensors must be int32, not {tables.dtype}, {starts.dtype}, {lens.dtype}")
    if tables.dim() != 2 or starts.shape != (len(tables) + 1,) or lens.shape != (len(tables),):
        raise ValueError(
            f"block_tables {[*tables.shape]}, q_starts {[*starts.shape]} and context_lens {[*lens.shape]} are not "
            "[B, W], [B + 1] and [B]"
        )
    if starts.stride(0) != 1 or lens.stride(0) != 1 or (tables.shape[1] > 1 and tables.stride(1) != 1):
        raise ValueError("index tensors must be contiguous in their last dimension")
    if not 0 <= window < _INT_LIMIT or q.shape[0] * q.shape[1] >= _INT_LIMIT:
        raise ValueError(f"window must be 0 or more, not {window}, and fit 32 bits like the number of query vectors")
