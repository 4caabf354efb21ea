"""Models to the Hugging Face hub: a repository each, private unless it is asked to be public."""

import contextlib
import pathlib
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub import errors

from rag_jax import untrusted
from rag_jax.errors import UserError

TAG = "rag_jax"  # in the card of what was made here


def repositories(name: str, roles: list[str]) -> dict[str, str]:
    """`{role: OWNER/NAME-role}`; UserError for a name that the hub does not take."""
    found = {role: f"{name}-{role}" for role in roles}
    for repository in found.values():
        try:
            huggingface_hub.utils.validate_repo_id(repository)
        except errors.HFValidationError:
            raise UserError(
                f"--push={name}: is no name of the hub; give OWNER/NAME of letters, digits, '-', '_' and '.'"
            ) from None
    return found


def check(name: str, repositories: dict[str, str]) -> None:
    """UserError unless an account is known that may write, and the names are free or hold an earlier push of ours."""
    api = huggingface_hub.HfApi()
    with _told(name):
        api.whoami()
        for repository in repositories.values():
            try:
                info = api.model_info(repository)
            except errors.RepositoryNotFoundError:
                continue
            files = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
            if files and TAG not in (info.tags or ()):
                raise UserError(
                    f"--push={name}: {repository} is there already and was not made by rag_jax; give another name"
                )


def push(name: str, folder: pathlib.Path, repository: str, step: int, *, public: bool) -> str:
    """Upload an exported model's folder as one commit; its address. An earlier push stays in the history."""
    api = huggingface_hub.HfApi()
    with _told(name):
        made = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=f"Step {step}, exported by rag_jax",
            delete_patterns="*",
        )
        return str(made)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """One line for what goes wrong between here and the hub."""
    try:
        yield
    except UserError:
        raise
    except errors.LocalTokenNotFoundError:
        reason = "no account of the hub is known here; log in with `hf auth login`, or set HF_TOKEN"
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set, which keeps from the hub; unset it"
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            reason = (
                f"the hub refuses (status {status}): the account may not write there, or its token is of another kind"
            )
        else:
            reason = f"the hub answers with status {status}; try again"
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        reason = f"the hub cannot be reached ({type(error).__name__}: {untrusted.one_line(error)})"
    else:
        return
    raise UserError(f"--push={name}: {untrusted.redact(reason)}") from None
