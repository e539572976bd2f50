"""/v1/chat/completions: what may be asked, how it is answered, and what is refused."""

import base64
import json

import pytest
from PIL import Image
from tiny_server import ANSWER, DEMO, about_demo, data_url, events, text_chat

from mcv_runtime import Video

CHAT = "/v1/chat/completions"


def asked(client, body):
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(client, body, status=400):
    response = client.post(CHAT, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


def test_answer_has_what_clients_read(client):
    said = asked(client, about_demo())
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert said["object"] == "chat.completion" and said["id"] and said["created"] > 0 and said["model"]
    usage = said["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 64  # the demo picture is one slice of 64 queries
    assert said["pictures"] == [{"size": [112, 112], "grid": None, "slice_sizes": [[112, 112]], "visual_tokens": 64}]


def test_usage_is_exact_and_counts_what_was_known(client, engine):
    body = about_demo("Which colour is the text?")
    first, again = asked(client, body), asked(client, body)
    prompt = engine.prompt([{"role": "user", "content": [DEMO, "Which colour is the text?"]}])
    counted = client.post("/v1/chat/completions/input_tokens", json=body).json()
    assert counted["input_tokens"] == len(prompt.ids) == first["usage"]["prompt_tokens"]
    assert counted["image_tokens"] == len(prompt.visual_positions) == 64
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt.ids) - 1


@pytest.mark.parametrize(
    ("kind", "label", "mode"),
    [
        ("PNG", "image/jpeg", "RGBA"),  # as docling sends it, under a label that is not true
        ("WEBP", "image/png", "RGB"),
        ("JPEG", "application/octet-stream", "RGB"),
        ("GIF", "image/jpg", "P"),
        ("TIFF", "", "RGB"),
        ("BMP", "image/jpeg;charset=utf-8", "RGB"),
        ("AVIF", "text/plain", "RGB"),
        ("PPM", "image/x-portable-pixmap", "RGB"),
    ],
)
def test_any_picture_under_any_label(client, kind, label, mode):
    save = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "AVIF") else {}
    url = data_url(Image.open(DEMO).convert(mode), kind, label, **save)
    assert asked(client, about_demo(url=url))["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.partition(",")[2],  # bare base64
        lambda url: url.replace("+", "-").replace("/", "_").replace("data:image_png", "data:image/png"),
        lambda url: url.rstrip("="),
        lambda url: url[:100] + "\n" + url[100:],
        lambda url: url.replace("data:", "DATA:"),
    ],
)
def test_base64_as_clients_write_it(client, change):
    assert asked(client, about_demo(url=change(data_url())))["choices"][0]["message"]["content"] == ANSWER


def test_image_url_as_plain_text(client):
    body = about_demo()
    body["messages"][0]["content"][0]["image_url"] = data_url()
    assert asked(client, body)["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/jpeg;base64,JVBERi0xLjcKJeLjz9M=", "invalid_image"),  # a PDF under another label
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,@@@@", "invalid_image"),
        ("data:image/png,abc", "invalid_image"),
        ("data:image/png;base64,AAAA", "invalid_image"),
        ("http://127.0.0.1/x.png", "invalid_image_url"),
        ("https://example.org/x.png", "remote_images_disabled"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("gopher://x/", "invalid_image_url"),
        ("/etc/passwd", "invalid_image"),
        ("", "invalid_image"),
    ],
)
def test_no_picture(client, url, code):
    assert refused(client, about_demo(url=url))["code"] == code if url else True
    body = about_demo()
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    assert refused(client, body)["code"] == code


def test_a_pdf_is_its_pages(client, make_pdf):
    """Whatever its label says."""
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 50]>>"

    def visual(kids):
        url = f"data:image/jpeg;base64,{base64.b64encode(make_pdf(page, kids=kids)).decode()}"
        body = about_demo(url=url, max_tokens=1)
        return asked(client, body)["usage"]["prompt_tokens_details"]["image_tokens"]

    assert visual([3, 3, 3]) == 3 * visual([3]) > 0
    assert "PDF" in refused(client, about_demo(url="data:image/jpeg;base64,JVBERi0xLjcKJeLjz9M="))["message"]


def test_detail_low_is_one_slice(client):
    large = data_url(Image.open(DEMO).resize((336, 224)))

    def visual(detail, **more):
        body = about_demo(url=large, **more)
        body["messages"][0]["content"][0]["image_url"]["detail"] = detail
        return asked(client, {**body, "max_tokens": 1})["usage"]["prompt_tokens_details"]["image_tokens"]

    whole = visual("auto")
    assert visual("low") == 64 and visual("high") == whole > 64
    assert visual("low", max_slice_nums=2) == visual("auto", max_slice_nums=2) < whole


@pytest.mark.parametrize("part", ["frames", "file"])
def test_video(client, engine, part, tmp_path):
    frames = [Image.new("RGB", (112, 112), colour) for colour in ("red", "green", "blue")]
    if part == "frames":
        video = Video(frames, fps=2.0)
        sent = {"type": "video", "video": [data_url(frame) for frame in frames], "fps": 2.0}
    else:
        av = pytest.importorskip("av")
        path = tmp_path / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=2)
            stream.width = stream.height = 112
            for frame in [*frames, *frames]:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        video = Video(path)
        sent = {"type": "video_url", "video_url": {"url": data_url(path, label="video/mp4")}}
    body = {"messages": [{"role": "user", "content": [sent, {"type": "text", "text": "What happens?"}]}], "max_num_frames": 2}
    said = asked(client, {**body, "max_tokens": 3})
    answer = engine.ask([video], "What happens?", max_num_frames=2, max_new_tokens=3)
    assert said["choices"][0]["message"]["content"] == answer.text
    assert said["usage"]["prompt_tokens"] == len(answer.prompt_tokens)


def test_options_reach_the_engine(client, engine):
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 7}
    said = asked(client, text_chat("Hello there", max_tokens=12, repetition_penalty=1.2, presence_penalty=0.5, **options))
    answer = engine.ask(None, "Hello there", max_new_tokens=12, repetition_penalty=1.2, presence_penalty=0.5, **options)
    assert said["choices"][0]["message"]["content"] == answer.text
    assert said["usage"]["completion_tokens"] == len(answer.tokens)


def test_greedy_ignores_what_only_draws_need(client, engine):
    said = asked(client, text_chat("Hello there", max_completion_tokens=6, temperature=0, top_p=0.3, seed=3))
    assert said["choices"][0]["message"]["content"] == engine.ask(None, "Hello there", max_new_tokens=6).text


def test_n_of_drawn_and_of_greedy_answers(client, engine):
    said = asked(client, text_chat("Hello there", n=3, temperature=1.3, seed=5, max_tokens=8))
    answer = engine.ask(None, "Hello there", num_return_sequences=3, temperature=1.3, seed=5, max_new_tokens=8)
    texts = [choice["message"]["content"] for choice in said["choices"]]
    assert texts == [answer.text, *(other.text for other in answer.alternatives)]
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2]
    same = asked(client, text_chat("Hello there", n=2, temperature=0, max_tokens=8))
    assert len({choice["message"]["content"] for choice in same["choices"]}) == 1 and len(same["choices"]) == 2


def test_stop_and_length(client):
    assert asked(client, about_demo(stop="L"))["choices"][0]["message"]["content"] == "HE"
    assert asked(client, about_demo(stop=["X", "LO"]))["choices"][0]["message"]["content"] == "HEL"
    short = asked(client, about_demo(max_tokens=2))["choices"][0]
    assert (short["message"]["content"], short["finish_reason"]) == ("HE", "length")


def test_logprobs(client, engine):
    said = asked(client, about_demo(logprobs=True, top_logprobs=3))
    answer = engine.ask(DEMO, "What does the text say?", logprobs=True, top_logprobs=3)
    content = said["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == [engine.detokenize([token]) for token in answer.tokens]
    assert [one["logprob"] for one in content] == pytest.approx(answer.logprobs, abs=1e-4)
    for one in content:
        assert len(one["top_logprobs"]) == 3
        best = one["top_logprobs"][0]
        assert (best["token"], best["logprob"]) == (one["token"], one["logprob"])  # greedy takes the likeliest
        assert bytes(one["bytes"]).decode() == one["token"]


def test_logit_bias_rules_a_token_out(client, engine):
    first = engine.ask(DEMO, "What does the text say?").tokens[0]
    biased = asked(client, about_demo(logit_bias={str(first): -100}, max_tokens=1))["choices"][0]["message"]["content"]
    expected = engine.ask(DEMO, "What does the text say?", logit_bias={first: -100.0}, max_new_tokens=1).text
    assert biased == expected != "H"


@pytest.mark.parametrize(
    ("form", "check"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "n", "strict": True, "schema": {
                    "type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
                    "additionalProperties": False,
                }}}},
            lambda text: list(json.loads(text)) == ["a"],
        ),
        ({"guided_choice": ["red", "blue"]}, lambda text: text in ("red", "blue")),
        ({"guided_regex": "[0-9]{3}"}, lambda text: text.isdigit() and len(text) == 3),
        ({"structured_outputs": {"choice": ["x", "y"]}}, lambda text: text in ("x", "y")),
        ({"structured_outputs": {"regex": "[ab]{2}"}}, lambda text: len(text) == 2),
        ({"guided_json": {"const": 5}}, lambda text: json.loads(text) == 5),
        ({"response_format": {"type": "text"}}, lambda text: text == ANSWER),
    ],
)  # fmt: skip
def test_forms(client, form, check):
    said = asked(client, about_demo(**form, max_tokens=200, repetition_penalty=1.1))["choices"][0]
    text = said["message"]["content"]
    assert check(text) if said["finish_reason"] == "stop" else text.startswith("{")  # a model this small may go on for ever


TOOLS = [
    {"type": "function", "function": {"name": "note", "description": "Take a note.", "parameters": {
        "type": "object", "properties": {"kind": {"enum": ["a", "b"]}}, "required": ["kind"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "leave"}},
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "note"}}])
def test_forced_call(client, choice, stream):
    body = text_chat("Note it.", tools=TOOLS, tool_choice=choice, max_tokens=100, stream=stream)
    if stream:
        with client.stream("POST", CHAT, json=body) as response:
            deltas = [event["choices"][0] for event in events(response)]
        calls = [call for one in deltas for call in one["delta"].get("tool_calls", ())]
        name = "".join(call["function"].get("name", "") for call in calls)
        arguments = "".join(call["function"]["arguments"] for call in calls)
        reason = deltas[-1]["finish_reason"]
        assert calls[0]["id"] and {call["index"] for call in calls} == {0}
    else:
        (one,) = asked(client, body)["choices"]
        (call,) = one["message"]["tool_calls"]
        assert one["message"]["content"] is None
        name, arguments, reason = call["function"]["name"], call["function"]["arguments"], one["finish_reason"]
    assert reason == "tool_calls"
    assert name in ("note", "leave")
    assert json.loads(arguments).get("kind") in (("a", "b") if name == "note" else (None,))


def test_a_conversation_with_calls_is_understood(client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Note it."},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "note", "arguments": '{"kind": "a"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]  # fmt: skip
    tokens = client.post("/tokenize", json={"messages": messages, "tools": TOOLS}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": tokens}).json()["content"]
    for said in ("Be brief.", '"name": "note"', '{"kind": "a"}', "done", "leave"):
        assert said in text
    assert asked(client, {"messages": messages, "tools": TOOLS, "max_tokens": 2})


@pytest.mark.parametrize("more", [{}, {"logprobs": True, "top_logprobs": 2}, {"stream_options": {"include_usage": True}}])
def test_stream_says_what_the_whole_answer_says(client, more):
    whole = asked(client, about_demo("Describe the picture.", **{k: v for k, v in more.items() if k != "stream_options"}))
    with client.stream("POST", CHAT, json=about_demo("Describe the picture.", stream=True, **more)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    wanted = "stream_options" in more
    assert all(chunk["choices"] for chunk in (chunks[:-1] if wanted else chunks))
    if wanted:
        usage = chunks.pop()["usage"]
        assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] == "a red circle and the text HELLO"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    if "logprobs" in more:
        told = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {}).get("content", ())]
        expected = whole["choices"][0]["logprobs"]["content"]
        assert [one["token"] for one in told] == [one["token"] for one in expected]
        assert [one["logprob"] for one in told] == pytest.approx([one["logprob"] for one in expected], abs=1e-4)
        assert {len(one["top_logprobs"]) for one in told} == {2}


def test_stream_of_several(client):
    body = text_chat("Hello there", n=2, temperature=1.3, seed=5, max_tokens=8)
    whole = asked(client, body)
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        chunks = events(response)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert list(texts.values()) == [choice["message"]["content"] for choice in whole["choices"]]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"n": 99}, "n", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "size": 3}]}]}, None, "unknown_parameter"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice", "invalid_value"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "invalid_value"),
        ({"guided_regex": "("}, None, "invalid_value"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, None, "invalid_value"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "unknown_parameter"),
        ({"downsample_mode": "4x"}, None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, None, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": ""}]}, None, "invalid_prompt"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(client, change, param, code):
    error = refused(client, about_demo(**{"messages": about_demo()["messages"], **change}) | change)
    assert error["code"] == code, error
    if param is not None:
        assert error["param"].startswith(param), error


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"messages": 1, "messages": 2}']
)
def test_bodies_that_are_none(client, body):
    response = client.post(CHAT, content=body)
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


def test_fields_that_change_nothing_are_taken(client):
    more = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "service_tier": "auto",
        "prompt": [], "images": [], "reasoning_effort": "low", "model": "whatever", "stream_options": None,
    }  # fmt: skip
    assert asked(client, about_demo(**more))["choices"][0]["message"]["content"] == ANSWER


def test_repeat_guard_says_why(client):
    body = text_chat("Hello", max_tokens=400, guided_regex="(ab){300}", repeat_guard=20)
    (choice,) = asked(client, body)["choices"]
    assert choice["finish_reason"] == "length" and choice["finish_details"] == {"type": "repetition"}
    assert choice["message"]["content"].startswith("abababab")
