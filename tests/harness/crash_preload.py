"""What the fork server of tests/harness/crash.py imports once, before it forks ranks; nothing here may start a
thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers.models.llama.modeling_llama  # noqa: F401

import rmcore.parallel.ddp
import rmcore.parallel.fsdp
import rmcore.train  # noqa: F401
