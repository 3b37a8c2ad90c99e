"""What this machine is, and whether the installation is one that was tested.

Heavy modules are imported inside the functions: a broken installation is one of the things to find.
"""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

from hfsft.doctor.findings import REINSTALL, CheckFailed, NotHere
from hfsft.errors import first_line


def machine() -> dict[str, str]:
    """What this machine is: name → text; never the Hub's token."""
    import psutil

    found = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "cores": str(len(psutil.Process().cpu_affinity()))
        if hasattr(psutil.Process, "cpu_affinity")
        else str(os.cpu_count()),
        "memory": _gigabytes(psutil.virtual_memory().total),
        "disk": f"{_gigabytes(shutil.disk_usage('.').free)} free in this folder",
    }
    try:
        return found | _card()
    except Exception as error:  # torch itself may be broken
        return found | {"device": f"torch cannot be imported: {first_line(error)}"}


def _card() -> dict[str, str]:
    import torch

    build = f"torch {torch.__version__}, CUDA build {torch.version.cuda or 'none'}"
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available()
        return {"torch": build, "device": "MPS (never tried by us)" if mps else "CPU"}
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "torch": build,
        "device": f"{properties.name}, {torch.cuda.device_count()} of them here",
        "driver": _driver(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "GPU memory": f"{_gigabytes(free)} free of {_gigabytes(total)}",
        "bfloat16": "native" if properties.major >= 8 else "not native: hfsft takes float16",
    }


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception as error:  # no NVML, or one of another version than the driver
        return f"unknown: {first_line(error)}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def check_versions() -> str:
    """Installed versions beside the ranges that were tested."""
    from packaging.requirements import Requirement

    wrong, right = [], []
    for line in requires("hfsft") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if needed.specifier.contains(here, prereleases=True):
            right.append(f"{needed.name} {here}")
        else:
            wrong.append(f"{needed.name} {here}, tested: {needed.specifier}")
    if wrong:
        raise CheckFailed("; ".join(wrong), REINSTALL)
    return f"{len(right)} packages within the tested ranges"


def check_token() -> str:
    """Whether the Hub knows the token, which is never shown."""
    from huggingface_hub import get_token, whoami
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from hfsft.hub.bounds import bound_requests

    token = get_token()
    if token is None:
        raise NotHere("no token: public models and data only (`hf auth login`)")
    bound_requests(5)
    try:
        return f"the Hub knows the token as {whoami(token)['name']}"
    except OfflineModeIsEnabled:
        raise NotHere("a token is set, and HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise CheckFailed(
                "the Hub refuses the token",
                "`hf auth login` stores another; HF_TOKEN comes before it",
            ) from None
        raise NotHere(f"the Hub does not answer: {first_line(error)}") from None
    except Exception as error:  # no network, in one of many classes
        raise NotHere(f"the Hub cannot be reached: {type(error).__name__}") from None
