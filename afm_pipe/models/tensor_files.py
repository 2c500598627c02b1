"""Checks of untrusted tensor files before they are opened: no code runs, nothing large is allocated.

safetensors checks its offsets, but would read a header of gigabytes. torch.load with `weights_only` runs no code, but
would decompress entries, trust the sizes in a pickle, and hash nested tuples forever. So only archives in the form that
torch.save writes are opened, memory-mapped.
"""

import pickletools
import re
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afm_pipe.runtime.errors import UserError

MAX_FILE = 32 << 30  # bytes; the fp32 optimizer state of the largest size has 6 << 30
MAX_HEADER = 16 << 20  # bytes; the largest size needs 0.1 << 20
MAX_PICKLE = 16 << 20
LARGEST_REUSED = 64  # values in a tuple that occurs again; parameter groups share the two betas of Adam
MAX_SKIPPED = 100  # kinds of objects
SKIPPED = re.compile(  # of the standard library: what describes settings and runs nothing
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.(defaultdict|deque)|pathlib\.\w*Path|typing\.\w+|"
    r"datetime\.\w+|decimal\.Decimal|fractions\.Fraction|uuid\.UUID|"
    r"builtins\.(dict|list|tuple|str|int|float|bool|bytes|bytearray|complex|object|range|slice)"
)
STANDARD_LIBRARY = sys.stdlib_module_names | {name.partition(".")[0] for name in IMPORT_MAPPING}  # of Python 2 too
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
    """Raise UserError for what torch.save does not write: other formats, compressed entries, large reused tuples."""
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
                wrong = f"a tuple used again that holds more than {LARGEST_REUSED} values"
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
    """Return whether a pickle reuses a tuple of many values: forty nested ones take 2^40 steps to hash.

    The values are those of each tuple as the unpickler builds it; any other object counts as one.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in ("DUP", "MEMOIZE"):  # torch.save writes neither
            return True
        if name.endswith("PUT"):
            memo[argument] = stack[-1] or 1
        elif name.endswith("GET"):
            if memo[argument] > LARGEST_REUSED:
                return True
            stack.append(memo[argument])
        else:
            taken = _pop(stack, opcode)
            built = 1 + sum(taken) if name.startswith("TUPLE") or name in ("REDUCE", "NEWOBJ") else 1
            stack += [None if each is pickletools.markobject else built for each in opcode.stack_after]
    return False


def _pop(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove what an opcode takes from the stack and return it without the mark."""
    number = len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        mark = len(stack) - 1
        while stack[mark] is not None:
            mark -= 1
        number = len(stack) - mark + opcode.stack_before.index(pickletools.markobject)
    if number > len(stack):
        raise ValueError("a pickle that takes more than it holds")
    taken = [each for each in stack[len(stack) - number :] if each is not None]
    del stack[len(stack) - number :]
    return taken


def inert_classes(path: Path) -> list[tuple[type, str]]:
    """Return classes that do nothing for the unknown objects of a checked pickle, such as argparse.Namespace.

    They replace the real ones, which are never imported. Whatever else is of the standard library gets none, so that
    torch.load refuses it.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    inert = [name for name in names if SKIPPED.fullmatch(name) or name.partition(".")[0] not in STANDARD_LIBRARY]
    return [(_inert_class(name), name) for name in inert] if len(inert) <= MAX_SKIPPED else []


class Skipped:
    """An object in a pickle that is not read."""

    def __new__(cls, *_: Any) -> Any:
        """Ignore the arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class SkippedDict(Skipped):
    """A subclass of dict in a pickle, of which only the items are read."""

    def __new__(cls, *_: Any) -> Any:
        """Return what the unpickler adds items to."""
        return OrderedDict()


def _inert_class(name: str) -> type:
    kind = SkippedDict if re.search(r"dict$|munch$|box$", name.lower()) else Skipped
    return type(name.rpartition(".")[2][:80] or "object", (kind,), {})
