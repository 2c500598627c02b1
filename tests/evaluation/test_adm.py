"""ADM's published statistics in place of our own."""

from pathlib import Path

import numpy as np
import pytest

from afm_pipe.evaluation.adm import adm_path, adm_references
from afm_pipe.evaluation.networks import LEGACY, SPATIAL, FeatureNetwork
from afm_pipe.evaluation.statistics import Reference
from afm_pipe.params import AdmReference
from afm_pipe.runtime.errors import UserError
from afm_pipe.runtime.files import sha256_file


def test_adms_statistics_replace_ours_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFM_WEIGHTS", str(tmp_path))
    random, spread = np.random.default_rng(0), np.eye(5)
    arrays = {"mu": random.normal(size=5), "sigma": spread, "mu_s": random.normal(size=5), "sigma_s": 2 * spread}
    batch = random.integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=batch, **arrays)
    sha256 = sha256_file(tmp_path / "adm.npz")
    networks = [
        FeatureNetwork(name, 5, "0" * 64, lambda x: x.flatten(1)[:, :5].float())
        for name in ("classifier", LEGACY, SPATIAL)
    ]
    ours = [
        Reference(n.name, n.sha256, "digest", 9, np.zeros(5), spread, np.zeros((9, 5), np.float32), np.arange(9), 1.0)
        for n in networks
    ]
    kept, pooled, spatial = adm_references(AdmReference(file="adm.npz", sha256=sha256), networks, ours, 10)
    assert kept is ours[0] and kept.source == "training images"
    assert pooled.source == spatial.source == f"adm {sha256}"
    assert (pooled.mu == arrays["mu"]).all() and (spatial.mu == arrays["mu_s"]).all()
    assert (spatial.sigma == 2 * spread).all() and pooled.digest != ours[1].digest
    assert (pooled.features == batch.transpose(0, 3, 1, 2).reshape(23, -1)[:, :5]).all()
    with pytest.raises(UserError, match="with sha256 .*evaluate.adm_reference"):
        adm_path(AdmReference(file="adm.npz", sha256="1" * 64))
    with pytest.raises(UserError, match="Found no .*gone.npz"):
        adm_path(AdmReference(file="gone.npz", sha256=None))
    np.savez(tmp_path / "half.npz", arr_0=batch)
    with pytest.raises(UserError, match="expected arrays mu, sigma"):
        list(adm_references(AdmReference(file="half.npz", sha256=None), networks, ours, 10))
    np.savez(tmp_path / "wide.npz", arr_0=batch, **(arrays | {"mu": np.zeros(6)}))
    with pytest.raises(UserError, match=r"Found mean \(6,\)"):
        list(adm_references(AdmReference(file="wide.npz", sha256=None), networks, ours, 10))
