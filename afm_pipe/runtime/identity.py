"""The identity of a piece of work: a hash of everything that shapes its numbers; and a digest of the code that made it.

Working state is kept under the identity, so state of other params, other data or another declared version of the code
is never resumed. The digest of the source only leads to a notice.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def fingerprint(settings: Any, inputs: Mapping[str, str], versions: Mapping[str, int]) -> str:
    """Return 16 hex digits that hash settings (as JSON), named hashes of inputs, and declared versions of the code."""
    content = json.dumps([settings, dict(inputs), dict(versions)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def source_digest(*rooms: str) -> str:
    """Return 8 hex digits over the source of some packages of this one, comments included."""
    digest = hashlib.sha256()
    for file in sorted(path for room in rooms for path in (PACKAGE / room).rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]
