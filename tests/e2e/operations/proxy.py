"""The nginx of deploy/nginx/trm.conf as an ordinary process, in front of servers of a test."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from tests.waiting import wait_for

CONF = Path(__file__).parents[3] / "deploy" / "nginx" / "trm.conf"
MAIN = """
daemon off;
pid nginx.pid;
worker_processes 1;
error_log error.log;
{user}
events {{}}
http {{
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include trm.conf;
}}
"""


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def nginx() -> str:
    """The program. A test without it has failed: it stands in deploy/debian-packages.txt."""
    found = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/bin")
    assert found, "nginx is missing; install Debian's package nginx-light"
    return found


def write_conf(folder: Path, urls: list[str], port: int, prefixed: bool = False, strip: bool = False) -> list[str]:
    """The configuration with these servers and this port; the command that runs it in `folder`.

    `prefixed`: with the lines for a path prefix, which are comments there; `strip`: nginx takes the prefix away.
    """
    lines = iter(urls)
    conf = re.sub(r"server 127.0.0.1:\d+", lambda _: "server " + next(lines).removeprefix("http://"), CONF.read_text())
    assert next(lines, None) is None, "the file has fewer servers"
    conf = conf.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("/var/log/nginx/", "")
    if prefixed:
        conf, replaced = re.subn(r"    location / \{\n.*?\}\n", "", conf, flags=re.DOTALL)
        assert replaced == 1
        conf = re.sub(r"^    #(location|    |\})", r"    \1", conf, flags=re.MULTILINE)
        conf = conf.replace("proxy_pass http://trm;", "proxy_pass http://trm/;") if strip else conf
    (folder / "trm.conf").write_text(conf)
    (folder / "nginx.conf").write_text(MAIN.format(user="user root;" if os.geteuid() == 0 else ""))
    return [nginx(), "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"]


class Proxy:
    """A running nginx."""

    def __init__(self, urls: list[str], folder: Path, prefixed: bool = False, strip: bool = False) -> None:
        self.folder = folder
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(write_conf(folder, urls, port, prefixed, strip), stdout=subprocess.DEVNULL)
        wait_for(lambda: self._listens(port))

    def _listens(self, port: int) -> bool:
        assert self._process.poll() is None, self.errors
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    @property
    def errors(self) -> str:
        """Its error log."""
        return (self.folder / "error.log").read_text()

    @property
    def requests(self) -> list[str]:
        """Its access log."""
        return (self.folder / "trm.log").read_text().splitlines()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        finally:
            self._process.kill()
