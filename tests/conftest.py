import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests fork
# For the processes that tests start as well. On a busy two-core machine two threads took fifty times longer than one; a
# quiet one can try the numbers with OMP_NUM_THREADS=2.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from kdtrain.runs.report import write
from tests import tiny

# The picture of a report takes three times as long as a whole run of the tests' size. Processes that tests start draw
# it, and so do the tests of reports.
write.write_png = lambda *_: None
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what stands before its &
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests send it to what they start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def student():
    return tiny.make_qwen3(seed=1)


@pytest.fixture
def teacher():
    return tiny.make_qwen3(seed=2, hidden=48)


@pytest.fixture
def project(tmp_path, tokenizer):
    """A folder with student, teacher, data and a config that trains in seconds."""
    return tiny.make_project(tmp_path, tokenizer)


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: every run collects, and forked ranks would copy it."""
    gc.collect()
    gc.freeze()
