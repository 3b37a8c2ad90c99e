"""Train a small chat model through base, mid and SFT on one 8 GB GPU, driven by YAML recipes."""

import logging

__version__ = "0.1.0"

# on every CPU without an optional kernel it warns of 4-bit products, which hfsft makes on CUDA only
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
