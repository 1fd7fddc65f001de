"""Reading checkpoints: configuration, tensor names, tokenizers, adapters, packed weights, and the
float32 decoder in torch. One canonical form comes out, so that no later package knows a family's
names.
"""
