"""Laws of --push_to_hub, against a hub on loopback that is spoken to by the real client.

Commands run in processes that are forked from one which has imported things already; it knows the
loopback hub alone, and waits for nothing.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from families import save_checkpoint
from forked import Answer, Forks
from loopback_hub import TOKEN, environment_of, served
from loopback_uploads import ACCOUNT, Storage, Stored, UploadHandler
from trained import save_trained, write_rows

from qlora_kit.config.output import HubConfig
from qlora_kit.errors import ConfigError

BEFORE = """
import contextlib, io, time
time.sleep = lambda seconds: None
import huggingface_hub, qlora_kit.run.opening
from qlora_kit.commands.main import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main({}) == 0
"""
"""What a process does at its first export only."""
BASE, ME = "them/base", "me/result"


@dataclass
class Shop:
    """A hub, a base, an adapter on it and rows, and commands that know them."""

    storage: Storage
    endpoint: str
    forks: Forks
    base: Path
    adapter: Path
    rows: Path

    def run(self, folder: Path, *arguments: object, token: str = TOKEN) -> Answer:
        """Run a command in a folder with a token; it is in none of what is printed."""
        answer = self.forks.run(folder, *map(str, arguments), HF_TOKEN=token)
        for text in (answer.out, answer.err):
            assert not token or token not in text
        return answer

    def export(self, folder: Path, *more: object, token: str = TOKEN) -> Answer:
        """Export the adapter to `out`."""
        known = ("--adapter", self.adapter, "--model", self.base, "--output_dir", "out")
        return self.run(folder, "export", *known, "--verify", self.rows, *more, token=token)

    def finetune(self, folder: Path, *more: object, model: object = BASE) -> Answer:
        """Train one step on the hub's base, into `run`."""
        known = ("--model", model, "--data", self.rows, "--max_steps", 1, "--lora_r", 2)
        more = (*more, "--output_dir", "run", "--batch_size", 2, "--gradient_accumulation_steps", 1)
        return self.run(folder, "finetune", *known, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    save_checkpoint(folder / "base", "llama2", torch.float32)
    save_trained(folder / "base", folder / "adapter", bits=4, dtype="fp32")
    storage = Storage({})
    with served(UploadHandler, storage=storage) as endpoint:
        # The protocol of xet is not spoken here; what it sends in its way is otherwise the same.
        environment = environment_of(endpoint, folder, HF_HUB_DISABLE_XET="1", HF_DEBUG="1")
        rows = write_rows(folder / "rows.jsonl")
        known = ("--adapter", folder / "adapter", "--model", folder / "base", "--verify", rows)
        first = [str(one) for one in ("export", *known, "--output_dir", folder / "first")]
        forks = Forks(folder, BEFORE.format(first), environment=environment)
        yield Shop(storage, endpoint, forks, folder / "base", folder / "adapter", rows)
        forks.close()


@pytest.fixture
def shop(made: Shop) -> Shop:
    """The same, and a hub that holds the base alone."""
    files = {path.name: path.read_bytes() for path in made.base.iterdir()}
    fresh = Storage({TOKEN: copy.deepcopy(ACCOUNT)}, {BASE: Stored(False, files)})
    vars(made.storage).update(vars(fresh))
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def refused(answer: Answer, code: int, *words: str) -> None:
    line = answer.err.splitlines()[-1]
    assert answer.code == code, answer.err
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_an_export_is_there_byte_for_byte_and_private(shop: Shop, tmp_path: Path) -> None:
    answer = shop.export(tmp_path, "--push_to_hub", ME)
    assert answer.code == 0, answer.err
    assert "is replaced" not in answer.err  # there was nothing
    assert answer.out.splitlines()[-1] == f"sent       {shop.endpoint}/{ME}"
    there = shop.storage.repositories[ME]
    assert there.private
    assert there.commits == 1
    assert there.files == files_of(tmp_path / "out")
    assert there.files.keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    for name, content in there.files.items():
        for place in (tmp_path, shop.base.parent):
            assert str(place).encode() not in content, name
    # The same again: what is there is neither sent nor committed.
    sent = len(shop.storage.sent)
    answer = shop.export(tmp_path, "--push_to_hub", ME, "--overwrite")
    assert answer.code == 0, answer.err
    assert len(shop.storage.sent) == sent
    # Other weights take the place of these, whatever their files are called.
    answer = shop.export(
        tmp_path, "--push_to_hub", ME, "--overwrite", "--dtype", "bf16", "--shard_size", 60000
    )
    assert answer.code == 0, answer.err
    said = "its README.md is replaced and of its weights (model.safetensors) those are deleted"
    assert f"warning: --push_to_hub {ME}: {said}" in answer.err
    assert shop.storage.repositories[ME].files == files_of(tmp_path / "out")
    assert "model.safetensors" not in files_of(tmp_path / "out")


def test_its_card_says_what_it_is(shop: Shop, tmp_path: Path) -> None:
    assert shop.export(tmp_path, "--base_name", BASE).code == 0
    card, report = ((tmp_path / "out" / name).read_text() for name in ("README.md", "export.json"))
    said = json.loads(report)
    assert card.startswith(f"---\nbase_model: {BASE}\n")
    for words in ("format: hf, fp32", f"`{BASE}`", f"KL {said['kl']:.2e}", "4 bits (nf4)"):
        assert words in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict[str, object] = {}
    exec(code.replace('"DIR"', repr(str(tmp_path / "out"))), names)
    assert names["model"].dtype == torch.float32  # type: ignore[attr-defined]


def test_an_upload_that_breaks_off_leaves_the_export_and_is_gone_on_with(
    shop: Shop, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    shards = ("--shard_size", 60000)
    assert shop.export(whole, *shards).code == 0
    expected = files_of(whole / "out")
    large = [name for name in expected if name.endswith(".safetensors")]
    assert len(large) > 3
    again = ""
    for broken in (0, 2):
        folder = tmp_path / f"{broken}"
        folder.mkdir()
        shop.storage.drop_from = broken
        answer = shop.export(folder, *shards, "--push_to_hub", ME)
        refused(
            answer,
            4,
            f"out is written, and not sent to {ME}: the hub cannot be reached, or the connection",
            again := f"hf upload {ME} out . --private",
        )
        assert "exported   out" in answer.out
        assert files_of(folder / "out") == expected
        assert shop.storage.repositories[ME].files == {}  # nobody finds half of a model
    assert 2 <= len(shop.storage.sent) < len(large)  # some were under way at the same time
    # The commit itself is lost as well: nothing that was sent is lost with it.
    shop.storage.drop_from, shop.storage.lose_commits = None, True
    refused(shop.export(folder, *shards, "--overwrite", "--push_to_hub", ME), 4, "fails (500)")
    assert len(shop.storage.sent) == len(large)
    shop.storage.lose_commits = False
    # The command that the error names sends the rest.
    program = [sys.executable, "-m", "huggingface_hub.cli.hf", *shlex.split(again)[1:]]
    environment = environment_of(shop.endpoint, tmp_path, HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
    done = subprocess.run(
        program, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shop.storage.repositories[ME].files == expected
    assert shop.storage.repositories[ME].private
    assert len(shop.storage.sent) == len(large)


def test_a_signal_while_it_is_sent_leaves_the_export(shop: Shop, tmp_path: Path) -> None:
    def stop() -> None:
        (command,) = psutil.Process(shop.forks.pid).children()
        command.send_signal(signal.SIGTERM)

    shop.storage.on_file = stop
    answer = shop.export(tmp_path, "--push_to_hub", ME)
    refused(answer, 143, f"out is written, and not sent to {ME}", f"hf upload {ME} out . --private")
    assert (tmp_path / "out" / "export.json").exists()
    assert shop.storage.repositories[ME].files == {}


@pytest.mark.parametrize("form", ["hf", "adapter"])
def test_others_see_it_only_where_that_is_asked_for(shop: Shop, tmp_path: Path, form: str) -> None:
    told = ("--push_to_hub", ME, "--format", form, "--base_name", BASE)
    told = told if form == "adapter" else told[:-2]
    verify = () if form == "hf" else ("--overwrite",)
    repositories = shop.storage.repositories

    def export(*more: object) -> Answer:
        known = ("--adapter", shop.adapter, "--model", shop.base, "--output_dir", "out")
        return shop.run(tmp_path, "export", *known, *told, *verify, *more)

    assert export("--no_hub_private").code == 0
    assert not repositories[ME].private
    before = dict(repositories[ME].files)
    refused(export("--overwrite"), 2, "public", "--no_hub_private")
    repositories[ME].private = True
    refused(export("--overwrite", "--no_hub_private"), 2, "is private")
    assert repositories[ME].files == before


def account(**token: object) -> dict[str, object]:
    return {**ACCOUNT, "auth": {"accessToken": token}}


def fine_grained(name: str, *permissions: str) -> dict[str, object]:
    scoped = [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]
    return account(role="fineGrained", fineGrained={"scoped": scoped})


REFUSED: dict[str, tuple[int, dict[str, object], str, tuple[str, ...]]] = {
    "no token": (4, {}, ME, ("there is no token for the hub", "hf auth login")),
    "a wrong token": (4, {}, ME, ("does not know this token (401", "correct HF_TOKEN")),
    "a token that reads": (4, account(role="read"), ME, ("token of me may not write",)),
    "other scopes": (
        4,
        fine_grained("me/other", "repo.write"),
        ME,
        ("token of me may not write", "settings/tokens"),
    ),
    "other rights": (4, fine_grained("me", "repo.content.read"), ME, ("may not write there",)),
    "another's place": (4, ACCOUNT, "them/x", ("me, is no member of them", "name me/x")),
    "a role that reads": (4, ACCOUNT, "readers/x", ("me, may only read readers",)),
    "a model's place": (2, ACCOUNT, "writers/model", ("it holds a model",)),
    "a public place": (2, ACCOUNT, "writers/public", ("this repository is public",)),
    "no name": (2, ACCOUNT, "result", ("push_to_hub must be the name of a repository",)),
    "a token for a name": (2, ACCOUNT, f"me/{TOKEN}", ("--push_to_hub holds a token",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_would_refuse_is_refused_before_training(
    shop: Shop, tmp_path: Path, case: str
) -> None:
    code, said, name, words = REFUSED[case]
    shop.storage.accounts = {TOKEN: said} if said else {}
    held = shop.storage.repositories
    held["writers/model"] = Stored(True, {"config.json": b"{}"})
    held["writers/public"] = Stored(False)
    answer = shop.run(
        tmp_path, "finetune", "--model", BASE, "--data", shop.rows, "--output_dir", "run",
        "--push_to_hub", name, token="" if case == "no token" else TOKEN,
    )  # fmt: skip
    refused(answer, code, *words)
    assert "base " not in answer.out  # it was not even opened
    assert list(tmp_path.iterdir()) == []
    assert not [line for line in shop.storage.asked if line.startswith(("POST", "PUT"))]


def test_scopes_and_roles_that_may_write_do(shop: Shop, tmp_path: Path) -> None:
    told = ("--format", "adapter", "--base_name", BASE, "--overwrite", "--push_to_hub")
    for said, name in (
        (fine_grained("me", "repo.content.read", "repo.write"), ME),
        (fine_grained(ME, "repo.write"), ME),
        (ACCOUNT, "writers/x"),
        (ACCOUNT, "Me/Other"),
    ):
        shop.storage.accounts = {TOKEN: dict(said)}
        answer = shop.run(
            tmp_path, "export", "--adapter", shop.adapter, "--output_dir", "out", *told, name
        )
        assert answer.code == 0, answer.err
        assert shop.storage.repositories[name].files == files_of(tmp_path / "out")


def test_without_a_network_it_says_so_before_any_work(shop: Shop, tmp_path: Path) -> None:
    cases = (
        (
            4,
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            ("the hub cannot be reached", "leave --push_to"),
        ),
        (2, {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE is set", "unset it")),
    )
    for code, variables, words in cases:
        command = [sys.executable, "-m", "qlora_kit", "export", "--adapter", str(shop.adapter)]
        command += ["--model", str(shop.base), "--output_dir", "out", "--push_to_hub", ME]
        environment = environment_of(shop.endpoint, tmp_path, HF_TOKEN=TOKEN, **variables)
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        refused(Answer(done.returncode, 0, done.stdout, done.stderr), code, *words)
        assert list(tmp_path.iterdir()) == []


def test_an_adapter_goes_there_after_its_run_without_what_is_this_machines(
    shop: Shop, tmp_path: Path
) -> None:
    shop.storage.drop_from = 0
    answer = shop.finetune(tmp_path, "--push_to_hub", ME)
    again = f"qlora-kit export --adapter run --format adapter --push_to_hub {ME} --output_dir "
    refused(answer, 4, f"run is written, and not sent to {ME}: ", again)
    assert (tmp_path / "run" / "run.json").exists()
    # The same command goes on where it ended: the run is finished, and its adapter is sent.
    shop.storage.drop_from = None
    answer = shop.finetune(tmp_path, "--push_to_hub", ME, "--resume_from_checkpoint", "auto")
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"sent      {shop.endpoint}/{ME}"
    there = shop.storage.repositories[ME]
    assert there.private
    assert len(set(shop.storage.sent)) == len(shop.storage.sent)
    # It is what the command that the error named sends as well.
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
    sent = dict(there.files)
    assert shop.run(tmp_path, *shlex.split(again)[1:], "export").code == 0
    assert files_of(tmp_path / "export") == sent == shop.storage.repositories[ME].files
    assert sent.keys().isdisjoint({"config.yaml", "run.json", "metrics.jsonl"})
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert b"run.json" not in sent["README.md"]
    for name, content in sent.items():
        for place in (tmp_path, shop.base.parent):
            assert str(place).encode() not in content, name
    assert "push_to_hub" not in (tmp_path / "run" / "config.yaml").read_text()


def test_an_adapter_whose_base_is_a_path_is_not_sent(shop: Shop, tmp_path: Path) -> None:
    answer = shop.finetune(tmp_path, "--push_to_hub", ME, model=shop.base)
    refused(answer, 2, f"path of this machine, {shop.base}", "give its hub id", "--base_name")
    assert list(tmp_path.iterdir()) == []
    answer = shop.export(tmp_path, "--push_to_hub", ME, "--format", "adapter")
    answer = shop.run(
        tmp_path, "export", "--adapter", shop.adapter, "--format", "adapter", "--output_dir", "out",
        "--push_to_hub", ME,
    )  # fmt: skip
    refused(answer, 2, "path of this machine", "name it for others with --base_name OWNER/NAME")
    assert ME not in shop.storage.repositories


def test_a_base_beside_its_adapter_is_named_as_the_repository(shop: Shop, tmp_path: Path) -> None:
    told = ("--push_to_hub", ME, "--format", "hf-4bit")
    answer = shop.export(tmp_path, *told, "--base_name", BASE)
    refused(answer, 2, f"--base_name {BASE}: the base lies beside", f"repository {ME}; leave")
    assert list(tmp_path.iterdir()) == []
    answer = shop.export(tmp_path, *told)
    assert answer.code == 0, answer.err
    assert "path of this machine" not in answer.out
    there = shop.storage.repositories[ME].files
    assert there == files_of(tmp_path / "out")
    described = json.loads(there["adapter/adapter_config.json"])
    assert described["base_model_name_or_path"] == ME
    assert ME.encode() not in there["README.md"]  # it is no model's base but the adapter's here
    for name, content in there.items():
        assert str(tmp_path).encode() not in content, name


def test_a_name_is_what_the_hub_takes_for_one() -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for name in ("a/b", "A_1/b-c.d", "_/_", "a/b.git", "a--b/c", "a/b..c", "-a/b", "a/b-", "a/b/c"):
        good = True
        try:
            validate_repo_id(name)
        except HFValidationError:
            good = False
        if good:
            assert HubConfig(push_to_hub=name).push_to_hub == name
        else:
            with pytest.raises(ConfigError, match="push_to_hub must be the name of a repository"):
                HubConfig(push_to_hub=name)
    for name in ("alone", "a/", "/b", "a b/c", "a/é"):
        with pytest.raises(ConfigError, match="push_to_hub must be"):
            HubConfig(push_to_hub=name)
    with pytest.raises(ConfigError, match="hub_private false goes with push_to_hub"):
        HubConfig(hub_private=False)
