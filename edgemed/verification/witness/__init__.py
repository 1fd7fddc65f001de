"""The independent witness: a checkpoint as edgemed reads it, beside the same files as the library
reads them that its authors used.

An engine's float32 source is read by the same code as the engine, so parity with it says nothing
about that code. Here every step of the reading is done a second time, by transformers alone: token
ids, chat, stop tokens, pixels, which tensors are used, and scores.
"""
