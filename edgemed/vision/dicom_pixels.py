"""The stored values of one DICOM frame, decompressed by pydicom and the decoders it finds.

What a decoder is given is checked first: a compressed picture of another size than the header's
would take memory without a bound.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemed.errors import EdgemedError
from edgemed.vision.dicom_header import EXPORT_AGAIN, whole_number

LARGEST = 200_000_000  # pixels of a picture that is opened at all: more than half a gigabyte as RGB
LARGEST_FRAME = 1_000_000_000  # bytes of one frame's stored values

RUN_LENGTHS = "1.2.840.10008.1.2.5"
JPEG_FAMILY = "1.2.840.10008.1.2.4."
JPEG_2000 = {f"{JPEG_FAMILY}{n}" for n in (90, 91, 201, 202, 203)}
JPEG_8_BIT = {f"{JPEG_FAMILY}{n}" for n in (50, 51)}
JPEG = JPEG_8_BIT | {f"{JPEG_FAMILY}{n}" for n in (57, 70, 80, 81)}
# Markers of a JPEG that carry its size: SOF0 to SOF15 but DHT, JPG and DAC, and JPEG-LS' SOF55.
SIZES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
STAND_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
ADOBE = b"Adobe"


@dataclass(frozen=True)
class StoredFrame:
    """values: [rows, columns] or [rows, columns, 3]. kind: the photometric interpretation of these
    values, which a decoder may have changed. bits: those that are used of each, 0 for floats.
    """

    values: np.ndarray
    kind: str
    bits: int


@dataclass(frozen=True)
class Codestream:
    """What a compressed frame says about itself. width, height: 0 where it does not. adobe: the
    colour transform its APP14 segment declares, None without one.
    """

    width: int = 0
    height: int = 0
    adobe: int | None = None


def transfer_syntax(data: Any, name: str) -> Any:
    """The UID of how the pixels are encoded. Files without one, as of old scanners, are native in
    the byte order in which the header was read.

    Raises EdgemedError where such a file is compressed.
    """
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta = getattr(data, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta is not None else None
    if syntax:
        return syntax
    if "PixelData" in data and data["PixelData"].is_undefined_length:
        raise EdgemedError(
            f"{name} is compressed and does not say how: it has no TransferSyntaxUID", EXPORT_AGAIN
        )
    implicit, little = data.original_encoding
    if little is False:
        return ExplicitVRBigEndian
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def decoded_frame(data: Any, frame: int, frames: int, name: str) -> StoredFrame:
    """The stored values of one frame, counted from 0.

    Raises EdgemedError where no installed decoder reads the compression, and where the compressed
    picture is not the one the header describes. What pydicom raises is left as it is.
    """
    from pydicom.pixels import as_pixel_options, get_decoder

    syntax = transfer_syntax(data, name)
    options = as_pixel_options(data, number_of_frames=frames)
    _complete(options)
    _check_size(options, name)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise _undecodable(syntax, name) from None
    if syntax.is_encapsulated:
        values, properties = _decompressed(decoder, data, frame, options, name)
    else:
        high_bit = _high_bit(data, options, name)
        options["correct_unused_bits"] = high_bit is None
        values, properties = decoder.as_array(data, index=frame, raw=True, **options)
        if high_bit is not None:
            values = _from_high_bit(values, options, high_bit)
    kind = str(properties["photometric_interpretation"])
    bits = int(properties.get("bits_stored", 0)) if values.dtype.kind in "iu" else 0
    return StoredFrame(values, kind, bits)


def _decompressed(
    decoder: Any, data: Any, frame: int, options: dict[str, Any], name: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """(values, what they are now) of a compressed frame from the first decoder that reads it."""
    syntax = decoder.UID
    if not decoder.available_plugins:
        raise _undecodable(syntax, name)
    facts = _checked_codestream(data, syntax, options, frame, name)
    reasons = []
    for plugin in _plugins(decoder):
        try:
            values, properties = decoder.as_array(
                data, index=frame, raw=True, decoding_plugin=plugin, **options
            )
        except RuntimeError as error:
            # pydicom: "Unable to decode as exceptions were raised by all available plugins"
            reasons.append(str(error).rsplit("\n", 1)[-1].strip())
            continue
        declared = facts.adobe is not None and values.ndim == 3 and str(syntax) in JPEG_8_BIT
        if declared and plugin in ("pylibjpeg", "pillow"):
            # The data itself says what its components are. libjpeg's plug-in hands them out as
            # they are, Pillow converts them.
            converted = plugin == "pillow" or facts.adobe == 0
            properties["photometric_interpretation"] = "RGB" if converted else "YBR_FULL"
        return values, properties
    raise _undecodable(syntax, name, "; ".join(reasons))


def _plugins(decoder: Any) -> list[str]:
    """The decoders to try, in order. Pillow last, as in pydicom itself: it reads eight bits of a
    JPEG only.
    """
    if str(decoder.UID) == RUN_LENGTHS:
        # pylibjpeg-rle panics on damaged data, which is no exception that can be caught.
        return ["pydicom"]
    return sorted(decoder.available_plugins, key=lambda plugin: plugin == "pillow")


def _complete(options: dict[str, Any]) -> None:
    """What writers leave out and every viewer takes for granted."""
    kind = str(options.get("photometric_interpretation") or "")
    if options.get("samples_per_pixel") is None and kind.startswith(("MONOCHROME", "PALETTE")):
        options["samples_per_pixel"] = 1
    if options.get("samples_per_pixel") == 3 and options.get("planar_configuration") is None:
        options["planar_configuration"] = 0


def _check_size(options: dict[str, Any], name: str) -> None:
    factors = [
        options.get("rows"),
        options.get("columns"),
        options.get("samples_per_pixel"),
        options.get("bits_allocated"),
    ]
    if all(isinstance(factor, int) for factor in factors):
        size = int(np.prod([int(factor or 0) for factor in factors], dtype=object)) // 8
        if size > LARGEST_FRAME:
            raise EdgemedError(
                f"{name}: one frame has {size} bytes",
                f"Reduce it below {LARGEST_FRAME // 1_000_000} million bytes",
            )


def _high_bit(data: Any, options: dict[str, Any], name: str) -> int | None:
    """HighBit where the used bits are not the lowest of a stored word (retired, and still met)."""
    high_bit = whole_number(data, "HighBit", name)
    allocated = options.get("bits_allocated")
    stored = options.get("bits_stored")
    if high_bit is None or not isinstance(allocated, int) or not isinstance(stored, int):
        return None
    return high_bit if "PixelData" in data and stored - 1 < high_bit < allocated else None


def _from_high_bit(values: np.ndarray, options: dict[str, Any], high_bit: int) -> np.ndarray:
    """Words whose used bits end at HighBit, as numbers: shifted left to their sign, then back."""
    left = int(options["bits_allocated"]) - 1 - high_bit
    right = int(options["bits_allocated"]) - int(options["bits_stored"])
    return np.right_shift(np.left_shift(values, left), right)


def _checked_codestream(
    data: Any, syntax: Any, options: dict[str, Any], frame: int, name: str
) -> Codestream:
    """What a compressed frame says about itself, compared with the header before it is decoded."""
    from pydicom.encaps import get_frame

    if str(syntax) not in JPEG | JPEG_2000:
        return Codestream()
    stream = get_frame(
        data.PixelData,
        frame,
        number_of_frames=options["number_of_frames"],
        extended_offsets=options.get("extended_offsets"),
    )
    facts = codestream(stream)
    if not facts.width:
        raise EdgemedError(
            f"{name} is compressed as '{syntax.name}', and its data is no such picture",
            EXPORT_AGAIN,
        )
    if (facts.width, facts.height) != (options.get("columns"), options.get("rows")):
        raise EdgemedError(
            f"{name} is compressed as '{syntax.name}', a picture of {facts.width} x {facts.height}"
            f" pixels, and its header says {options.get('columns')} x {options.get('rows')}",
            EXPORT_AGAIN,
        )
    return facts


def codestream(stream: bytes) -> Codestream:
    """Size and colour transform of a JPEG, JPEG-LS or JPEG 2000 frame; zeros where it is none."""
    wavelet = stream.find(b"\xff\x4f\xff\x51")
    if wavelet == 0 or (wavelet > 0 and stream[4:8] == b"jP  "):
        edges = [
            int.from_bytes(stream[wavelet + at : wavelet + at + 4], "big") for at in (8, 12, 16, 20)
        ]
        return Codestream(edges[0] - edges[2], edges[1] - edges[3])
    adobe = None
    at = 2
    while stream[:2] == b"\xff\xd8" and at + 9 < len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF or marker in STAND_ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in SIZES:
            height = int.from_bytes(stream[at + 5 : at + 7], "big")
            width = int.from_bytes(stream[at + 7 : at + 9], "big")
            return Codestream(width, height, adobe)
        length = int.from_bytes(stream[at + 2 : at + 4], "big")
        segment = stream[at + 4 : at + 2 + length]
        if marker == 0xEE and segment[:5] == ADOBE and len(segment) >= 12:
            adobe = segment[11]
        at += 2 + max(2, length)
    return Codestream()


def _undecodable(syntax: Any, name: str, reason: str = "") -> EdgemedError:
    """The error that names a compression and the package that would read it."""
    # The plug-ins that pydicom finds, and the extra that brings each.
    module, extra = ("libjpeg", "dicom") if str(syntax) in JPEG else ("openjpeg", "vision")
    compressed = str(syntax) in JPEG | JPEG_2000
    if compressed and importlib.util.find_spec(module) is None:
        return EdgemedError(
            f"{name} is compressed as '{syntax.name}', which no installed decoder reads: it needs"
            f" pylibjpeg-{module}",
            f"Install it with: pip install 'edgemed[{extra}]', or export it uncompressed",
        )
    if reason:
        cause = " ".join(reason.split())[:200]
        return EdgemedError(
            f"{name} is compressed as '{syntax.name}', and its data cannot be read: {cause}",
            EXPORT_AGAIN,
        )
    return EdgemedError(
        f"{name} is compressed as '{syntax.name or syntax}', which edgemed does not read",
        "Export it from the archive uncompressed",
    )
