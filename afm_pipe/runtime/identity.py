"""The identity of a run, a hash of everything that affects its numbers, and a digest of the source code.

Working state is stored under the identity, so state from other params, data or declared code versions is never resumed.
A changed source digest only causes a notice.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from afm_pipe.runtime.paths import PACKAGE


def fingerprint(settings: Any, inputs: Mapping[str, str], versions: Mapping[str, int]) -> str:
    """Return 16 hex digits that hash settings (JSON values), input hashes by name, and declared code versions."""
    content = json.dumps([settings, dict(inputs), dict(versions)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def source_digest(*packages: str) -> str:
    """Return 8 hex digits that hash the source of some subpackages, comments included."""
    digest = hashlib.sha256()
    for file in sorted(path for package in packages for path in (PACKAGE / package).rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:8]
