"""How the C library of the host hands out memory, tuned for XLA on CPU.

XLA allocates the temporaries of a step anew each time, hundreds of megabytes, and glibc gives blocks
of that size back to the system as soon as they are free: every step then pays for the same pages
again. `docs/results.md` has what it costs.
"""

import ctypes
import mmap
import os
import sys

# Options of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
RESERVE = 4 << 30  # bytes of address space, not of memory, that may be backed by huge pages


def keep_freed_memory() -> bool:
  """Keeps freed memory in the process, in one heap of huge pages. Returns whether it could.

  Call it before anything is computed. The process then stays as large as it ever was, which is
  right for a program that repeats a step. Does nothing where there is an accelerator to compute
  on, or another C library.
  """
  if sys.platform != "linux" or os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "gnu_get_libc_version"):
    return False
  for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
    libc.mallopt(option, value)
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  start = libc.malloc(RESERVE)
  if start is None:  # a limit on address space
    return True
  page = mmap.PAGESIZE
  first = -(-start // page) * page
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  libc.madvise(first, RESERVE - page, mmap.MADV_HUGEPAGE)
  libc.free.argtypes = [ctypes.c_void_p]
  libc.free(start)
  return True
