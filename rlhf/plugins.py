"""Functions of the user's own that options name: scorers and judges."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import UserError, did_you_mean


def import_function(path: str, where: str) -> Callable[..., Any]:
    """Return the function `module:function`; the module may be in the working directory.

    Raises UserError, beginning with `where`, if the module or the function is not there.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{where}: function '{path}' should be written module:function")
    module = import_module(module_name, where)
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [name for name in vars(module) if not name.startswith("_")]
        near = did_you_mean(function_name, public)
        raise UserError(f"{where}: module '{module_name}' has no function '{function_name}'.{near}")
    return function


def import_module(name: str, where: str) -> ModuleType:
    """Return a module, which may stand in the working directory; raise UserError if it is not
    there.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # a module that is there and imports another that is not keeps its own error
        if error.name and not name.startswith(error.name):
            raise
        raise UserError(
            f"{where}: there is no module '{name}' (searched {here} and the packages)"
        ) from None
