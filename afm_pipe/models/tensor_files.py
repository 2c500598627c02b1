"""Checks of untrusted tensor files before they are opened: no code runs, nothing large is allocated.

safetensors checks its offsets, but would read a header of gigabytes. torch.load with `weights_only` runs no code, but
would decompress entries, trust the sizes in a pickle, and hash nested tuples forever. So only archives in the form that
torch.save writes are opened, memory-mapped.
"""

import pickletools
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

MAX_FILE = 32 << 30  # bytes; the fp32 optimizer state of the largest size has 6 << 30
MAX_HEADER = 16 << 20  # bytes; the largest size needs 0.1 << 20
MAX_PICKLE = 16 << 20
ADVICE = "Nothing in it was run. If you trust its origin, save only its state dict, preferably as safetensors."


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a regular file of a plausible size."""
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected weights: check the path.")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise UserError(f"Found {path} of {size:,} bytes, expected at most {MAX_FILE:,}: check the path.")


def check_safetensors(path: Path) -> None:
    """Raise UserError if the header is too long, or longer than the file."""
    check_file(path)
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
        raise UserError(
            f"Found {path} unreadable as safetensors (a header of {length:,} bytes), expected a complete header of at "
            f"most {MAX_HEADER:,}: download it again."
        )


def check_pickled(path: Path) -> None:
    """Raise UserError for files that torch.save does not write: other formats, compressed entries, reused tuples."""
    check_file(path)
    if not _is_archive(path):
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        if pickled:
            raise UserError(
                f"Found {path} holding a bare pickle, expected the archive format of torch.save since PyTorch 1.6. "
                f"{ADVICE}"
            )
        raise UserError(
            f"Found {path} unreadable as a tensor file (not a complete torch.save archive): download it again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            byteorders = [archive.read(entry) for entry in entries if _is_byteorder(entry)]
            wrong = None
            if len({entry.filename for entry in entries}) < len(entries):
                wrong = "duplicate entries"
            elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                wrong = "compressed entries"
            elif len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
                wrong = f"{len(pickles)} pickles, or one of more than {MAX_PICKLE:,} bytes"
            elif any(order != b"little" for order in byteorders):
                wrong = "big-endian numbers"
            elif _reuses_tuple(archive.read(pickles[0])):
                wrong = "a tuple used again"
    except Exception as error:  # zipfile raises almost anything for damaged or hostile bytes
        raise UserError(f"Found {path} unreadable as a tensor file ({error}): download it again.") from None
    if wrong:
        raise UserError(f"Found {path} with {wrong}, expected an archive as torch.save writes it. {ADVICE}")


def check_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError naming tensors that are sparse, quantized, or expanded from a smaller storage.

    A pickle can expand one number to a terabyte, which the first operation would allocate.
    """
    wrong = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if wrong:
        raise UserError(
            f"Found {path} with {', '.join(name[:80] for name in wrong[:5])} sparse, quantized, or with fewer values "
            "than its shape; expected plain tensors: save only the generator's state dict."
        )


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one part of a multi-disk archive
        return False


def _is_byteorder(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.endswith("/byteorder") and entry.file_size <= 16


def _reuses_tuple(content: bytes) -> bool:
    """Return whether a pickle reuses a tuple: forty nested ones take 2^40 steps to hash."""
    is_tuple: dict[int | None, bool] = {}
    before = ""
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name.endswith("PUT"):
            is_tuple[argument] = before.startswith("TUPLE")
        elif name.endswith("GET") and is_tuple.get(argument) or name in ("DUP", "MEMOIZE"):
            return True
        before = name if not name.endswith("PUT") else before
    return False
