"""The identity of a piece of work: a hash of everything that shapes its numbers.

Working state is kept under it, so state made with other params, other data or code of another version is never resumed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(settings: Any, inputs: Mapping[str, str], versions: Mapping[str, int]) -> str:
    """Return 16 hex digits over settings (as JSON), named hashes of inputs, and declared versions of the code."""
    content = json.dumps([settings, dict(inputs), dict(versions)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
