"""Read the pickles in which CIFAR is published without executing anything that they ask for.

The official "python version" archives hold pickled dictionaries of NumPy arrays. A pickle may name any
callable of the machine; this reader replaces the four names that such arrays need by inert stand-ins of its
own and refuses every other name. So the worst that a hostile file can do is to be refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from clicktrain.errors import UserError


class _Kind:
    """Stands for ``numpy.ndarray`` where a pickle passes the type on; does nothing."""


class _Type:
    """Stands for a ``numpy.dtype`` being rebuilt; only 8-bit and plain integers exist."""

    def __init__(self, code: object, *_: object) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else code
        if text not in ("u1", "i4", "i8"):
            raise pickle.UnpicklingError(f"arrays of type {text!r} are not read")
        self.code = str(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("|", "<", "=", b"|", b"<", b"="):
            raise pickle.UnpicklingError("big-endian arrays are not read")


class _Array:
    """Stands for a ``numpy.ndarray`` being rebuilt; ``value`` is the array once its state has come."""

    value: np.ndarray[Any, np.dtype[Any]] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _Type) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array is not made of plain numbers")
        flat = np.frombuffer(data, dtype="<" + dtype.code)
        if math.prod(shape) != flat.size:
            raise pickle.UnpicklingError("an array has another size than it says")
        self.value = flat.reshape(shape, order="F" if fortran_order else "C")


class _PlainUnpickler(pickle.Unpickler):
    """Admits dictionaries, lists, tuples, text, bytes, numbers and arrays; looks no other name up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = 2 * len(data)  # bytes that may be encoded: one text can be named again and again

    def find_class(self, module: str, name: str, /) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: _Array()  # a new function each time: a pickle may alter it
        if (module, name) == ("numpy", "ndarray"):
            return _Kind()
        if (module, name) == ("numpy", "dtype"):
            return lambda *arguments: _Type(*arguments)
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        """Stands for ``_codecs.encode``, by which Python 3 writes bytes in old pickles."""
        self._left -= len(text)
        if self._left < 0:
            raise pickle.UnpicklingError("it is a small file that becomes a large one")
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"text in {encoding!r} is not read")
        return text.encode("latin1")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def load_plain_pickle(data: bytes, name: str) -> dict[str, Any]:
    """Read a pickled dictionary of plain data: text keys, read-only NumPy arrays, text of Python 2 as bytes.

    Raises:
        UserError: the file is damaged, is no dictionary, or asks for anything but plain data.
    """
    try:
        _check_operations(data)
        loaded = _PlainUnpickler(data).load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError("it is no dictionary")
        return {_text(key): _plain(value) for key, value in loaded.items()}
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(
            f"{name} is not a CIFAR batch of plain data ({error}); download the official archive again"
        ) from error


_OPERATIONS = frozenset(
    """
    MARK STOP POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT
    DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE PROTO FRAME
    """.split()  # noqa: SIM905 - a literal list would be one word a line
)
"""Plain data, and the calls of stand-ins: no classes are instantiated, no registries or buffers asked."""


def _check_operations(data: bytes) -> None:
    """Refuse operations beyond plain data, lengths beyond the file, and places that it cannot have.

    The unpickler makes room for as many memo entries as the largest number says: a damaged byte could
    ask for 30 GB.
    """
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"it uses {operation.name}, which plain data does not need")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) < len(data):
            raise pickle.UnpicklingError(f"its memo has an entry numbered {argument}")


def _text(key: object) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else str(key)


def _plain(value: object) -> object:
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array has no content")
        return value.value
    return value
