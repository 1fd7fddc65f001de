"""The first layers of a GGUF file as floats, in a file of its own.

llama.cpp rounds the inputs of its products with quantized matrices, so its scores of a quantized
file say little below a few per cent. With floats in their place they are exact, and a few layers
hold every kind of tensor. It is written with the gguf package's own reader and routines: nothing of
edgemed's reading is in it.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgemed.errors import need

BLOCK = re.compile(r"blk\.(\d+)\.")


def write_float_twin(source: Path, out: Path, blocks: int) -> None:
    """Write `out`: the metadata of `source` with `blocks` layers, and float32 tensors of the first
    `blocks` of them.
    """
    gguf = need("gguf", "build")
    reader = gguf.GGUFReader(source)
    arch = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, arch, use_temp_file=True)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = blocks if name == f"{arch}.block_count" else field.contents()
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, field.types[0], field.types[-1] if is_list else None)
    for tensor in reader.tensors:
        block = BLOCK.match(tensor.name)
        if block is None or int(block[1]) < blocks:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1].tolist()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
