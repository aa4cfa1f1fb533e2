"""The pixels of a PIL image without a copy, through the Arrow C data interface that Pillow offers since version 11.2.

Pillow keeps an RGB pixel in four bytes. Its own way out, `tobytes`, packs them into three, one picture after the other
under Python's lock, and torch's kernels spread them over four again.

The structure is laid down in https://arrow.apache.org/docs/format/CDataInterface.html.
"""

from __future__ import annotations

import ctypes

import numpy as np
from PIL import Image


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` of the interface."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.POINTER(_ArrowArray)),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_pointer_in_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in_capsule.restype = ctypes.c_void_p
_pointer_in_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]


def shared_pixels(image: Image.Image) -> np.ndarray | None:
    """Pillow's own memory of an RGB picture. It is for reading; it stays valid when the picture is gone.

    Args:
        image: A picture of any mode.

    Returns:
        (height, width, 4) uint8, where the fourth value of a pixel means nothing. None if the picture is not RGB, if
        its memory is in several blocks (see `image_intake`), or if Pillow is older.
    """
    # With PILLOW_ALIGNMENT the rows have gaps, of which Pillow's export does not tell.
    if image.mode != "RGB" or not hasattr(image, "__arrow_c_array__") or Image.core.get_alignment() != 1:
        return None
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # several blocks
        return None
    pixels = _ArrowArray.from_address(_pointer_in_capsule(capsule, b"arrow_array"))  # a list of four bytes for each
    values = pixels.children[0].contents
    memory = (ctypes.c_uint8 * values.length).from_address(values.buffers[1])
    memory.owner = capsule  # type: ignore[attr-defined]  # which owns the memory, and lives as long as the array
    return np.asarray(memory).reshape(image.height, image.width, 4)
