"""The client of models' servers: a key stays with its server, and what is odd is told in words."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from shared.errors import UserError
from shared.http import JsonClient, ServerError


@pytest.fixture
def serve():
    """`serve(plan)`: a server that answers a request's number with (status, body, headers), and what it was sent."""
    running = []

    def start(plan):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(dict(self.headers))
                status, body, headers = plan(len(seen))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", seen

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_key_is_not_sent_on_to_where_a_server_redirects(serve):
    other, there = serve(lambda number: (200, b"{}", {}))
    url, here = serve(lambda number: (302, b"", {"Location": f"{other}/elsewhere"}))
    assert JsonClient(url, api_key="secret").get("/v1/models") == {}
    assert here[0]["Authorization"] == "Bearer secret" and len(there) == 1 and "Authorization" not in there[0]


def test_what_passes_is_asked_again_and_counted(serve):
    url, seen = serve(lambda number: (503, json.dumps({"error": {"message": "loading"}}).encode(), {}))
    with pytest.raises(ServerError, match=r"answered 503: loading \(asked 3 times\)") as failed:
        JsonClient(url, retries=2, backoff=0.001).get("/x")
    assert failed.value.status == 503 and len(seen) == 3


def test_bytes_that_are_no_text_are_no_crash(serve):
    url, _ = serve(lambda number: (200, b"\xff\xfe", {}))
    assert JsonClient(url).get("/x") == "\N{REPLACEMENT CHARACTER}" * 2


def test_an_address_with_a_login_is_refused_without_showing_it():
    with pytest.raises(UserError, match="holds a login") as failed:
        JsonClient("http://me:hidden@host:1")
    assert "hidden" not in str(failed.value)
