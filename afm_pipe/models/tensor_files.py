"""What a file of tensors declares, looked at before it is opened: nothing in it is run, nothing large is allocated.

safetensors checks its own offsets; a header of gigabytes it would read. PyTorch's `weights_only` runs no code, yet by
itself would inflate compressed entries, believe the sizes that a pickle states, and hash tuples nested so that it
takes years. So only archives as torch.save writes them are opened, mapped instead of read.
"""

import pickletools
import struct
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

LARGEST_FILE = 32 << 30  # bytes; the optimizer of the largest size, in fp32, has 6
LARGEST_HEADER = 16 << 20  # bytes; that of the largest size has 0.1
LARGEST_PICKLE = 16 << 20
ASIDE = "Nothing in it was run. If you trust its origin, save its state dict by itself, best as safetensors."


def check_file(path: Path) -> None:
    """Raise UserError unless `path` is a plain file of a size that weights can have."""
    if not path.is_file():
        raise UserError(f"Found no file {path}, expected weights: check the path.")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(
            f"Found {path} of {size:,} bytes, expected at most {LARGEST_FILE:,}: no model here is so large."
        )


def check_safetensors(path: Path) -> None:
    """Raise UserError for a header that is too long to read, or that the file does not hold."""
    check_file(path)
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= length <= min(LARGEST_HEADER, path.stat().st_size - 8):
        raise UserError(
            f"Found {path} unreadable as safetensors (a header of {length:,} bytes), expected one of at most "
            f"{LARGEST_HEADER:,}, all of it in the file: fetch it again."
        )


def check_pickled(path: Path) -> None:
    """Raise UserError for what torch.save does not write: another container, compressed entries, tuples used twice."""
    check_file(path)
    if not _is_archive(path):
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        if pickled:
            raise UserError(
                f"Found {path} holding a bare pickle, expected the archive that torch.save has written since "
                f"1.6. {ASIDE}"
            )
        raise UserError(
            f"Found {path} unreadable as a file of tensors (it is no whole archive of torch.save): fetch it again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            orders = [archive.read(entry) for entry in entries if _is_order(entry)]
            wrong = None
            if len({entry.filename for entry in entries}) < len(entries):
                wrong = "an entry twice"
            elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                wrong = "compressed entries"
            elif len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                wrong = f"{len(pickles)} pickles, or one of more than {LARGEST_PICKLE:,} bytes"
            elif any(order != b"little" for order in orders):
                wrong = "numbers whose bytes are not in little-endian order"
            wrong = wrong or _twice(archive.read(pickles[0]))
    except UserError:
        raise
    except Exception as error:  # whatever the reader of archives makes of damaged or hostile bytes
        raise UserError(f"Found {path} unreadable as a file of tensors ({error}): fetch it again.") from None
    if wrong:
        raise UserError(f"Found {path} with {wrong}, expected an archive as torch.save writes it. {ASIDE}")


def check_plain(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError naming tensors that are not plain blocks of numbers: sparse, without values, or values repeated.

    A pickle can give one number the shape of a terabyte, which is allocated at the first sum.
    """
    wrong = [name for name, tensor in tensors.items() if not _is_plain(tensor)]
    if wrong:
        raise UserError(
            f"Found {path} with {', '.join(name[:80] for name in wrong[:5])} sparse, quantized, or of fewer numbers "
            "than its shape says; expected plain tensors: save the generator's state dict by itself."
        )


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # the end of an archive, which says that there are more disks of it
        return False


def _is_order(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.endswith("/byteorder") and entry.file_size <= 16


def _twice(content: bytes) -> str | None:
    """Tell whether a pickle uses a tuple again: nested so, forty of them take as long to hash as 2 to the 40."""
    kept: dict[int | None, bool] = {}
    before = ""
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name.endswith("PUT"):
            kept[argument] = before.startswith("TUPLE")
        elif name.endswith("GET") and kept.get(argument) or name in ("DUP", "MEMOIZE"):
            return "a tuple used again"
        before = name if not name.endswith("PUT") else before
    return None
