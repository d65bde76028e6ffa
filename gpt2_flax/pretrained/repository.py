"""Where a model's files are: a directory, or a repository of the Hugging Face hub."""

import os
import pathlib

from gpt2_flax import hub
from gpt2_flax.errors import MissingFileError, UserError

# A HEAD of a file may take this long twice, to connect and to answer, after hub.answers()
# has had its time: together under 15 s.
PATIENCE_SECONDS = 4
TRUE_WORDS = {"1", "ON", "YES", "TRUE"}


class Repository:
    """The files of one model, by their names.

    name_or_path: a directory, which wins, or an id on the hub ("gpt2", "owner/name").
    revision: branch, tag or commit on the hub, None for main. subfolder: of either kind of
    place. token: text, True for the one that is logged in, False for none. cache_dir: the
    hub's cache. local_files_only: ask no hub. force_download: pass the cache over.
    A hub that can't be reached is asked once; from then on the cache alone is used.
    Raises MissingFileError for a name that is neither a directory nor an id.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = "main",
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ):
        self.name = os.fspath(name_or_path)
        self.is_local = os.path.isdir(self.name)
        self._subfolder = _check_subfolder(subfolder)
        # Where the files of a local model are, its subfolder included; None for the hub's.
        self.directory = pathlib.Path(self.name, self._subfolder) if self.is_local else None
        if not self.is_local:
            _check_id(self.name)
        if force_download and local_files_only:
            raise ValueError("force_download=True and local_files_only=True contradict each other")
        self._revision = revision or "main"
        self._token = token
        self._cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self._force_download = force_download
        self._local_files_only = local_files_only
        # Why the hub is not asked, or not again, and the remedy; None: nothing so far.
        self._reason: str | None = None
        self._remedy: str | None = None
        self._asked = False

    @property
    def where(self) -> str:
        """The name, for messages, with what kept the hub from being asked."""
        return f"{self.name} ({self._reason})" if self._reason else self.name

    def get(self, filename: str) -> pathlib.Path | None:
        """The path of a file, fetched if it must be; None where the place has no such file.

        Raises ValueError for a filename that is not a plain name, and MissingFileError
        where the hub has no such repository or revision, refuses it, or can't be reached
        while the cache has nothing of it.
        """
        check_filename(filename)
        if self.directory is not None:
            path = self.directory / filename
            return path if path.is_file() else None
        there = self._ask(filename)
        if there is None:
            return self._from_cache(filename)
        return self._download(filename) if there else None

    def has(self, filename: str) -> bool:
        """Whether there is such a file; it is not fetched. Raises as `get` does."""
        check_filename(filename)
        if self.directory is not None:
            return (self.directory / filename).is_file()
        there = self._ask(filename)
        return self._from_cache(filename) is not None if there is None else there

    def _ask(self, filename: str) -> bool | None:
        """Whether the hub has the file; None where it can't be asked, with the reason kept.

        Asked here first, because hf_hub_download would retry for half a minute and more.
        """
        if not self._asked:
            self._asked = True
            self._find_reason_not_to_ask()
        if self._reason:
            return None
        import huggingface_hub
        from huggingface_hub import errors

        try:
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(
                    self.name,
                    filename,
                    subfolder=self._subfolder or None,
                    revision=self._revision,
                    endpoint=hub.endpoint(),
                ),
                token=self._token,
                timeout=PATIENCE_SECONDS,
                endpoint=hub.endpoint(),
            )
            return True
        except errors.EntryNotFoundError:
            return False
        except Exception as error:  # of several HTTP libraries, by the hub's version
            self._reason, self._remedy = self._explain(error)
            refused = isinstance(error, errors.RevisionNotFoundError)
        if refused:  # outside `except`: the error holds the request and with it the token
            raise self._missing(filename)
        return None

    def _find_reason_not_to_ask(self) -> None:
        import huggingface_hub.constants

        variable = os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE_WORDS
        if self._local_files_only:
            self._reason = "local_files_only=True"
            self._remedy = "allow the hub to be asked, or pass a directory"
        elif variable or huggingface_hub.constants.HF_HUB_OFFLINE:
            self._reason = "HF_HUB_OFFLINE is set"
            self._remedy = "unset it, or pass a directory"
        elif not hub.answers(hub.endpoint()):
            self._reason = f"the hub {hub.endpoint()} cannot be reached"
            self._remedy = "connect to it, or pass a directory"

    def _explain(self, error: Exception) -> tuple[str, str]:
        """(reason, remedy) of an error of the hub's client.

        The error's own text is not passed on: some quote the token.
        """
        from huggingface_hub import errors

        at = hub.endpoint()
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{at} has no revision {self._revision!r:.80} of it", "check revision="
        if isinstance(error, errors.GatedRepoError):
            return f"{at} shows it only to people let in", "ask for access, and pass their token="
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{at} has no such model or hides it",
                "check the spelling, or pass the token= of someone who may read it",
            )
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            remedy = "check token=" if status in (401, 403) else "try again later"
            return f"{at} answers with HTTP {status}", f"{remedy}, or pass a directory"
        reason = f"the hub {at} cannot be reached ({type(error).__name__})"
        return reason, "check the connection, HF_ENDPOINT and token=, or pass a directory"

    def _from_cache(self, filename: str) -> pathlib.Path | None:
        """The path in the cache; None where it holds this model, but not this file."""
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        if self._force_download:
            raise self._missing(filename)
        try:
            snapshot = huggingface_hub.snapshot_download(
                self.name,
                revision=self._revision,
                cache_dir=self._cache_dir,
                local_files_only=True,
            )
        except LocalEntryNotFoundError as error:
            # Of a snapshot that lacks some files, newer versions say so, and where it is.
            snapshot = getattr(error, "snapshot_path", None)
        if snapshot is None:
            raise self._missing(filename)
        path = pathlib.Path(snapshot, self._subfolder, filename)
        return path if path.is_file() else None

    def _download(self, filename: str) -> pathlib.Path:
        """The path in the cache, where the file is put if it isn't there or has changed."""
        import huggingface_hub

        try:
            return pathlib.Path(
                huggingface_hub.hf_hub_download(
                    self.name,
                    filename,
                    subfolder=self._subfolder or None,
                    revision=self._revision,
                    cache_dir=self._cache_dir,
                    force_download=self._force_download,
                    token=self._token,
                    etag_timeout=PATIENCE_SECONDS,
                    endpoint=hub.endpoint(),
                )
            )
        except Exception as error:  # of several HTTP libraries, by the hub's version
            if isinstance(error, OSError) and error.errno:
                reason = f"the cache cannot be written: {error.strerror}"
                remedy = "make room or pass cache_dir="
            else:
                reason, remedy = self._explain(error)
        raise UserError(f"{self.name}: {filename} was not fetched: {reason}\n  {remedy}")

    def _missing(self, filename: str) -> MissingFileError:
        return MissingFileError(
            f"model {self.name!r}: {filename} is not in the hub's cache, and {self._reason}\n"
            f"  {self._remedy} (no directory {self.name} in {pathlib.Path.cwd()})"
        )


def upload(directory, repo_id: str, token=None, *, private=None, tags=None, **options):
    """Upload a directory's files to a model repository of the hub, made if there is none.

    tags: written into the README.md beside the files, the hub's own if there is one.
    options: of huggingface_hub's upload_folder. Returns its CommitInfo.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=hub.endpoint(), token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    readme = pathlib.Path(directory, "README.md")
    if tags:
        if not readme.is_file() and api.file_exists(repo_id, readme.name):
            source = api.hf_hub_download(repo_id, readme.name)
            readme.write_bytes(pathlib.Path(source).read_bytes())
        text = readme.read_text("utf-8") if readme.is_file() else "---\ntags: []\n---\n"
        card = huggingface_hub.ModelCard(text, ignore_metadata_errors=True)
        card.data["tags"] = sorted({*(card.data.get("tags") or ()), *tags})
        card.save(readme)
    options["commit_message"] = options.get("commit_message") or "Upload model"
    return api.upload_folder(repo_id=repo_id, folder_path=os.fspath(directory), **options)


def check_filename(filename: str) -> None:
    """Raise ValueError for all but a plain name: a file's text must not lead elsewhere."""
    if filename in ("", ".", "..") or any(character in filename for character in "/\\:\0"):
        raise UserError(f"{filename!r:.80} is no plain name of a file, expected one like a.json")


def _check_subfolder(subfolder: str | os.PathLike) -> str:
    subfolder = os.fspath(subfolder)
    parts = subfolder.split("/")
    if subfolder and (".." in parts or "" in parts or any(c in subfolder for c in "\\:\0")):
        raise UserError(f"subfolder {subfolder!r:.80} is no relative path, expected one like a/b")
    return subfolder


def _check_id(name: str) -> None:
    """Raise MissingFileError for a name that is no directory and can't be on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if os.path.isfile(name):
        raise MissingFileError(f"{name} is a file\n  pass the directory that it is in")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise MissingFileError(
            f"no directory {name!r:.200} in {pathlib.Path.cwd()}, and it is no id of the hub's\n"
            '  pass a directory, or an id like "gpt2" or "owner/name"'
        ) from error
