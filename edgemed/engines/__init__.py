"""The engine: a self-contained directory that travels to the device, and what its float32 source
answered. Opening one needs no torch.
"""
