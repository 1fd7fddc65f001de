"""Which JetPack a Jetson runs, and with it which TensorRT it has: read from the files NVIDIA's
releases leave behind.

An engine is exported on another desk, so a person must be told which profile to choose before the
first file is copied.
"""

from __future__ import annotations
