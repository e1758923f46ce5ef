"""On which device the tests of a GPU run. TRM_TEST_DEVICE=cpu runs those that need no GPU on a CPU: for typos."""

import os

import pytest

from trm.device import use_device

DEVICE = os.environ.get("TRM_TEST_DEVICE", "cuda")
HAS_GPU = use_device("auto") == "cuda"  # with the kernels that a server uses

on_device = pytest.mark.skipif(DEVICE == "cuda" and not HAS_GPU, reason="torch finds no GPU here")
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU here, and a CPU cannot stand for it")
