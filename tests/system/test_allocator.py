"""A process that runs points asks the system for memory once, not for every batch."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from qexp.system import allocator

FAULTS = """
import ctypes, resource, torch
from qexp.system.allocator import settle
settle()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        x = torch.ones(2**23)  # 32 MiB, 8192 pages
        x = x + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    faults()
last = faults()
print(last if ctypes.CDLL(None).mallopt(-3, 64 * 2**20) else "refused")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other rules")
def test_freed_memory_is_used_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "refused":
        pytest.skip("this glibc gives blocks of 32 MiB back at once, despite the setting")
    assert int(done.stdout) < 8192


@pytest.mark.parametrize(
    ("highest", "taken"),
    [(64, [(-3, 64), (-1, 512)]), (32, [(-3, 32), (-1, 512)]), (0, [])],
    ids=["glibc", "older glibc", "none"],
)
def test_limits_are_set_together_or_not_at_all(highest, taken):
    """Trimming set alone would leave every block above 128 KiB to the system."""
    found = []

    def mallopt(number: int, value: int) -> int:
        if number == -3 and value > highest * 2**20:
            return 0
        found.append((number, value // 2**20))
        return 1

    allocator._keep(mallopt)
    assert found == taken
