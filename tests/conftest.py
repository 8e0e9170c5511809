"""Shared by all tests: the CPU accelerator, closed networks, no hub."""

import os
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, and so would all be that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Tests kill processes, some while they hold the lock of an extension; all that could build one are on this machine.
os.environ.setdefault("UNLEARN_DS_STALE_LOCK_S", "5")

import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must stand before triton's first import

from unlearn_ds.kernels import vector_math

vector_math.settle()
