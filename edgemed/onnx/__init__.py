"""ONNX graphs and ONNX Runtime: the decoder and the vision encoder as graphs, their dialect,
sessions and adapter files. Graphs are written from the tensors, never traced.
"""
