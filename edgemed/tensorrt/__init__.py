"""TensorRT: the plain ONNX dialect its parser takes, the parser's tables, building and running a
plan. Where no GPU is at hand the same graphs run on ONNX Runtime for parity.
"""
