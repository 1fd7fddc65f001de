"""The machine something was measured on, and the device a run was made for.

A speed without them says nothing, so every record carries the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from edgemed.documents.document import Document
from edgemed.params import Doc, Range

Count = Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class Machine(Document):
    """What something was measured on."""

    label: Annotated[str, Doc("short and stable")]
    cpu: str
    architecture: str
    logical_cores: Count
    physical_cores: Count
    flags: Annotated[tuple[str, ...], Doc("instruction sets that decide which kernels run")]
    cache_bytes: Annotated[int, Range(0), Doc("last level")]
    memory_bytes: Count
    governor: str | None
    power_mode: str | None
    gpus: tuple[Mapping[str, Any], ...]
    device: Annotated[str | None, Doc("name under devices/ it was recognised as")]
    os: str


@dataclass(frozen=True, kw_only=True)
class TargetDevice(Document):
    """The device asked for, as published or measured."""

    name: str
    title: str
    memory_gb: Annotated[float | None, Doc("GiB")]
    shared_memory: Annotated[bool, Doc("weights share their memory with the operating system")]
    bandwidth_gb_s: Annotated[float | None, Doc("10^9 bytes/s")]
    recognise: Mapping[str, str]
    source: Annotated[Mapping[str, str], Doc("part of the numbers -> document")]
