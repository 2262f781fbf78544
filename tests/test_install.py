"""An installation on a machine that cannot compile: it succeeds, and the optimizer steps on the reference backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".venv", ".git", "build", "runs", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignore)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    broken = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run([*install, "--target", tmp_path / "site", source], check=True, env=broken)
    assert not list((tmp_path / "site/collage").glob("_native*"))
    assert list((tmp_path / "site").glob("collage_optim-*.dist-info"))
