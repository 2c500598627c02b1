"""The identity of a run or another piece of work: a hash of everything that shapes its numbers.

Working state is stored under it, so state of other params, other data or another version of the code is never resumed.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(settings: Any, inputs: Mapping[str, str], versions: Mapping[str, int]) -> str:
    """Return 16 hex digits that hash settings (as JSON), named hashes of inputs, and declared versions of the code."""
    content = json.dumps([settings, dict(inputs), dict(versions)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
