"""Whether the hub has a model, asked once and quickly."""

from __future__ import annotations

from pathlib import Path

from ramulus.learn.policy.model_files import near

SECONDS = 10.0  # that the hub has for its answer


class NoConfig(ValueError):
    """A repository of the hub without a config.json."""


def offline(name: str, revision: str | None) -> bool:
    """Whether a model must be taken from the cache of this machine, since the hub cannot be reached.

    Raises ValueError, in one sentence, for a name that is neither a folder nor a model of the hub that can be had.
    """
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    here = f"there is no folder {name} here{near(Path(name))}"
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=SECONDS, token=get_token())
    except HFValidationError:
        raise ValueError(f"cannot load the model {name!r}: {here}, and it is no name of a model on the hub: check the path") from None
    except GatedRepoError:
        raise ValueError(f"cannot load the model {name!r}: its authors want to be asked: do so on its page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise ValueError(f"cannot load the model {name!r}: the hub has no revision {revision!r} of it: check model.revision") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"cannot load the model {name!r}: {here}, and the hub has no such model, or not for everybody: check the name, or `hf auth login`"
        ) from None
    except EntryNotFoundError:
        raise NoConfig(f"cannot load the model {name!r}: on the hub it has no config.json, so it is no model of transformers") from None
    except Exception as error:  # whatever a proxy, a name server or a broken line answers
        if cached:
            return True
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"cannot load the model {name!r}: {here}, and the hub cannot be asked for one ({why}): check the path or the network"
        ) from None
    return False
