"""Shared by all tests: the CPU accelerator, closed networks, no hub."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from unlearn_ds import vector_math

vector_math.settle()
