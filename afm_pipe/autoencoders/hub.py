"""Download of a pretrained diffusers autoencoder from the Hugging Face Hub."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from afm_pipe.runtime import paths
from afm_pipe.runtime.errors import UserError

CONFIG = "config.json"
WEIGHTS = paths.AUTOENCODER_WEIGHTS.name


def download(name: str) -> Path:
    """Download config and weights of a Hub repository into the Hub's cache; return their folder.

    Raises UserError, which says where to put the files by hand, for an unknown name and without a network.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    remedy = (
        f"download {CONFIG} and {WEIGHTS} on a machine with network access, put them into one folder, "
        "and set autoencoder.pretrained to its path"
    )
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or not _reachable(huggingface_hub.constants.ENDPOINT)
    try:
        files = [
            Path(huggingface_hub.hf_hub_download(name, file, local_files_only=offline)) for file in (CONFIG, WEIGHTS)
        ]
    except HFValidationError:
        raise UserError(
            f"Found no folder {name} (autoencoder.pretrained), which is not a Hub name either: {remedy}."
        ) from None
    except LocalEntryNotFoundError:
        why = f"{huggingface_hub.constants.ENDPOINT} is unreachable" if offline else "the download failed"
        raise UserError(
            f"Found no folder {name} (autoencoder.pretrained), nor {WEIGHTS} of that name in the hub cache, "
            f"and {why}: {remedy}."
        ) from None
    except OSError as error:
        raise UserError(
            f"Found a failed download of {name} (autoencoder.pretrained): {str(error).splitlines()[0]} "
            f"Check the name, or {remedy}."
        ) from None
    return files[1].parent


def _reachable(endpoint: str) -> bool:
    """Return whether a single request is answered; the Hub's client would retry for 23 seconds."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the client may use other certificates
    except OSError:
        return False
    return True
