"""Environment of every test and of the processes that tests start. Set before torch is imported."""

import os

# One torch thread per xdist worker: the workers fill the cores. Export OMP_NUM_THREADS for another number.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
