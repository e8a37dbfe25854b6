import functools
import gc
import importlib.metadata
import os
import shutil
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tests fork
# For the processes that tests start as well. On a busy two-core machine two threads took fifty times longer than one; a
# quiet one can try the numbers with OMP_NUM_THREADS=2.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import pytest
import torch
import typer.main

from kdtrain.runs.report import write
from tests import tiny

# The picture of a report takes three times as long as a whole run of the tests' size. Processes that tests start draw
# it, and so do the tests of reports.
write.write_png = lambda *_: None
# What a process that trains does a few times, and the tests' thousands of times: a third of a run of their size.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
importlib.metadata.distribution = functools.cache(importlib.metadata.distribution)
importlib.metadata.Distribution.metadata = property(functools.cache(importlib.metadata.Distribution.metadata.fget))
typer.main.get_command = functools.cache(typer.main.get_command)
datasets.Value.__deepcopy__ = lambda self, memo: self  # nothing changes one
if not torch.cuda.is_available():  # a seed for devices that are not there is kept, with the traceback of its call
    for module in (torch.cuda.random, torch.xpu.random, torch.mtia):
        module._lazy_call = lambda *_, **__: None
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


@pytest.fixture(scope="session")
def made_project(tmp_path_factory, tokenizer):
    """What `project` is a copy of."""
    return tiny.make_project(tmp_path_factory.mktemp("project"), tokenizer)


@pytest.fixture
def project(tmp_path, made_project):
    """A folder with student, teacher, data and a config that trains in seconds."""
    return shutil.copytree(made_project, tmp_path, dirs_exist_ok=True)


def pytest_collection_finish():
    _leave_out_of_collection()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_frozen():
    """What the tests of a file have imported stays, and every run would look through it again."""
    yield
    _leave_out_of_collection()


def _leave_out_of_collection():
    """Leave what was imported out of garbage collection: every run collects, and forked ranks would copy it."""
    gc.collect()
    gc.freeze()
