"""The hub, through the real client: a small server on loopback speaks the hub's protocol.

The package runs in a process of its own, whose `HF_ENDPOINT` is that server and whose cache is an
empty folder. What the server was asked for is looked at as well as what came of it.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_checkpoint, tree_hash
from loopback_hub import COMMIT, ID, OLDER, TOKEN, Handler, Hub, Repository, served
from safetensors.torch import load_file

from qlora_kit.base.hub import TEMPLATES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository as they are: the model, and much that nobody needs."""
    folder = tmp_path_factory.mktemp("repository")
    save_checkpoint(folder, "llama2", torch.float32, shard_size="150KB")
    wanted = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    wanted[f"{TEMPLATES}/tool_use.jinja"] = b"{{ tools }}"
    unwanted = ("pytorch_model.bin", "modeling_tiny.py", "README.md", "consolidated.safetensors")
    unwanted = (*unwanted, "onnx/model.safetensors", "original/params.json", ".gitattributes")
    return wanted | dict.fromkeys(unwanted, b"must not be fetched")


RESOLVE = """
import sys, time
from qlora_kit.commands.failure import reports_errors
@reports_errors
def main(argv):
    import huggingface_hub
    from qlora_kit.base.source import resolve
    waits, time.sleep = [], lambda seconds: waits.append(seconds)
    try:
        source = resolve(argv[0], argv[1] or None)
        print(source.directory)
        print(source.revision)
        print(source.name)
    finally:
        print(sum(waits))
    return 0
sys.exit(main(sys.argv[1:]))
"""


COMMAND = """
import sys
from qlora_kit.commands.main import main
sys.exit(main(sys.argv[1:]))
"""
ONE_BY_ONE = """
import contextlib, io, os, sys
from qlora_kit.commands.failure import reports_errors
from qlora_kit.commands.main import main
how, name = sys.argv[1:]
if how == "load_base":
    from qlora_kit.base.load import load_base
@reports_errors
def load(argv):
    load_base(argv[0])
    return 0
for _ in sys.stdin:
    if not os.fork():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            if how == "command":
                code = main(["generate", "--model", name, "--prompt", "x"])
            else:
                code = load([name])
        print(code, said.getvalue().splitlines()[-1], flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path) -> Iterator[Hub]:
    repository = Repository(dict(files))
    with served(Handler, repository=repository) as endpoint:
        yield Hub(repository, endpoint, tmp_path)


def found_on(
    hub: Hub, name: str = ID, revision: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Find a model; prints its directory and commit or the error line, and seconds of waits."""
    return hub.python(RESOLVE, name, revision, **environment)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    line = done.stderr.splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert "Traceback" not in done.stderr


def test_a_model_is_downloaded_checked_and_loaded_again_without_a_network(hub: Hub) -> None:
    done = found_on(hub)
    assert done.returncode == 0, done.stderr
    directory, commit, name, _ = done.stdout.splitlines()
    assert (commit, name) == (COMMIT, ID)
    # Nothing but what a base consists of was asked for, let alone kept.
    fetched = {
        str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()
    }
    assert fetched == {
        f"{TEMPLATES}/tool_use.jinja",
        *(
            name
            for name in hub.repository.files
            if "/" not in name
            and name.endswith((".safetensors", ".json"))
            and not name.startswith("consolidated")
        ),
    }
    resolved = {
        line.split("/resolve/")[1].partition("/")[2]
        for line in hub.repository.asked
        if "/resolve/" in line
    }
    assert resolved == fetched
    for name in fetched:
        assert (Path(directory) / name).read_bytes() == hub.repository.files[name]
    assert "100%" in done.stderr  # the progress of the download

    # A second time nothing is fetched; and without the hub the cache is enough.
    hub.repository.asked.clear()
    again = found_on(hub)
    assert again.stdout.splitlines()[0] == directory
    assert not [line for line in hub.repository.asked if "/resolve/" in line]
    for lost in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        alone = found_on(hub, **lost)
        assert alone.stdout.splitlines()[:2] == [directory, COMMIT]
    # The snapshot's links into the cache's blobs are followed when it is loaded.
    loaded = hub.python(
        "import sys\n"
        "from qlora_kit.base.load import load_base\n"
        "base = load_base(sys.argv[1], bits=16, dtype='fp32')\n"
        "print(base.info.name, base.info.revision)\n"
        "print(sum(float(p.double().sum()) for p in base.model.parameters()))\n",
        ID,
        HF_HUB_OFFLINE="1",
    )
    assert loaded.returncode == 0, loaded.stderr
    first, total = loaded.stdout.splitlines()
    assert first == f"{ID} {COMMIT}"
    shards = Path(directory).glob("*.safetensors")
    tensors = [tensor for shard in shards for tensor in load_file(shard).values()]
    expected = sum(float(tensor.double().sum()) for tensor in tensors)
    assert float(total) == pytest.approx(expected, rel=1e-9)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    for revision, commit in (("v1", OLDER), (OLDER, OLDER), ("main", COMMIT)):
        done = found_on(hub, revision=revision)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1] == commit
    refused(
        found_on(hub, revision="v2"), 3, f"{ID} at v2: no such revision", "branch, tag or commit"
    )


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, "RepoNotFound", ("no such repository, or it is private (401)", "hf auth login")),
        (401, None, ("refuses this account or its token (401)", "correct HF_TOKEN")),
        (404, "RepoNotFound", ("no such repository, or it is private (404)", "check the name")),
        (403, "GatedRepo", ("gated", "accept its terms on the hub and log in", "HF_TOKEN")),
        (403, None, ("refuses this account or its token (403)", "hf auth login")),
        (429, None, ("too many requests", "wait some minutes")),
    ],
)
def test_what_the_hub_refuses_is_a_model_error_with_a_remedy(
    hub: Hub, status: int, error: str | None, words: tuple[str, ...]
) -> None:
    hub.repository.status, hub.repository.error_code = status, error
    done = found_on(hub)
    refused(done, 3, ID, *words)
    assert float(done.stdout) == 0  # a refusal is not tried again and again


def test_a_gated_repository_that_shows_its_description_is_gated_all_the_same(hub: Hub) -> None:
    hub.repository.status, hub.repository.error_code = 403, "GatedRepo"
    hub.repository.refuse_files = True
    refused(found_on(hub), 3, "gated", "accept its terms")


def test_a_hub_that_is_broken_is_a_resource(hub: Hub) -> None:
    hub.repository.status = 503
    refused(found_on(hub), 4, "the hub answers with an error (503)", "try again later")


def test_without_a_network_and_a_cache_it_says_just_that_and_soon(hub: Hub) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = unused.getsockname()[1]
        for lost in (
            {"HF_ENDPOINT": f"http://127.0.0.1:{port}"},
            {"HF_ENDPOINT": "http://no-such-host.invalid"},
            {"HF_HUB_OFFLINE": "1"},
        ):
            done = found_on(hub, **lost)
            refused(
                done, 4, f"{ID}: the hub cannot be reached and the local hub cache does not hold"
            )
            assert "give the directory of a downloaded copy" in done.stderr.splitlines()[-1]
            assert float(done.stdout) == 0
    assert hub.repository.asked == []


def test_half_a_download_is_not_taken_for_a_model(hub: Hub) -> None:
    directory = Path(found_on(hub).stdout.splitlines()[0])
    shard = next(iter(sorted(directory.glob("*.safetensors"))))
    shard.resolve().unlink()
    shard.unlink()
    refused(found_on(hub, HF_HUB_OFFLINE="1"), 4, "does not hold this model")
    # With the hub the missing file alone is fetched.
    hub.repository.asked.clear()
    assert found_on(hub).returncode == 0
    assert {line.split("/")[-1] for line in hub.repository.asked if "/resolve/" in line} == {
        shard.name
    }


def test_room_on_the_disk_is_checked_before_a_file_is_fetched(hub: Hub) -> None:
    hub.repository.claimed_size = 10**15
    free = shutil.disk_usage(hub.home).free
    assert free < 10**15
    done = found_on(hub)
    refused(done, 4, " bytes are to be fetched into ", "free", "HF_HOME")
    assert not [line for line in hub.repository.asked if "/resolve/" in line]
    assert not list(hub.home.rglob("*.safetensors"))


def test_a_repository_of_pickles_or_of_nothing_is_refused_before_a_download(hub: Hub) -> None:
    hub.repository.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    refused(found_on(hub), 3, "its weights are pickles", "safetensors")
    hub.repository.files = {"config.json": b"{}"}
    refused(found_on(hub), 3, f"{ID}: holds no safetensors")
    assert not [line for line in hub.repository.asked if "/resolve/" in line]


SHOWN: tuple[tuple[dict[str, Any] | None, str], ...] = (
    (None, "config.json: no such file"),
    ({"model_type": "llamma"}, "has no causal language model of model_type 'llamma'"),
    ({"num_local_experts": 8}, "is a mixture of experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "are quantized by 'gptq'"),
    ({"auto_map": {"AutoConfig": "x.X"}, "model_type": "own"}, "remote code is never run"),
)


@pytest.mark.parametrize("how", ["command", "load_base"])
def test_what_config_shows_is_refused_before_weights_are_fetched(hub: Hub, how: str) -> None:
    """Each in a process of its own, forked from one that has imported what it needs."""
    files = hub.repository.files
    config = json.loads(files.pop("config.json"))
    command = [sys.executable, "-c", ONE_BY_ONE, how, ID]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=hub.home,
        env=hub.environment(),
    ) as process:
        assert process.stdin
        assert process.stdout
        for changes, words in SHOWN:
            files.pop("config.json", None)
            if changes is not None:
                files["config.json"] = json.dumps(config | changes).encode()
            shutil.rmtree(hub.home / "hf", ignore_errors=True)
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line.startswith("3 error: ")
            assert words in line
        process.stdin.close()
    fetched = {line.split("/")[-1] for line in hub.repository.asked if "/resolve/" in line}
    assert fetched <= {"config.json"}


def test_a_short_name_stands_for_a_hub_id(hub: Hub) -> None:
    done = found_on(hub, "mistral-7b")
    refused(done, 3, "mistralai/Mistral-7B-v0.3: the hub has no such repository")
    assert "GET /api/models/mistralai/Mistral-7B-v0.3" in hub.repository.asked


@pytest.mark.parametrize("name", ["no-such-name", "owner/" + "x" * 200, "owner/a..b", "a b/c"])
def test_a_name_that_is_no_hub_id_is_never_asked_for(hub: Hub, name: str) -> None:
    done = found_on(hub, name)
    refused(done, 3, name[:40])
    assert hub.repository.asked == []


def test_a_revision_of_a_directory_is_refused(hub: Hub) -> None:
    (hub.home / "base").mkdir()
    (hub.home / "base" / "config.json").write_text("{}")
    refused(
        found_on(hub, "./base", "main"), 2, "revision main is given, and ./base is not on the hub"
    )
    refused(found_on(hub, "tiny", "main"), 2, "leave --revision out")


def test_a_private_repository_opens_for_the_token_of_the_environment_or_the_login(
    hub: Hub,
) -> None:
    hub.repository.token = TOKEN
    refused(found_on(hub), 3, "private", "HF_TOKEN")
    assert found_on(hub, HF_TOKEN=TOKEN).returncode == 0
    shutil.rmtree(hub.home / "hf")
    (hub.home / "hf").mkdir()
    (hub.home / "hf" / "token").write_text(TOKEN)
    assert found_on(hub).returncode == 0
    assert f"Bearer {TOKEN}" in hub.repository.tokens


COMMANDS = """
import json, sys
from qlora_kit.commands.main import main
print(json.dumps([main(argv) for argv in json.loads(sys.argv[1])]))
"""


def test_no_token_is_in_any_output_or_file(hub: Hub) -> None:
    hub.repository.token = TOKEN
    (hub.home / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (hub.home / "token.yaml").write_text(f"bits: 4\nhf_token: {TOKEN}\n")
    (hub.home / "broken.yaml").write_text(f"bits: 4\nmodel: [{TOKEN}\n")
    (hub.home / "value.yaml").write_text(f"bits: {TOKEN}\n")
    evaluate = ("evaluate", "--data", "rows.jsonl", "--debug")
    wrong = {
        (*evaluate, "--model", ID, "--token", TOKEN): 2,
        (*evaluate, "--model", ID, f"--hf_token={TOKEN}"): 2,
        (*evaluate, TOKEN): 2,
        (*evaluate, "--bits", TOKEN): 2,
        (*evaluate, "--model", TOKEN): 3,
        (*evaluate, "--model", f"owner/{TOKEN}"): 3,
        (*evaluate, "--model", f"http://user:{TOKEN}@127.0.0.1/owner/x"): 3,
        (*evaluate, "--model", ID, "--revision", TOKEN): 3,
        (*evaluate, "--config", "token.yaml"): 2,
        (*evaluate, "--config", "broken.yaml"): 2,
        (*evaluate, "--config", "value.yaml"): 2,
        (TOKEN,): 2,
    }
    good = (*evaluate, "--model", ID, "--bits", "16", "--max_new_tokens", "2")
    # One that looks like none of the hub's is the environment's all the same.
    other = "my-own-secret-of-a-mirror"
    more = {
        (*evaluate, f"--revision={other}", "--model", ID): 3,
        (*evaluate, "--model", f"owner/{other}"): 3,
    }
    before = tree_hash(hub.home)
    for token, cases in ((TOKEN, wrong), (other, more), (TOKEN, {good: 0})):
        # With all that the client logs when it is asked to.
        done = hub.python(COMMANDS, json.dumps(list(cases)), HF_TOKEN=token, HF_DEBUG="1")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == list(cases.values())
        for text in (done.stdout, done.stderr):
            assert token not in text
            assert token[3:20] not in text
        if good not in cases:
            assert tree_hash(hub.home) == before
    # As a name it was not sent either.
    assert not [line for line in hub.repository.asked if other in line or TOKEN in line]
    for path in hub.home.rglob("*"):
        if path.is_file() and path.suffix != ".yaml":
            assert TOKEN.encode() not in path.read_bytes(), path


def test_a_hub_that_is_silent_is_given_up(hub: Hub) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        done = found_on(
            hub, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}", HF_HUB_ETAG_TIMEOUT="1"
        )
    refused(done, 4, "the hub cannot be reached")
