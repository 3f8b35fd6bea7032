"""Golden for GGUF dequantization: random blocks of every supported type and what the `gguf` package makes of
them, in f32. Writes storage_gguf.bin: per type a line "type blocks", then block bytes, then f32 values.

    pip install gguf==0.19.0 numpy && python tests/golden/storage_gguf.py

Scales are drawn as ordinary halves (no NaN or infinity), all other bits uniformly. Seed 20261122.
"""
import pathlib

import gguf
import numpy as np

TYPES = {  # name: offsets of the half-precision scales within a block
    "F32": [], "F16": [], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
BLOCKS = 4


def main() -> None:
    random = np.random.default_rng(20261122)
    out = pathlib.Path(__file__).with_name("storage_gguf.bin")
    with out.open("wb") as file:
        for name, scales in TYPES.items():
            kind = gguf.GGMLQuantizationType[name]
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            blocks = BLOCKS if elements > 1 else 64
            data = random.integers(0, 256, (blocks, size), dtype=np.uint8)
            if elements == 1:
                values = random.standard_normal(blocks).astype(np.float32)
                if name == "F32":
                    data = values.view(np.uint8).reshape(blocks, 4)
                elif name == "F16":
                    data = values.astype(np.float16).view(np.uint8).reshape(blocks, 2)
                else:
                    data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(blocks, 2)
            for offset in scales:
                half = (random.standard_normal(blocks) * 0.05).astype(np.float16)
                data[:, offset:offset + 2] = half.view(np.uint8).reshape(blocks, 2)
            values = gguf.quants.dequantize(data.reshape(1, -1), kind).astype(np.float32).reshape(-1)
            assert values.size == blocks * elements
            file.write(f"{name.lower()} {blocks}\n".encode())
            file.write(data.tobytes())
            file.write(values.tobytes())


if __name__ == "__main__":
    main()
