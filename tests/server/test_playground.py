"""GET /: which files there are, and what keeps them harmless. What they do is tested in a browser, in tests/e2e."""

import json
import operator
import re

import pytest

from server.routes.playground import FILES, FOLDER, PATHS

pytestmark = pytest.mark.anyio


async def test_the_page_is_served(client):
    response = await client.get("/")

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == (FOLDER / "index.html").read_text()


async def test_every_file_is_served_as_what_it_is(client):
    assert set(PATHS.values()) == set(FILES) == {file.name for file in FOLDER.iterdir()}
    for path, name in PATHS.items():
        response = await client.get(path)

        assert response.content == (FOLDER / name).read_bytes()
        assert response.headers["content-type"].partition(";")[0] == FILES[name]


async def test_nothing_can_be_loaded_from_or_sent_to_anywhere_else(client):
    for path in PATHS:
        headers = (await client.get(path)).headers

        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy.pop("default-src") == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", [name for name in FILES if name != "icon.svg"])
def test_what_a_file_refers_to_is_there(name):
    text = (FOLDER / name).read_text()

    assert not re.search("https?:|//[a-z]+[.]", text), "nothing lies on other servers"
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|innerHTML", text), "nothing that the policy forbids, no markup"
    assert set(re.findall(r'(?:href|src)="playground/(.*?)"|from "[.]/(.*?)"', text)) <= {
        pair for file in FILES for pair in ((file, ""), ("", file))
    }


OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
EXAMPLES = json.loads(re.search(r"EXAMPLES = (\[.*\]);", (FOLDER / "examples.js").read_text(), re.DOTALL)[1])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["name"])
def test_the_steps_of_an_example_are_right(example):
    """Each equation holds; together they use every number of the question, and every result but the last, once."""
    numbers = [int(number) for number in re.findall(r"\d+", example["question"])]
    for equation in example["equations"]:
        left, sign, right, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", equation).groups()
        assert OPERATORS[sign](int(left), int(right)) == int(result)
        numbers.remove(int(left))
        numbers.remove(int(right))
        numbers.append(int(result))

    assert len(example["equations"]) > 1, "steps to watch"
    assert len(numbers) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/nothing.js",
        "/playground/%2e%2e/app.py",
        "/playground/..%2fapp.py",
        "/playground//etc/passwd",
        "/playground/main.js%00",
        "/playground/main.js/../../app.py",
    ],
)
async def test_no_other_path_leads_to_a_file(client, path):
    response = await client.get(path)

    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


async def test_a_public_page_opens_without_a_key_but_gets_nothing_done(make_app, connect):
    async with connect(make_app(api_key=["secret"])) as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 401
    async with connect(make_app(api_key=["secret"], public_paths=["/", "/playground/*"])) as client:
        for path in PATHS:
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/playground/nothing.js")).status_code == 404
        for path in ("/v1/models", "/docs"):
            assert (await client.get(path)).status_code == 401
        assert (await client.post("/v1/chat/completions", json={})).status_code == 401
