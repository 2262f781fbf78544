"""Environment of every test and of the processes that tests start. Set before torch is imported."""

import os
from typing import Any

# One torch thread per xdist worker: the workers fill the cores. Export OMP_NUM_THREADS for another number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("TRITON_INTERPRET", "1")  # there is no GPU in CI; `make gpu` sets 0
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

if "COLLAGE_NATIVE" in os.environ:  # `make sanitize`: kernels of another build stand in for the installed ones
    import sys
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    (path,) = Path(os.environ["COLLAGE_NATIVE"]).glob("_native*.so")
    spec = spec_from_file_location("collage._native", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["collage._native"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Begin with the longest test: otherwise one worker ends with it, and the others wait."""
    items.sort(key=lambda item: item.name != "test_compiled_code_and_the_table_in_the_docs")
