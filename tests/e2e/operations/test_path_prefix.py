"""A server under a path prefix behind nginx: the API, the probes, the page in a browser."""

import shutil
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from tests.e2e.conftest import ServerProcess
from tests.e2e.operations.proxy import Proxy

PREFIX = "/trm"  # that of deploy/nginx/trm.conf
KEY = {"Authorization": "Bearer secret"}
QUESTION = "Tom has 12 apples. He buys 7 more. How many apples does he have now?"


@pytest.fixture(scope="module")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    return start_server(
        "--root-path", PREFIX, "--api-key", "secret", "--public-paths", "/", "/playground/*", "--num-threads", "1"
    )


@pytest.fixture(scope="module", params=[False, True], ids=["left in place", "taken away"])
def proxy(
    request: pytest.FixtureRequest, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """nginx with the block of deploy/nginx/trm.conf that is for a prefix."""
    proxy = Proxy([server.url] * 2, tmp_path_factory.mktemp("nginx"), prefixed=True, strip=request.param)
    yield proxy
    proxy.stop()


def test_clients_work_below_the_prefix(proxy: Proxy) -> None:
    client = openai.OpenAI(base_url=f"{proxy.url}{PREFIX}/v1", api_key="secret", max_retries=0)
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}], stream=True)

    assert list(stream)[-1].choices[0].boxed_answer == "19"  # type: ignore[attr-defined]


def test_probes_need_no_key_and_the_rest_does(proxy: Proxy) -> None:
    for path, without, with_key in (
        ("/health", 200, 200),
        ("/ready", 200, 200),
        ("/", 200, 200),
        ("/version", 401, 200),
        ("/openapi.json", 401, 200),
        ("/metrics", 404, 404),  # nginx keeps it
    ):
        url = f"{proxy.url}{PREFIX}{path}"
        assert httpx.get(url).status_code == without, path
        assert httpx.get(url, headers=KEY).status_code == with_key, path
    for path in ("/health", "/v1/models"):  # of something else on this host
        assert httpx.get(f"{proxy.url}{path}").status_code == 404
    page = httpx.get(f"{proxy.url}{PREFIX}", follow_redirects=True)
    assert (page.status_code, page.url.path) == (200, f"{PREFIX}/")


def test_the_documents_page_asks_for_the_document_below_the_prefix(proxy: Proxy) -> None:
    assert f"'{PREFIX}/openapi.json'" in httpx.get(f"{proxy.url}{PREFIX}/docs", headers=KEY).text


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium-driver: deploy/debian-packages.txt")
def test_the_page_answers_in_a_browser(proxy: Proxy) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(f"{proxy.url}{PREFIX}")
        driver.execute_script("sessionStorage.setItem('trm-api-key', 'secret')")
        driver.refresh()
        wait = WebDriverWait(driver, 60)
        wait.until(lambda _: driver.find_element(By.ID, "effort").is_enabled())
        driver.find_element(By.ID, "question").clear()
        driver.find_element(By.ID, "question").send_keys(QUESTION + "\n")
        wait.until(lambda _: "19" in driver.find_element(By.ID, "reply").text)
    finally:
        driver.quit()
