"""Freed memory that stays with the process; each case is a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fluxcore.host_memory import TUNED_ELSEWHERE

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs Linux with glibc"
)

TURNS = """
import resource, sys, threading
from fluxcore.host_memory import give_back_freed_memory, keep_freed_memory
if "keep" in sys.argv:
    print(keep_freed_memory())
import torch
def turns(count):
    for _ in range(count):
        torch.ones(16 * 2**20)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def in_a_thread():
    thread = threading.Thread(target=turns, args=(20,))
    thread.start()
    thread.join()
for work in (lambda: turns(20), in_a_thread):
    turns(2)
    before = faults()
    work()
    print(faults() - before)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
held = resident()
give_back_freed_memory()
print(held - resident())
"""


def run(*arguments: str, **variables: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if name not in TUNED_ELSEWHERE}
    done = subprocess.run(
        [sys.executable, "-c", TURNS, *arguments],
        env=clean | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.split()


@needs_glibc
def test_pages_are_used_again_in_every_thread_and_given_back_when_asked() -> None:
    is_done, *faults, freed = run("keep")
    assert is_done == "True"
    # 20 tensors of 64 MB have 330 thousand pages of 4 KB.
    assert all(int(count) < 20_000 for count in faults), faults
    assert int(freed) > 50 * 10**6


@needs_glibc
def test_by_itself_the_library_takes_new_pages_each_time() -> None:
    first, *_ = run(THP_MEM_ALLOC_ENABLE="0")
    assert int(first) > 300_000


@needs_glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_a_user_s_own_choice_stays(name: str) -> None:
    value = "glibc.malloc.check=0" if name == "GLIBC_TUNABLES" else "131072"
    is_done, *_ = run("keep", **{name: value})
    assert is_done == "False"
