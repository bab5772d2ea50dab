"""Optional packages, which are imported where they are first used."""

import importlib
from typing import Any


def require_extra(function: str, package: str, *modules: str, extra: str = "") -> Any:
    """An optional package, with these modules of it; ImportError naming the extra to install."""
    try:
        for module in modules:
            importlib.import_module(module)
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{function}: needs {package}; install jaxgru[{extra or package}]."
        ) from error
