"""``hf-ft push``: upload a saved model, adapter, ensemble or delta to the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_ft.cli.console import is_main, say
from hf_ft.cli.flags import _flag
from hf_ft.cli.help import inference_help
from hf_ft.cli.logs import quieten
from hf_ft.cli.request import read_own
from hf_ft.errors import OptionError
from hf_ft.models.sharing import push_to_hub


@dataclass
class PushFlags:
    """Flags of ``hf-ft push``; those of the Hub are named as in TrainingArguments."""

    model: str | None = _flag("folder written by training, or with a delta, an adapter or an ensemble")
    hub_model_id: str | None = _flag("repository, such as user/name (default: the folder's name, under your account)")
    hub_private_repo: bool | None = _flag("whether a new repository is private (default: your account's setting)")
    hub_revision: str | None = _flag("branch, created if there is none (default: main)")
    hub_token: str | None = _flag("access token (default: that of `hf auth login`)")
    message: str = _flag("commit message", "Upload model")


def run_push(arguments: list[str]) -> None:
    """Upload the files of a model, and print where they are."""
    if not arguments or {"-h", "--help"} & set(arguments):
        say(inference_help("push", PushFlags, {}))
        return
    flags: PushFlags = read_own(arguments, PushFlags, "push")
    if not flags.model:
        raise OptionError("--model is missing: the folder that training wrote.")
    if not is_main():  # of several processes, one uploads
        return
    quieten()
    folder = Path(flags.model).expanduser()
    done = push_to_hub(
        folder,
        flags.hub_model_id or folder.resolve().name,
        commit_message=flags.message,
        revision=flags.hub_revision,
        private=flags.hub_private_repo,
        token=flags.hub_token,
    )
    say(f"{folder} is at {done.commit_url}")
