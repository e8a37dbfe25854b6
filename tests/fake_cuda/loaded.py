"""Loads the stand-in; to be imported before torch, which asks once whether there is CUDA."""

import ctypes
import os

from tests.fake_cuda import LIBRARY

ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)
