"""The pretraining driver: `python driver/pretrain.py --help`."""

import os

# torch would print twenty lines of its stack for each message that no longer reaches a rank that was killed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
