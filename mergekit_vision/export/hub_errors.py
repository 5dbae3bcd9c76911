"""What the Hugging Face hub refuses, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergekit_vision.errors import InputError

_TRANSPORTS = ("httpx", "httpx2", "requests", "urllib3")  # by the version of huggingface_hub


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of requests about a repository into one line each. No token stands in them.

    Raises:
        InputError: for what the hub refuses, or when it cannot be reached.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        for cause in _causes(error):
            if reason := _reason(cause):
                raise InputError(f"{repository}: {reason}") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str | None:
    """Why a request failed and what helps, if it did."""
    from huggingface_hub import utils as module

    utils: Any = module
    if isinstance(error, utils.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and pushing needs the hub; unset it"
    if type(error) is ValueError and isinstance(error.__cause__, utils.HfHubHTTPError):  # what is wrong with a model card
        return " ".join(str(error).split())
    if isinstance(error, utils.HfHubHTTPError):
        response: Any = error.response
        status = 0 if response is None else int(response.status_code)
        said = " ".join((getattr(error, "server_message", None) or "").split())
        return _REASONS.get(status, f"the hub refuses with status {status}") + (f" (it says: {said})" if said else "")
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _TRANSPORTS:
        return f"the hub cannot be reached ({type(error).__name__}); check the network, and HF_ENDPOINT if it is set"
    return None


_REASONS = {
    400: "the hub refuses what is sent",
    401: "the hub does not accept the token; log in again by `hf auth login`, or set another HF_TOKEN",
    403: "the token does not permit writing there; make one that does, or name a repository of your own",
    404: "there is no such repository or branch for this token; check the name, and what the token permits",
    412: "somebody else pushed at the same time; push again",
    429: "the hub takes no more requests for now; push again later",
}
