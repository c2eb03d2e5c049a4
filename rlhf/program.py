"""What every program does with an error: one message and an exit code, on one rank."""

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf import startup
from rlhf.config import output_places
from rlhf.errors import EXIT_USER_ERROR, EarlyExit, UserError

T = TypeVar("T")

FULL = "Free some space and give the same command again; what was saved before is whole"
IN_THE_WAY = "A file stands where a folder has to be, or the other way round: choose another place"
CLOSED = "Choose a place that can be written, or change its permissions"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FULL),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), IN_THE_WAY),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), CLOSED),
}

# The extra of this package that installs a library; pyproject.toml lists them.
EXTRAS = {
    **dict.fromkeys(("starlette", "uvicorn", "h11"), "collect"),
    **dict.fromkeys(("rensa", "phonenumbers"), "prepare"),
    "wandb": "wandb",
    "gguf": "gguf",
    "bitsandbytes": "quant",
}

# What only a bug raises, also while an error of the disk is handled
BUGS = (KeyError, TypeError, AttributeError, IndexError, NameError)

# Called with the exit code when a program fails. True means that another process of the same run
# failed before, and that this error only follows from it. Set by whoever starts several processes
# (distributed.start).
on_failure: list[Callable[[int], bool]] = []


def program(main: Callable[..., T]) -> Callable[..., T]:
    """Decorate a program's `main` so that it ends with a message and an exit code.

    A UserError, or an error that `user_error` turns into one, is printed to stderr with exit code
    2, with `--debug` after its traceback; an EarlyExit is printed to stdout with its own code. Of
    several ranks only the first to fail prints.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> T:
        output_places.clear()
        startup.begin()
        try:
            return main(*args, **kwargs)
        except EarlyExit as exit_:
            if os.environ.get("RANK", "0") == "0":
                print(exit_, flush=True)
            sys.exit(exit_.code)
        except BrokenPipeError:
            # the reader (`| head`) has closed the pipe; flushing stdout at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except Exception as error:
            problem = user_error(error)
            code = EXIT_USER_ERROR if problem else 1
            # every process has to be told, so no short-circuit
            is_consequence = any([report(code) for report in on_failure])
            if problem is None and not is_consequence:
                raise
            if not is_consequence:
                given = args[0] if args and args[0] is not None else sys.argv
                if "--debug" in given:
                    traceback.print_exception(error)
                rank = os.environ.get("RANK", "0")
                of_rank = "" if rank == "0" else f" on rank {rank}"
                print(f"error{of_rank}: {problem}", file=sys.stderr, flush=True)
            sys.exit(code)
        finally:
            startup.end()

    return wrapped


def user_error(error: Exception) -> UserError | None:
    """Return the UserError that an exception stands for, or None where it is an error of the
    program itself.

    A disk that is full or read-only is one, whichever library found it: torch and safetensors raise
    errors of their own instead of OSError, the first without saying why. So is a library that an
    extra of this package installs.
    """
    if isinstance(error, UserError):
        return error
    output = output_places[0] if output_places else "a file"
    link: BaseException | None = error
    while link is not None and not isinstance(link, BUGS):
        if isinstance(link, ModuleNotFoundError) and link.name in EXTRAS:
            extra = EXTRAS[link.name]
            return UserError(
                f"'{link.name}' is not installed. Install it with: pip install 'rlhf[{extra}]'"
            )
        number = _error_number(link)
        if number in REMEDIES:
            place = getattr(link, "filename", None) or output
            return UserError(f"{place}: {os.strerror(number)}. {REMEDIES[number]}")
        if re.search("PytorchStreamWriter failed|iostream error", str(link)):
            return UserError(f"{output}: could not be written completely. {FULL}")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _error_number(error: BaseException) -> int | None:
    """Return the errno of an error of Python or of a library in Rust."""
    if isinstance(error, OSError):
        return error.errno
    in_rust = re.search(r"\(os error (\d+)\)", str(error))
    return int(in_rust[1]) if in_rust else None
