"""A model folder as a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from kdtrain.errors import CheckpointError, ConfigError, PreflightError
from kdtrain.models.loading import first_line

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Repository:
    """Where a model is pushed to."""

    name: str
    public: bool

    def checked(self) -> Repository:
        """It by its full name, if it can be pushed to, as far as that is seen before there is something to push.

        Raises:
            ConfigError: it is no name.
            PreflightError: there is no login or no hub; or it is public, and that was not asked for.
        """
        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ConfigError(f"--push {self.name} is no name of a repository: write NAME or OWNER/NAME.") from error
        if constants.HF_HUB_OFFLINE:
            raise PreflightError("--push needs the hub, and HF_HUB_OFFLINE is set. Unset it, or leave --push out.")
        try:
            user = HfApi().whoami()["name"]
            name = self.name if "/" in self.name else f"{user}/{self.name}"
            found = _found(name)
        except LocalTokenNotFoundError as error:
            raise PreflightError("--push needs a login: run `hf auth login`, or set HF_TOKEN.") from error
        except Exception as error:  # of the network, and of the hub, which have many
            raise PreflightError(f"--push {self.name}: the hub does not let us in: {first_line(error)}") from error
        if found is not None and not found.private and not self.public:
            raise PreflightError(
                f"--push {self.name}: this repository is there already and public, so that all could read the model. "
                "Add --public if they may, or name another one."
            )
        return replace(self, name=name)

    def push(self, folder: Path) -> str:
        """Upload the folder as one commit, in place of weights that are there; the address of the repository.

        Raises:
            CheckpointError: it failed; the folder stays.
        """
        api = HfApi()
        try:
            address = api.create_repo(self.name, private=not self.public, exist_ok=True)
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                commit_message="Model of a kdtrain run",
                delete_patterns=_WEIGHTS,  # or shards of an earlier model would stay beside it
            )
        except Exception as error:
            raise CheckpointError(
                f"The model is in {folder}, and could not be pushed to {self.name}: {first_line(error)} Push it later "
                f"by: hf upload {self.name} {folder} .{'' if self.public else ' --private'}"
            ) from error
        return str(address)


def _found(name: str) -> ModelInfo | None:
    """The repository, if there is one."""
    try:
        return HfApi().model_info(name)
    except RepositoryNotFoundError:
        return None
