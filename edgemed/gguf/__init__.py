"""GGUF files and llama.cpp: the writer, tensor names and types, sessions, vision projector and
adapters. The runtime's own library is called through ctypes, so that its types are bit for bit its
own.
"""
