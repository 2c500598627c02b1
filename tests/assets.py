"""Real weights and photographs beside the project, which it does not contain: tests that use them say so where not.

They lie in `shared/assets` beside the project, or in $AFM_TEST_ASSETS.
"""

import os
from pathlib import Path

import pytest

from tests.conftest import ROOT

ASSETS = Path(os.environ.get("AFM_TEST_ASSETS", ROOT.parent / "shared" / "assets"))
TAESD, CLOTHING = ASSETS / "taesd", ASSETS / "clothing96.tar"
TAESD_SHA256 = "13731f1a133ebe6badabbc8dc9d77c939f104bad3518eedad55b36c9b045f7db"

needs_taesd = pytest.mark.skipif(not TAESD.is_dir(), reason=f"needs TAESD's two files in {TAESD}")
needs_clothing = pytest.mark.skipif(not CLOTHING.is_file(), reason=f"needs the photographs in {CLOTHING}")
