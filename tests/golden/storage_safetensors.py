"""Golden for the safetensors writer and reader: a file by the reference implementation.

    pip install safetensors numpy && python tests/golden/storage_safetensors.py

Holds tensors of several element types whose names sort differently than their types. Seed 7.
"""
import pathlib

import numpy as np
from safetensors.numpy import save_file


def main() -> None:
    random = np.random.default_rng(7)
    tensors = {
        "z.weight": random.standard_normal((3, 2)).astype(np.float32),
        "a.weight": random.standard_normal((2, 2)).astype(np.float16),
        "m.ids": random.integers(-5, 5, (4,)).astype(np.int64),
        "b.bytes": random.integers(0, 255, (3,)).astype(np.uint8),
        "scalar": np.array(2.5, dtype=np.float64),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    save_file(tensors, pathlib.Path(__file__).with_name("storage_reference.safetensors"),
              metadata={"format": "pt"})


if __name__ == "__main__":
    main()
