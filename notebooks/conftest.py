"""The notebooks as tests: the smallest scale, a fresh store, one thread, no network."""

import os
import tempfile

os.environ |= {
    "KDLIB_SCALE": "smoke", "KDLIB_HOME": tempfile.mkdtemp(prefix="kdlib-"), "KDLIB_JOBS": "1", "KDLIB_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
