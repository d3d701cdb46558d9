"""Whether freed tensors leave a process, or wait there to be used again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
import torch
from fedmp.pipeline import keep_near_plan

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

is_kept = keep_near_plan(80 << 20, int(sys.argv[1]) << 20)
torch.empty(1 << 23)  # freed at once: by itself, malloc now keeps tensors of up to 32 MiB on its heap
before = resident_mib()
tensors = [torch.full((100_000,), float(index)) for index in range(300)]  # 114 MiB
del tensors[::2]  # no place at the end of the heap, where malloc itself would give it back
print(json.dumps([is_kept, resident_mib() - before]))
"""


def grown(memory_mib: int) -> tuple[bool, int]:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(memory_mib)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    is_kept, mib = json.loads(run.stdout)
    return is_kept, mib


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_freed_tensors_leave_the_process_where_memory_is_short_and_only_there() -> None:
    assert grown(memory_mib=1024) == (False, pytest.approx(115, abs=8))
    assert grown(memory_mib=199) == (True, pytest.approx(58, abs=8))


KEEPING = """
import json, os, resource
import torch
from fedmp.pipeline import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def again():
    before = faults()
    for _ in range(20):
        a = torch.ones(1 << 19)  # 2 MiB each
        b, c = a + 1, a * 2
    return faults() - before

again()
usual = again()
is_kept = keep_freed()
again()
print(json.dumps([is_kept, usual, again()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_tensors_that_are_made_over_and_over_may_stay_where_they_are() -> None:
    # by itself malloc keeps them or not, as they happen to lie; told so, it gives all of them back
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    run = subprocess.run(
        [sys.executable, "-c", KEEPING], env=given_back, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    is_kept, usual, kept = json.loads(run.stdout)
    assert is_kept
    assert kept < usual / 5, "pages that the system had to clear anew"


GIVING_BACK = """
import json, os
import torch
from fedmp.pipeline import give_back, keep_freed

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

keep_freed()
tensors = [torch.ones(1 << 18) for _ in range(128)]  # 1 MiB each
held = resident_mib()
del tensors
freed = resident_mib()
give_back()
print(json.dumps([held, freed, resident_mib()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_kept_memory_goes_back_when_it_is_not_needed_any_more() -> None:
    run = subprocess.run([sys.executable, "-c", GIVING_BACK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    held, freed, left = json.loads(run.stdout)
    assert freed > held - 16
    assert left < held - 112
