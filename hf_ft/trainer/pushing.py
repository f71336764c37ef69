"""A Trainer's uploads to the Hub: its result, the model of each save, and deltas."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from hf_ft.engine.checkpoint_folders import files_written_whole
from hf_ft.errors import Error, HubError
from hf_ft.models import sharing
from hf_ft.trainer.protocols import ForPushing

logger = logging.get_logger(__name__)
DELTA_FOLDER = "ft_delta"  # in the output folder
LAST = "last-checkpoint"  # as Trainer names it on the Hub
WHOLE = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)  # also upload what a resume needs


def push_save(trainer: ForPushing, checkpoint: Path) -> None:
    """Upload a checkpoint's model, or with some hub strategies the whole checkpoint, while training continues.

    As with ``Trainer``, a save is skipped while an earlier one is still being uploaded, unless ``hub_always_push`` is
    set or whole checkpoints are uploaded, which must not be deleted meanwhile: then training waits for it. A failed
    upload is reported, and training continues.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    waits = args.hub_always_push or args.hub_strategy in WHOLE
    if not waits and trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        return
    trainer._finish_current_push()
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    folder = Path(str(args.output_dir))
    names = sharing.model_files(checkpoint)
    with files_written_whole(folder) as written:
        for name in names:
            (written / name).parent.mkdir(exist_ok=True)
            shutil.copy(checkpoint / name, written / name)
    by_step = args.save_strategy == SaveStrategy.STEPS
    when = f"step {trainer.state.global_step}" if by_step else f"epoch {int(trainer.state.epoch or 0)}"
    uploads = [({name: folder / name for name in names}, f"Training in progress, {when}")]
    if args.hub_strategy in WHOLE:
        under = LAST if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        uploads.append((sharing.everything_in(checkpoint, under), f"Training in progress, {when}, checkpoint"))
    jobs: Any = [_uploaded(trainer, folder, files, message) for files, message in uploads]
    trainer.push_in_progress = PushInProgress(jobs)


def _uploaded(trainer: ForPushing, folder: Path, files: dict[str, Path], message: str) -> Future:
    repo, options = str(trainer.hub_model_id), {"token": trainer.args.hub_token, "revision": trainer.args.hub_revision}
    job: Future = sharing.in_background(sharing.commit, repo, files, message, **options)
    job.add_done_callback(partial(_tell, repo, message))
    return job


def _tell(repo: str, message: str, job: Future) -> None:
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.warning(
            f"{message}: not uploaded to {repo}: {sharing.reason(error)} Training continues, and nothing is lost: the "
            "files are in its output_dir, and the next upload will contain everything that this one would have."
        )


def push_result(trainer: ForPushing, message: str, blocking: bool, **given: Any) -> Any:
    """Save the model with its card, and upload both.

    Args:
        given: ``token``, ``revision``, ``private``; other arguments are those of ``create_model_card``.

    Returns:
        The commit, or a future of it; None on processes other than the first.

    Raises:
        HubError: if it cannot be uploaded; the model has been saved by then.
    """
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    options: dict[str, Any] = {"token": given.pop("token", None) or args.hub_token}
    options["revision"] = given.pop("revision", None) or args.hub_revision
    private = given.pop("private", None)
    trainer._finish_current_push()  # it reads the files that are about to be replaced
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    if trainer.hub_model_id is None:
        with sharing.upload_of(folder, args.hub_model_id or folder.absolute().name):
            create_repository(trainer, options["token"], private)
    trainer.create_model_card(**_with_tags(trainer.model, given))
    push = partial(sharing.push_to_hub, folder, str(trainer.hub_model_id), commit_message=message, **options)
    return push() if blocking else sharing.in_background(push)


def _with_tags(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a card, with the tags of the model, as ``Trainer`` adds them."""
    tags = given.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    tags += [tag for tag in getattr(model, "model_tags", None) or () if tag not in tags]
    return {**given, "tags": tags}


@contextmanager
def refused_repository(trainer: ForPushing) -> Iterator[None]:
    """Context in which a repository is created before training.

    Raises:
        HubError: in place of what the client raises.
    """
    try:
        yield
    except Error:
        raise
    except Exception as error:
        raise HubError(
            f"hub_model_id={trainer.args.hub_model_id!r} cannot be created: {sharing.reason(error)} Log in with `hf "
            "auth login` and a token that may write there, name another repository, or upload the result afterwards "
            "with `hf-ft push` and set push_to_hub=False.",
            arguments=("push_to_hub",),
        ) from error


def create_repository(trainer: ForPushing, token: str | None, private: bool | None) -> None:
    """Create ``args.hub_model_id``, by default named as the output folder, and remember its full name."""
    args = trainer.args
    repo = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    trainer.hub_model_id = sharing.created(
        repo,
        private=args.hub_private_repo if private is None else private,
        token=token or args.hub_token,
        revision=args.hub_revision,
    )
    trainer.push_in_progress = None
