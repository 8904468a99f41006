"""``rankbook push``: a checkpoint or an exported folder to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.output import LISTING
from rankbook.calibration.option import WHERE, argument, option
from rankbook.calibration.source import Kind, Source, identify
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import CheckFailedError, UsageError
from rankbook.tools.report import Table, megabytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True, kw_only=True)
class Push(Common):
    """Options of the verb."""

    folder: Path = argument("checkpoint or exported folder", metavar="FOLDER", group=WHERE)
    repository: str = argument("model on the hub, OWNER/NAME; created if it does not exist", metavar="ID", group=WHERE)
    revision: str | None = option(None, "branch to write to; default: the main branch", metavar="BRANCH", group=WHERE)
    private: bool = option(False, "if the model is created, make it private")
    pull_request: bool = option(False, "open a pull request instead of writing to the branch")
    message: str | None = option(None, "message of the commit", metavar="TEXT")


def run(options: Push) -> Outcome:
    """Check the folder, and upload what it lists."""
    from huggingface_hub import HfApi

    source = identify(options.folder, frozenset({Kind.CHECKPOINT, Kind.ONNX}))
    folder = Path(source.location)
    files = _files(folder)
    with Console(quiet=options.quiet).progress(f"pushing {folder}") as show:
        show(0.0, "checking")
        _verify(source)
        show(0.1, "uploading")
        url = _upload(HfApi(), folder, files, options)
    size = sum((folder / name).stat().st_size for name in files)
    report = {"url": url, "repository": options.repository, "files": files, "bytes": size}
    rows = [("files", len(files)), ("size", megabytes(size)), ("commit", url)]
    return Outcome(report, [Table(options.repository, ("property", "value"), rows)])


def _files(folder: Path) -> list[str]:
    """Return what a run wrote into the folder, but for its own options, which hold paths of this machine.

    Raises:
        UsageError: No run of this version wrote it, or a file is gone.
    """
    from rankbook.calibration.checkpoint.card import CARD
    from rankbook.calibration.schema import read_object

    if not (folder / LISTING).is_file():
        raise UsageError(f"{folder} has no {LISTING}, so what belongs to it is not known; quantize or export it again")
    names = read_object(folder / LISTING, "quantize or export it again").get("files", [])
    found = [str(name) for name in names if not Path(str(name)).match("rankbook-*.yaml")]
    if missing := sorted(name for name in found if not (folder / name).is_file()):
        raise UsageError(f"{folder} lacks {missing[0]}, which its {LISTING} names; copy it, or write the folder again")
    if CARD not in found:
        raise UsageError(f"{folder} has no {CARD}, the model card; quantize or export it again")
    return [*found, LISTING]


def _verify(source: Source) -> None:
    """Compare weights with the hashes that were written down.

    Raises:
        ValueError: They differ.
    """
    if source.kind is Kind.CHECKPOINT:
        from rankbook.calibration.checkpoint.format import open_checkpoint

        open_checkpoint(source.location, verify=True)
        return
    from rankbook.exporter.file import ExportedModel

    file = ExportedModel.open(source.path)
    file.require_packed()
    file.verify()


def _upload(api: HfApi, folder: Path, files: list[str], options: Push) -> str:
    """Return where the commit is.

    Raises:
        CheckFailedError: The hub refuses, or does not answer.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    given: dict[str, Any] = {"repo_id": options.repository, "repo_type": "model"}
    message = options.message or f"Upload {folder.name} with rankbook"
    try:
        api.create_repo(**given, private=options.private or None, exist_ok=True)
        if options.revision is not None and not options.pull_request:
            api.create_branch(**given, branch=options.revision, exist_ok=True)
        done = api.upload_folder(
            **given,
            folder_path=folder,
            allow_patterns=files,
            revision=options.revision,
            create_pr=options.pull_request,
            commit_message=message,
        )
    except LocalTokenNotFoundError as error:
        raise UsageError(f"the hub needs a login: run `hf auth login`, or set HF_TOKEN ({error})") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckFailedError(f"{options.repository} cannot be written: {error}") from error
    return str(done.pr_url or done.commit_url)


COMMAND = Command(
    name="push",
    summary="upload a checkpoint or an exported folder to the Hugging Face hub",
    example="rankbook push onnx owner/model-4bit-onnx --private",
    options=Push,
    run=run,
)
