"""The clients that people use, unchanged: the SDKs of both dialects, and bodies as programs send them."""

import asyncio
import base64
import io
import json

import httpx
import ollama
import openai
import pytest
from PIL import Image
from pydantic import BaseModel
from tiny_server import ANSWER, DEMO, QUESTION, Gate, about_demo, data_url, endless

CAPTION = "a red circle and the text HELLO"
ENCODED = base64.b64encode(DEMO.read_bytes()).decode()
CHAT = "/v1/chat/completions"


def jpeg():
    buffer = io.BytesIO()
    Image.open(DEMO).convert("RGB").save(buffer, "JPEG", quality=95)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def sdk(running):
    with openai.OpenAI(base_url=f"{running.address}/v1", api_key="none", http_client=running.client()) as client:
        yield client


SCHEMA = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"], "additionalProperties": False}


@pytest.fixture
def ollama_client(running):
    client = ollama.Client(host=running.address, trust_env=False)
    yield client
    client._client.close()


def content(question=QUESTION):
    return about_demo(question)["messages"]


# OpenAI's


def test_openai_whole_and_models(sdk):
    said = sdk.chat.completions.create(model="any", messages=content())
    assert said.choices[0].message.content == ANSWER
    assert said.usage.prompt_tokens_details.cached_tokens >= 0
    (model,) = sdk.models.list().data
    assert sdk.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")


def test_openai_stream(sdk):
    text, usage = "", None
    stream = sdk.chat.completions.create(
        model="any", messages=content("Describe the picture."), stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == CAPTION and usage.total_tokens > usage.completion_tokens > 0


def test_openai_async_and_cancel(running):
    async def ask():
        transport = httpx.AsyncClient(trust_env=False, timeout=120)
        async with openai.AsyncOpenAI(base_url=f"{running.address}/v1", api_key="x", http_client=transport) as client:
            one = client.chat.completions.create(model="any", messages=content())
            two = client.chat.completions.create(model="any", messages=content("Describe the picture."), stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in await two])
            return (await one).choices[0].message.content, text

    assert asyncio.run(ask()) == (ANSWER, CAPTION)


@pytest.mark.waits
def test_openai_cancel(running, sdk, engine):
    with Gate(engine) as gate:
        body = endless()
        stream = sdk.chat.completions.create(
            model="any", messages=body["messages"], stream=True, max_tokens=300, extra_body={"guided_regex": "(ab){100}"}
        )
        gate.reached.acquire()
        stream.close()
        while running.service.answering:
            pass
        gate.let(1)
    assert sdk.chat.completions.create(model="any", messages=content()).choices[0].message.content == ANSWER


def test_openai_parse(sdk):
    class Seen(BaseModel):
        circle: bool

    said = sdk.chat.completions.parse(model="any", messages=content("Is there a circle?"), response_format=Seen)
    assert isinstance(said.choices[0].message.parsed, Seen)


def test_openai_tools(sdk):
    tools = [
        openai.pydantic_function_tool(type("Note", (BaseModel,), {"__annotations__": {"good": bool}}), name="note"),
    ]
    named = {"type": "function", "function": {"name": "note"}}
    said = sdk.chat.completions.create(model="any", messages=content("Note it."), tools=tools, tool_choice=named)
    (call,) = said.choices[0].message.tool_calls
    assert call.function.name == "note" and set(json.loads(call.function.arguments)) == {"good"}
    assert said.choices[0].finish_reason == "tool_calls"
    with sdk.chat.completions.stream(model="any", messages=content("Note it."), tools=tools, tool_choice=named) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


def test_openai_completions(sdk, engine):
    said = sdk.completions.create(model="any", prompt="HELLO", max_tokens=4, logprobs=2)
    answer = engine.ask(None, "HELLO", raw=True, max_new_tokens=4)
    assert said.choices[0].text == answer.text
    assert len(said.choices[0].logprobs.tokens) == said.usage.completion_tokens == len(answer.tokens)
    both = sdk.completions.create(model="any", prompt=["HELLO", "red"], max_tokens=3)
    assert [choice.index for choice in both.choices] == [0, 1]
    stream = sdk.completions.create(model="any", prompt="HELLO", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.text
    ids = list(engine.tokenize("HELLO"))
    assert sdk.completions.create(model="any", prompt=ids, max_tokens=4).choices[0].text == answer.text


def test_openai_responses(sdk):
    image = {"type": "input_image", "image_url": data_url(), "detail": "auto"}
    asked = [{"role": "user", "content": [image, {"type": "input_text", "text": QUESTION}]}]
    said = sdk.responses.create(model="any", input=asked, instructions="Be brief.")
    assert said.status == "completed" and said.usage.input_tokens_details.cached_tokens >= 0
    text = ""
    with sdk.responses.stream(model="any", input=asked, instructions="Be brief.") as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
        final = stream.get_final_response()
    assert text == final.output_text == said.output_text != ""
    cut = sdk.responses.create(model="any", input=asked, max_output_tokens=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    tools = [{"type": "function", "name": "note", "parameters": SCHEMA}]
    called = sdk.responses.create(model="any", input="Note it.", tools=tools, tool_choice="required")
    (call,) = called.output
    assert call.type == "function_call" and set(json.loads(call.arguments)) == {"good"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    history = [
        {"role": "user", "content": "Note it."},
        call.model_dump(exclude={"parsed_arguments"}, exclude_none=True),
        result,
    ]
    assert sdk.responses.create(model="any", input=history, max_output_tokens=2).output
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        sdk.responses.create(model="any", input="x", previous_response_id="resp_1")


@pytest.mark.parametrize(
    "change",
    [
        {"input": [{"type": "function_call", "call_id": "", "name": "", "arguments": ""}]},
        {"input": [{"type": "function_call", "call_id": "c", "name": "n", "arguments": "["}]},
        {"input": [{"type": "other"}]},
        {"input": [{"type": 3}]},
        {"input": [3]},
        {"input": []},
        {"tools": [{"type": "function", "name": "x" * 300}]},
        {"tool_choice": {"type": "function", "name": ""}},
        {"text": {"format": {"type": "json_schema"}}},
    ],
)
def test_responses_that_make_no_sense(client, change):
    found = client.post("/v1/responses", json={"input": "x", **change})
    assert found.status_code == 400 and found.json()["error"]["message"], found.text


def test_openai_errors_are_its_classes(sdk, serving):
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="any", messages=content(), extra_body={"foo": 1})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "foo")
    with serving(api_keys=("right",)) as running, running.client() as transport, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="wrong", http_client=transport).models.list()


# Ollama's


def test_ollama_chat_generate_and_what_there_is(ollama_client):
    message = {"role": "user", "content": QUESTION, "images": [str(DEMO)]}
    said = ollama_client.chat(model="any", messages=[message], keep_alive=-1, options={"num_ctx": 4096, "temperature": 0})
    assert said.message.content == ANSWER and said.done_reason == "stop"
    assert said.prompt_eval_count > 64 and said.eval_count == 6 and said.total_duration > 0
    pieces = ollama_client.chat(model="any", messages=[{**message, "content": "Describe the picture."}], stream=True)
    assert "".join(piece.message.content for piece in pieces) == CAPTION
    once = ollama_client.generate(model="any", prompt=QUESTION, images=[DEMO.read_bytes()], keep_alive="5s", think=False)
    assert once.response == ANSWER
    (model,) = ollama_client.list().models
    shown = ollama_client.show(model.model)
    assert {"completion", "vision", "tools"} <= set(shown.capabilities)
    assert any(name.endswith(".context_length") for name in shown.modelinfo)
    assert ollama_client.ps().models[0].context_length == 4096


def test_ollama_format_tools_and_errors(ollama_client):
    said = ollama_client.chat(model="any", messages=[{"role": "user", "content": "Is it good?"}], format=SCHEMA)
    assert set(json.loads(said.message.content)) == {"good"}
    tools = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]
    history = [
        {"role": "user", "content": "Note it."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "note", "arguments": {"good": True}}}]},
        {"role": "tool", "content": "done", "tool_name": "note"},
    ]
    assert ollama_client.chat(model="any", messages=history, tools=tools, options={"num_predict": 2}).done
    with pytest.raises(ollama.ResponseError, match="not a picture"):
        ollama_client.generate(model="any", prompt="x", images=[b"\0" * 100])


@pytest.mark.waits
def test_ollama_lines_in_a_silence(serving, engine):
    with serving(keep_alive_s=0.05) as running, running.client() as client, Gate(engine) as gate:
        request = client.build_request("POST", "/api/generate", json={"prompt": "Hello", "options": {"num_predict": 3}})
        lines = map(json.loads, client.send(request, stream=True).iter_lines())
        assert next(line for line in lines if line["response"] == "")["done"] is False
        gate.open()
        assert list(lines)[-1]["done"] is True


# Bodies as programs send them


def posted(client, path, body, **more):
    response = client.post(path, json=body, **more)
    assert response.status_code == 200, response.text
    return response.json()


def test_llm_vision(client):
    """Home Assistant's LLM Vision: both dialects, a tag before every picture."""
    parts = [
        {"type": "text", "text": "Image 1:"},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg()}", "detail": "low"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": 100,
        "temperature": 0.2,
    }
    assert posted(client, CHAT, {**body, "prompt": [], "top_p": 0.9})["choices"][0]["message"]["content"]
    messages = [{"role": "user", "content": "Image 1:", "images": [jpeg()]}, {"role": "user", "content": QUESTION}]
    options = {"num_predict": 100, "temperature": 0.2}
    said = posted(client, "/api/chat", {"model": "minicpm-v", "messages": messages, "stream": False, "options": options})
    assert isinstance(said["message"]["content"], str)
    assert client.get("/readyz").status_code == client.get("/api/tags").status_code == 200
    beside = {"messages": [{"role": "user", "content": QUESTION}], "images": [ENCODED], "stream": False, "max_tokens": 9}
    assert posted(client, "/api/chat", beside)["message"]["content"] == ANSWER


def test_frigate(client):
    """Pictures behind the prompt (llama.cpp), marks for them in the text (Ollama), and what it asks about a model."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{jpeg()}", "detail": "low"}}
    body = {"model": "models/tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}, image]}]}
    form = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": SCHEMA}}
    said = posted(client, CHAT, {**body, "response_format": form, "chat_template_kwargs": {"enable_thinking": False}})
    assert set(json.loads(said["choices"][0]["message"]["content"])) == {"good"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["max_model_len"] == model["meta"]["n_ctx"] == 4096
    assert {"text", "image"} <= set(model["architecture"]["input_modalities"]) and model["aliases"] == []
    props = client.get("/props", params={"model": model["id"]}).json()
    assert props["default_generation_settings"]["n_ctx"] == 4096 and props["modalities"]["vision"] is True
    assert props["chat_template_caps"]["supports_tools"] is True and "chat_template" in props
    options = {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3, "num_predict": 1}
    message = {"role": "user", "content": f"First\n[img]\n{QUESTION}", "images": [ENCODED]}
    said = posted(
        client, "/api/chat", {"model": "x", "messages": [message], "options": options, "stream": False, "think": False}
    )
    assert said["prompt_eval_count"] > 64


def test_marks_say_where_pictures_belong():
    from mcv_serve.asked import PictureUrl
    from mcv_serve.ollama.asking import placed

    a, b, c = (PictureUrl(name) for name in "abc")
    assert placed("x", (a, b)) == (a, b, "x")
    assert placed("x [img] y\n[img]\nz", (a, b)) == ("x ", a, " y", b, "z")
    assert placed("[img]x", (a, b, c)) == (a, b, c, "x")
    assert placed("[img] and [img]", (a,)) == (a, " and [img]")
    assert placed("[img]", ()) == ("[img]",)


def test_paperless_gpt(client):
    """Any bytes under one label; the zero values of its Go structures stand in the body."""
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{ENCODED}"}},
        {"type": "text", "text": QUESTION},
    ]
    said = posted(client, CHAT, {"model": "minicpm-v", "messages": [{"role": "user", "content": parts}], "temperature": 0})
    assert said["choices"][0]["message"]["content"] == ANSWER and said["usage"]["total_tokens"] > 64
    body = {
        "model": "minicpm-v", "stream": False, "format": "", "keep_alive": "",
        "messages": [{"role": "user", "content": QUESTION, "images": [ENCODED]}],
        "options": {"num_ctx": 8192, "num_predict": 200, "top_k": 1, "seed": 0, "temperature": 0.0, "stop": None},
    }  # fmt: skip
    assert posted(client, "/api/chat", body)["message"]["content"] == ANSWER


def test_ragflow_indexes_every_chunk(sdk):
    parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": data_url()}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    stream = sdk.chat.completions.create(model="any", messages=messages, stream=True, extra_body={"enable_thinking": False})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert sdk.chat.completions.create(model="any", messages=messages).choices[0].message.content


def test_olmocr_speaks_plain_http(running):
    """One request a connection, by hand, with a pattern for the answer."""
    import socket

    body = json.dumps(about_demo(guided_regex="[A-Z]+", max_tokens=20, temperature=0.1, seed=1)).encode()
    with socket.create_connection(running.socket.getsockname()) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        answered = b""
        while piece := connection.recv(1 << 16):
            answered += piece
    headers, _, told = answered.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200") and f"content-length: {len(told)}".encode() in headers.lower()
    assert json.loads(told)["choices"][0]["message"]["content"].isupper()


def test_curl_with_a_form(client):
    said = client.post("/vqa", files={"file": ("x.jpg", DEMO.read_bytes(), "image/jpeg")}, data={"question": QUESTION}).json()
    assert said["answer"] == ANSWER and said["usage"]["prompt_tokens_details"]["image_tokens"] == 64
    two = [("file", ("a", DEMO.read_bytes())), ("file", ("b", DEMO.read_bytes()))]
    assert (
        client.post("/vqa", files=two, data={"question": "Which?", "max_tokens": "3"}).json()["usage"]["completion_tokens"] <= 3
    )
    assert client.post("/vqa", files=two, data={"question": "x", "temperature": "1"}).json()["error"]["param"] == "temperature"


def test_metrics_have_the_names_that_dashboards_read(client):
    client.post(CHAT, json=about_demo())
    text = client.get("/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total", "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket", "vllm:request_queue_time_seconds_bucket",
        "vllm:request_prefill_time_seconds_bucket", "vllm:request_decode_time_seconds_bucket", "llamacpp:prompt_tokens_total",
        "llamacpp:prompt_seconds_total", "llamacpp:tokens_predicted_total", "llamacpp:tokens_predicted_seconds_total",
        "llamacpp:requests_processing", "llamacpp:requests_deferred", "mcv_picture_fetch_seconds_bucket",
        "mcv_picture_decode_seconds_bucket", "mcv_picture_encode_seconds_bucket", "mcv_pictures_total", "mcv_slices_total",
        "mcv_visual_tokens_total",
    ):  # fmt: skip
        assert f"\n{name}{{" in text or f"\n{name} " in text, name
