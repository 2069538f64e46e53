"""One message with its mend for a part of a checkpoint that cannot be loaded, whatever the libraries raise."""

from collections.abc import Iterator
from contextlib import contextmanager

from infer.program.errors import is_ours


@contextmanager
def loading(path: str, local: bool, part: str) -> Iterator[None]:
    """Turn the many ways in which a checkpoint can be absent into one message with its mend."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"{path} is gated: accept its licence on its Hub page, then log in with `hf auth login` "
            "(or set HF_TOKEN), or set model.path to a local folder that holds it"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub has no model {path!r} (or it is private): check the name, log in with `hf auth login`, "
            "or set model.path to a local folder"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # both libraries raise OSError for absent files, broken files, and for a Hub that cannot be reached; for what
        # else is wrong in a file whatever its parser raises
        if is_ours(error) or type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does without
            raise
        if "gated" in str(error):
            mend = "accept its licence on its Hub page, then log in with `hf auth login`"
        elif local:
            mend = "copy the checkpoint again, or name another folder as model.path"
        else:
            mend = "check the network, or download it elsewhere and set model.path to the local folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"cannot load the {part} of {path}: {reason}; {mend}") from error
