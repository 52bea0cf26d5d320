"""The judge against a small server that speaks the protocol: scores, images, failures, garbage."""

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from shared.errors import UserError
from shared.rewards.base import RowErrors, Sample
from shared.rewards.combine import RewardSet
from shared.rewards.judges import EndpointJudge, JudgeError


class Server:
    """Answers by `plan(number of the request, body) -> (status, text or None for silence, headers)`."""

    def __init__(self):
        self.bodies, self.headers, self.paths = [], [], []
        self.running = self.most = 0
        self.plan = lambda number, body: (200, "10", {})
        self.lock, self.released = threading.Lock(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            number = len(self.bodies)
            self.running += 1
            self.most = max(self.most, self.running)
        status, text, headers = self.plan(number, body)
        if text is None:
            self.released.wait(20)
            handler.close_connection = True
            return
        with self.lock:
            self.running -= 1
        reply = (
            text
            if status != 200 or text.startswith("{")
            else json.dumps({"choices": [{"message": {"content": text}}]})
        )
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(reply.encode()))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(reply.encode())

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def judge(server, **options):
    return EndpointJudge(server.url, "org/tiny", **{"backoff": 0.01, "timeout": 20, **options})


def asked(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_an_answer_is_shown_and_its_score_brought_to_one(server):
    server.plan = lambda number, body: (200, "It is 2 + 2.\nScore: 5" if "four" in asked(body) else "0", {})
    reward = judge(server, max_tokens=50)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    scores = reward(["2 + 2?", chat], ["four", [{"role": "assistant", "content": "five"}]], kind=["sum"] * 2)
    assert scores == [0.5, 0.0] and reward.__name__ == "judge_tiny"
    assert server.paths == ["/v1/chat/completions"] * 2
    first, second = sorted(server.bodies, key=lambda body: "five" in asked(body))
    assert first["model"] == "org/tiny" and first["temperature"] == 0 and first["max_tokens"] == 50
    assert (
        "Request:\n2 + 2?\n" in asked(first)
        and "Answer:\nfour\n" in asked(first)
        and "from 0 (worst) to 10" in asked(first)
    )
    assert "Request:\nsystem: Be brief.\nuser: 2 + 2?\n" in asked(second)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    "reply, score",
    [("7/10", 0.7), ("I give 7 out of 10.", 0.7), ("**7.5**", 0.75), ("Score: 8 / 10\n", 0.8), ("10", 1.0),
     ("v2 says 1", 0.1), ("10/10", 1.0), ("**7**/10", 0.7), ("Score: 8. (out of 10)", 0.8), ("$\\boxed{7}$", 0.7),
     ("8 on a scale from 0 to 10", 0.8), ("Rating: 3 (scale of 0 to 10)", 0.3), ("Score (0-10): 7", 0.7),
     ("There are 2 slips and 1 gap.\n\n7", 0.7), ("2 slips.\n7\nI hope that helps.", 0.7),
     ("3 of 4 points are right. **Rating:** 6", 0.6), ("From 0 (worst) to 10 (best) I say 0.5.", 0.05)],
)  # fmt: skip
def test_the_score_of_a_reply(server, reply, score):
    assert judge(server)._score(reply) == pytest.approx(score)


@pytest.mark.parametrize(
    "reply",
    ["3-4", "3–4", "between 2 and 9, so 6.", "4/5", "Score: 4/5", "7,5/10", "80 %", "Score: 3. Score: 8.", "none"],
)
def test_a_reply_that_can_be_read_in_two_ways_is_no_score(server, reply):
    with pytest.raises(JudgeError, match="several numbers|no number"):
        judge(server)._score(reply)


def test_a_reply_that_was_cut_off_is_no_score(server):
    def said(text, reason):
        choice = {"message": {"content": text}, "finish_reason": reason}
        server.plan = lambda number, body: (200, json.dumps({"choices": [choice]}), {})
        return judge(server)(["p"], ["c"])

    assert said("It has 2 faults", "stop") == [0.2] and said("7\nIt has 2", "length") == [0.7]
    with pytest.raises(RowErrors, match="cut off before its score .raise max_tokens.: 'It has 2 faults'"):
        said("It has 2 faults", "length")


def test_a_range_and_a_prompt_of_ones_own(server):
    server.plan = lambda number, body: (200, "-1", {})
    reward = judge(server, prompt="{solution}|{completion}|{low}|{{}}", low=-3, high=1)
    assert reward(["p"], ["c"], solution=["s"]) == [0.5]
    assert asked(server.bodies[0]) == "s|c|-3|{}"
    with pytest.raises(UserError, match=r"names \{solution\}, and the rows have no such column; there are: kind"):
        reward(["p"], ["c"], kind=["k"])


def test_images_are_sent(server):
    picture = Image.new("RGB", (2, 3), (255, 0, 0))
    reward = judge(server)
    in_message = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}
    ]
    in_column = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    reward([in_message], ["red"])
    reward([in_column], ["red"], images=[[picture]])
    reward(["Draw red."], [picture])
    for body in server.bodies:
        shown, text = body["messages"][0]["content"]
        kind, data = shown["image_url"]["url"].split(",")
        decoded = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/png;base64" and decoded.size == (2, 3) and decoded.getpixel((0, 0)) == (255, 0, 0)
    assert "Request:\nWhat?\n" in asked(server.bodies[0]) and "Description:\nDraw red.\n" in asked(server.bodies[2])


def test_generated_images_are_sent_once(server):
    server.plan = lambda number, body: (200, "7", {})
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4)
    rows = [Sample("a red circle", red, {"kind": "x"}), Sample("a blue square", red.flip(0), {"kind": "y"})]
    asks = "Is this a {kind}: {prompt}? {completion}"
    for reward, words in (
        (judge(server), "Description:\na red circle\n"),
        (judge(server, prompt=asks), "Is this a x: a"),
    ):
        server.bodies.clear()
        assert RewardSet(reward)(rows).values[:, 0].tolist() == pytest.approx([0.7, 0.7])
        (first,) = [body for body in server.bodies if "a red circle" in asked(body)]
        shown, text = first["messages"][0]["content"]
        decoded = Image.open(io.BytesIO(base64.b64decode(shown["image_url"]["url"].split(",")[1])))
        assert decoded.size == (4, 4) and decoded.getpixel((0, 0)) == (255, 0, 0) and words in text["text"]


def test_a_busy_server_is_asked_again(server):
    answers = {1: (503, "busy", {}), 2: (429, "slowly", {"Retry-After": "0.3"}), 3: (200, "9", {})}
    server.plan = lambda number, body: answers[number]
    started = time.monotonic()
    assert judge(server, retries=2)(["p"], ["c"]) == [0.9]
    assert len(server.bodies) == 3 and time.monotonic() - started >= 0.3


def test_rows_without_a_score_are_named(server):
    replies = {
        "garbage": (200, "no idea", {}),
        "odd": (200, "{}", {}),
        "far": (200, "11", {}),
        "down": (500, "oops", {}),
    }
    server.plan = lambda number, body: replies.get(asked(body), (200, "5", {}))
    reward = judge(server, retries=1, prompt="{completion}")
    with pytest.raises(RowErrors) as failed:
        reward(["p"] * 5, ["garbage", "fine", "odd", "far", "down"])
    assert failed.value.values == [None, 0.5, None, None, None]
    words = {0: "no number, but 'no idea'", 2: "no chat completion", 3: "11, which is not within 0 and 10",
             4: "answered 500: oops (asked 2 times)"}  # fmt: skip
    assert sorted(failed.value.errors) == sorted(words)
    for row, said in words.items():
        assert said in str(failed.value.errors[row])
    rows = [Sample("p", "fine", {"__row__": 7}), Sample("p", "far", {"__row__": 8})]
    with pytest.raises(UserError, match=r"Reward judge_tiny failed on row 8 \('far'\): the judge gave 11"):
        RewardSet(reward)(rows)
    table = RewardSet(reward, on_error="zero", timeout=20)(rows)
    assert table.values.tolist() == [[0.5], [0.0]] and table.errors == {"judge_tiny": 1}


def test_what_will_not_get_better_is_asked_once(server):
    server.plan = lambda number, body: (401, "who are you?", {})
    with pytest.raises(RowErrors, match="answered 401: who are you"):
        judge(server, retries=5)(["p"], ["c"])
    assert len(server.bodies) == 1


def test_a_silent_server_is_asked_again_and_named(server):
    server.plan = lambda number, body: (200, None if number == 1 else "5", {})
    assert judge(server, timeout=0.2)(["p"], ["c"]) == [0.5]
    server.plan = lambda number, body: (200, None, {})
    with pytest.raises(RowErrors, match="did not answer within 0.2 seconds.*asked 2 times"):
        judge(server, timeout=0.2, retries=1)(["p"], ["c"])
    server.close()
    with pytest.raises(RowErrors, match="cannot be reached: [^(]*$"):
        judge(server, retries=0)(["p"], ["c"])


def test_no_more_requests_at_once_than_allowed(server):
    server.plan = lambda number, body: (time.sleep(0.05), (200, "5", {}))[1]
    assert judge(server, max_concurrency=2)(["p"] * 6, ["c"] * 6) == [0.5] * 6
    assert server.most == 2


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    reward = judge(server, api_key_env="JUDGE_KEY")
    reward(["p"], ["c"])
    assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in repr(vars(reward))
    with pytest.raises(UserError, match="api_key_env is no name") as failed:
        judge(server, api_key_env="sk-hidden")
    assert "hidden" not in str(failed.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="environment variable JUDGE_KEY, which is not set"):
        judge(server, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    "url, model, options, words",
    [
        ("file:///etc", "m", {}, "in full, such as http"),
        ("localhost:8000", "m", {}, "in full, such as http"),
        ("http://h", "", {}, "no model"),
        ("http://h", "m", {"low": 1, "high": 1}, "low must be less than high"),
        ("http://h", "m", {"retries": -1}, "retries is -1"),
        ("http://h", "m", {"max_concurrency": 0}, "max_concurrency is 0"),
        ("http://h", "m", {"timeout": 0}, "timeout is 0"),
        ("http://h", "m", {"prompt": "{"}, "double a brace"),
        ("http://h", "m", {"prompt": "{a.b}"}, "no column's name"),
        ("http://h", "m", {"prompt": "{prompt:{foo}}"}, "no column's name"),
        ("http://h", "m", {"prompt": "{prompt!x}"}, "no column's name"),
        ("http://h", "m", {"timeout": "abc"}, "timeout is 'abc': give a number"),
        ("http://h", "m", {"low": None}, "low is None: give a number"),
        ("http://h", "m", {"retries": 1.5}, "retries is 1.5: give a whole number"),
        ("http://h", "m", {"backoff": "1"}, "backoff is '1': give a number"),
        ("http://h", "m", {"api_key": "k"}, "api_key, which would be written down: .* api_key_env"),
        ("http://h", "m", {"retrys": 1}, "takes no retrys. Did you mean retries"),
        ("http://me:pw@h", "m", {}, "holds a login"),
    ],
)
def test_what_cannot_be_is_refused(url, model, options, words):
    with pytest.raises(UserError, match=words):
        EndpointJudge(url, model, **options)
