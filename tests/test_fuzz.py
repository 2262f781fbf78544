"""A short run of the fuzzer on fixed seeds; `make fuzz SECONDS=60` goes on from new ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz.py"


def fuzz(*args):
    return subprocess.run([sys.executable, FUZZ, *args], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("seed", [0, 1000])
def test_random_sequences_do_what_a_user_expects(seed):
    done = fuzz("--seed", str(seed), "--count", "100", "--seconds", "250")
    assert done.returncode == 0, done.stdout + done.stderr
