"""The page of the server: what it may load, what it names, and how text gets into it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from served import Served

from qlora_kit.serving.models import Model
from qlora_kit.serving.schemas import ChatRequest, CompletionRequest


class Elements(HTMLParser):
    """Tags with their attributes, and the text within script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        assert self.lasttag not in ("script", "style") or not data.strip()


@pytest.fixture(scope="module")
def page(server: Served) -> Elements:
    with server.client() as client:
        return Elements(client.get("/").text)


@pytest.fixture(scope="module")
def script(server: Served) -> str:
    with server.client() as client:
        return client.get("/page.js").text


def test_what_the_page_loads_is_the_servers_own(server: Served, page: Elements) -> None:
    loaded = [
        one[name] or ""
        for _, one in page.found
        for name in ("src", "href")
        if name in one and not (one[name] or "").startswith("data:")
    ]
    assert sorted(loaded) == ["page.css", "page.js"]
    kinds = {"page.css": "text/css", "page.js": "text/javascript"}
    with server.client() as client:
        for name in loaded:
            answer = client.get(f"/{name}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kinds[name])
            assert not re.search(r"https?:|//[a-z]|@import|url\(", answer.text)


def test_the_policy_that_forbids_inline_code_forbids_nothing_of_the_page(
    server: Served, page: Elements
) -> None:
    with server.client() as client:
        policy = client.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    for _, attributes in page.found:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


def test_what_a_model_says_gets_into_the_page_as_text_alone(script: str) -> None:
    as_html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|eval\(|Function\("
    assert not re.search(as_html, script)
    assert "localStorage" not in script
    assert "cookie" not in script


def test_the_script_and_the_labels_name_elements_of_the_page(page: Elements, script: str) -> None:
    ids = [one["id"] for _, one in page.found if "id" in one]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'\$\("(\w+)"\)', script))
    named |= set(re.findall(r'"(\w+)"', re.search(r"FIELDS = \[(.*?)\]", script)[1]))
    for _, attributes in page.found:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            named |= {attributes[name]} if name in attributes else set()
    assert named <= set(ids)


def test_the_paths_that_the_script_asks_are_there(server: Served, script: str) -> None:
    paths = set(re.findall(r'"(v1/[\w/]+)"', script))
    assert paths == {"v1/models", "v1/completions", "v1/chat/completions"}
    with server.client() as client:
        assert client.get("/v1/models").status_code == 200
        for path in paths - {"v1/models"}:
            assert client.post(f"/{path}", json={}).status_code == 400


def test_plain_text_is_sent_with_the_line_end_before_the_answer(script: str) -> None:
    assert r'turn.prompt.endsWith("\n") ? turn.prompt : `${turn.prompt}\n`' in script
    assert "prompt: turn.prompt }" not in script


def test_the_page_begins_in_plain_text_where_all_adapters_were_trained_in_it(script: str) -> None:
    described = [Model("sql", "sql", None, is_plain).described for is_plain in (True, False)]
    assert [one.get("form") for one in described] == ["text", None]
    assert 'every((model) => model.form === "text")' in script


def test_fields_that_nobody_filled_are_left_to_the_server(page: Elements) -> None:
    """A number of the page's own may be more than a server's limit."""
    (tokens,) = (one for _, one in page.found if one.get("id") == "max_tokens")
    assert "value" not in tokens
    assert tokens["placeholder"]


def test_the_usual_tokens_that_the_page_names_are_those_of_the_form(script: str) -> None:
    usual = f'"text" ? "{CompletionRequest.usual_tokens}" : "the server\'s"'
    assert usual in script
    assert ChatRequest.usual_tokens is None


def test_settings_do_not_open_again_by_themselves(page: Elements, script: str) -> None:
    """The key is asked for when the page opens and after a message; why, stands in the dialog."""
    tags = [tag for tag, _ in page.found]
    (alert,) = (at for at, (_, one) in enumerate(page.found) if one.get("role") == "alert")
    assert alert > tags.index("dialog")
    functions = re.split(r"^(?=/\*\*|(?:async )?function|\$|window|const)", script, flags=re.M)
    asking = [one for one in functions if "askForKey(" in one or "showModal" in one]
    assert not [one for one in asking if "async function call(" in one]
    assert not [one for one in asking if '"close"' in one or '"focus"' in one]
    (listing,) = (one for one in functions if "async function listModels(" in one)
    assert listing not in asking
    assert script.rstrip().endswith("listModels().then(greet);")
    (greeting,) = (one for one in functions if "function greet(" in one)
    assert "This server asks for a key." in greeting


def test_an_answer_that_ended_at_once_is_part_of_the_chat(server: Served, script: str) -> None:
    """What is left out of the next message is what was refused, not what has no text."""
    assert "!answer.text) continue" not in script
    user = {"role": "user", "content": "Hello"}
    messages = [user, {"role": "assistant", "content": ""}, user]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
