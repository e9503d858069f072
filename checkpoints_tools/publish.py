"""Command that pushes an export to the Hugging Face hub after verifying the checksums of its files.

    python -m checkpoints_tools.publish --hf-model exports/rnd1 --repo me/rnd1 --dry-run
    python -m checkpoints_tools.publish --hf-model exports/rnd1 --repo me/rnd1 --private

The token comes from HF_TOKEN or from `hf auth login` and is never shown; HF_ENDPOINT selects another hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_a2d.checkpoint.model_files import check_plain_files
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point, human, progress
from megatron_a2d.utils.atomic_write import read_text
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line, without_passwords

SUMS = "SHA256SUMS"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m checkpoints_tools.publish", description="Upload an export to the hub.")
    parser.add_argument("--hf-model", required=True, type=Path, metavar="DIR", help="a directory that export_hf wrote")
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="the model's repository; created if it does not exist"
    )
    parser.add_argument("--private", action="store_true", help="create a new repository as private")
    parser.add_argument("--message", default="Upload model", help="commit message")
    parser.add_argument("--dry-run", action="store_true", help="check everything and list what would be uploaded")
    options = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo):
        raise UserError(f"--repo {options.repo}: is not a repository; give owner/name")
    files = check_export(options.hf_model)

    from huggingface_hub import constants, get_token

    token = get_token()
    total = human(sum(files.values()), "B")
    for name, size in files.items():
        print_line(f"{human(size, 'B'):>10}  {name}")
    hub = without_passwords(constants.ENDPOINT)
    print_line(f"{len(files)} files, {total}, to {options.repo} on {hub}; checksums match")
    if options.dry_run:
        print_line(
            "dry run: nothing was sent" + ("" if token else "; there is no token, set HF_TOKEN or run hf auth login")
        )
        return
    if not token:
        raise UserError("no token for the hub: set HF_TOKEN, or run hf auth login")
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would show it in its error message
        raise UserError("the hub token contains an invalid character; set HF_TOKEN again")
    print_line(f"{options.repo}: {push(options.hf_model, options.repo, options.private, options.message, token)}")


def check_export(directory: Path) -> dict[str, int]:
    """File -> size of all files to push; UserError unless SHA256SUMS lists all of them with the right checksums."""
    if not (directory / SUMS).is_file():
        raise UserError(f"--hf-model {directory}: has no {SUMS}; give a directory that export_hf wrote")
    lines = [line.split(maxsplit=1) for line in read_text(directory / SUMS, "the list of checksums").splitlines()]
    check_plain_files(directory)  # a symbolic link would publish its target
    expected = {parts[1]: parts[0] for parts in lines if len(parts) == 2}
    found = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    problems = [f"{directory / name}: is missing, though {SUMS} names it" for name in expected if name not in found]
    problems += [
        f"{directory / name}: is not in {SUMS}; remove it, or export again"
        for name in found
        if name not in expected and name != SUMS
    ]
    if not problems:
        with progress("checksums", sum(found.values()), "B") as advance, ThreadPoolExecutor(4) as pool:

            def digest(name: str) -> str:
                result = hashlib.sha256()
                with (directory / name).open("rb") as file:
                    while block := file.read(1 << 20):
                        result.update(block)
                        advance(len(block))
                return result.hexdigest()

            digests = dict(zip(expected, pool.map(digest, expected), strict=True))
        problems = [
            f"{directory / name}: is not what was exported (its checksum differs); export again"
            for name in expected
            if digests[name] != expected[name]
        ]
    if problems:
        raise UserError(problems)
    return found


def push(directory: Path, repo: str, private: bool, message: str, token: str) -> str:
    """Push the files; returns the URL of the commit. UserError, without token or password, if the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="megatron_a2d")
    remedy = "correct it and push again"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if _sends_through_xet():
            # It neither uses the older LFS upload nor falls back to it if a hub has no Xet storage.
            remedy += ", with HF_HUB_DISABLE_XET=1 for a hub or mirror that has no Xet storage"
        commit = api.upload_folder(repo_id=repo, folder_path=directory, commit_message=message)
        return without_passwords(str(commit.commit_url))
    except Exception as error:  # HTTP libraries differ; a traceback could show request headers
        reason = without_passwords(" ".join(f"{type(error).__name__}: {error}".split()).replace(token, "***"))
        raise UserError(f"--repo {repo}: the upload failed ({reason}); {remedy}") from None


def _sends_through_xet() -> bool:
    """Whether huggingface_hub uploads large files by hf-xet."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None


if __name__ == "__main__":
    entry_point(main)
