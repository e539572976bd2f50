"""`mcv-run` as a user meets it: in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.waits
RUN = [sys.executable, "-c", "from mcv_runtime.command.cli import main; main()"]
WITHOUT_TOOLCHAIN = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "huggingface_hub", "mcv_graphs"):
    sys.modules[name] = None  # importing it raises ImportError
from mcv_runtime.command.cli import main
main()
"""


def run(*arguments, command=RUN, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "MCV_BUNDLE"} | environment
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", env=environment)


@pytest.fixture(scope="module")
def drawn(golden_root):
    return golden_root / "images" / "synth_300x200.png"


def test_answer_alone_on_stdout_without_the_toolchain(golden_bundle, golden_engine, drawn):
    command = [sys.executable, "-c", WITHOUT_TOOLCHAIN]
    done = run("-m", golden_bundle, "--image", drawn, "-p", "What is this?", "-n", 12, "-t", 1, command=command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == golden_engine.ask(drawn, "What is this?", max_new_tokens=12).text + "\n"


def test_options_for_small_machines(golden_bundle, golden_engine, drawn, tmp_path):
    options = ["--low-memory", "--cache-dir", tmp_path / "cache", "-m", golden_bundle, "--image", drawn, "-n", 4, "--json"]
    first, again = (json.loads(run(*options, "-p", "What is this?").stdout) for _ in range(2))
    expected = list(golden_engine.ask(drawn, "What is this?", max_new_tokens=4).tokens)
    assert first["tokens"] == again["tokens"] == expected
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_json(golden_bundle, golden_engine, drawn, golden_root):
    wide = golden_root / "images" / "synth_2000x180.png"
    done = run("--image", wide, "--image", drawn, "--prompt", "What?", "-n", 3, "--json", MCV_BUNDLE=str(golden_bundle))
    assert (done.returncode, done.stderr) == (0, "")
    answer = golden_engine.ask([wide, drawn], "What?", max_new_tokens=3)
    result = json.loads(done.stdout)
    assert list(result) == [
        "text", "tokens", "prompt_tokens", "images", "timings_s", "tokens_per_s", "peak_rss_mb", "stop_reason",
        "logprobs", "score", "alternatives", "reused_tokens", "drafted", "accepted"
    ]  # fmt: skip
    assert list(result["timings_s"]) == ["load", "preprocess", "vision", "prefill", "decode", "longest_gap"]
    assert result["text"] == answer.text
    assert result["tokens"] == list(answer.tokens)
    assert result["prompt_tokens"] == list(answer.prompt_tokens)
    assert result["stop_reason"] == "length"
    assert (result["logprobs"], result["score"], result["alternatives"], result["reused_tokens"]) == (None, None, [], 0)
    wide_sizes = [[1484, 140], *[[854, 238]] * 3]  # golden.json, two_images: target sizes times 14
    assert result["images"] == [
        {"size": [2000, 180], "grid": [3, 1], "slice_sizes": wide_sizes, "visual_tokens": 256},
        {"size": [300, 200], "grid": None, "slice_sizes": [[546, 364]], "visual_tokens": 64},
    ]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", 2, "--logprobs"],
         {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "logprobs": True}),
        (["--temp", 0.9, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 5, "--presence-penalty", 0.5],
         {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 5, "presence_penalty": 0.5}),
        (["--prompt-lookup", "--stop", "nothing", "--stop", "e", "--prefill-chunk", 9, "--timeout", 600, "--memory-mb", 900],
         {"prompt_lookup": True, "stop": ["nothing", "e"]}),
        (["--choice", "a cat", "--choice", "a dog"], {"choices": ["a cat", "a dog"]}),
        (["--regex", "[a-f]{3}"], {"regex": "[a-f]{3}"}),
        (["--json-schema", '{"enum": [1, 2]}'], {"json_schema": {"enum": [1, 2]}}),
    ],
)  # fmt: skip
def test_options_reach_the_request(golden_bundle, golden_engine, drawn, arguments, options):
    if options.keys() & {"choices", "regex", "json_schema"}:
        pytest.importorskip("llguidance")
    done = run("--image", drawn, "-p", "What is this?", "-n", 8, "--json", *arguments, MCV_BUNDLE=str(golden_bundle))
    assert (done.returncode, done.stderr) == (0, "")
    answer = golden_engine.ask(drawn, "What is this?", max_new_tokens=8, **options)
    result = json.loads(done.stdout)
    assert (result["text"], result["tokens"]) == (answer.text, list(answer.tokens))
    assert result["logprobs"] == (answer.logprobs and pytest.approx(list(answer.logprobs), abs=1e-4))
    assert result["score"] == (answer.score and pytest.approx(answer.score, abs=1e-4))
    assert [other["text"] for other in result["alternatives"]] == [other.text for other in answer.alternatives]
    assert (result["drafted"], result["accepted"]) == (answer.drafted, answer.accepted)


def test_a_bundle_below_the_home_folder(golden_bundle, golden_engine):
    """As a systemd unit, or a .env file, names it: nothing has replaced the ~."""
    expected = golden_engine.ask(None, "What is this?", max_new_tokens=3).text + "\n"
    named = f"~/{golden_bundle.name}"
    for arguments, environment in (([], {"MCV_BUNDLE": named}), (["-m", named], {})):
        done = run(*arguments, "-p", "What is this?", "-n", 3, HOME=str(golden_bundle.parent), **environment)
        assert (done.returncode, done.stdout) == (0, expected)
    assert "is not a bundle" in run("-p", "x", MCV_BUNDLE="~nobody-of-that-name/bundle").stderr


def test_several_answers_on_lines_of_their_own(golden_bundle, golden_engine, drawn):
    done = run("-m", golden_bundle, "--image", drawn, "-p", "Why?", "-n", 5, "--num-beams", 2, "--num-return-sequences", 2)
    answer = golden_engine.ask(drawn, "Why?", max_new_tokens=5, num_beams=2, num_return_sequences=2)
    assert done.stdout == f"{answer.text}\n{answer.alternatives[0].text}\n"


def test_a_schema_from_a_file(golden_bundle, tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["only this"]}')
    done = run("-m", golden_bundle, "-p", "x", "--json-schema", tmp_path / "schema.json")
    assert (done.returncode, done.stdout) == (0, '"only this"\n')


def test_help_lists_every_option_in_a_group():
    done = run("--help")
    assert done.returncode == 0
    titles = [line for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "What to ask:", "More than one question:", "Pictures and videos:", "How tokens are chosen:",
        "Where and how an answer ends:", "Model and machine:", "Else:",
    ]  # fmt: skip
    from mcv_runtime import Options

    not_here = {
        "early_stopping",
        "stop_token_ids",
        "cancel",
        "progress",
        "choices",
        "logit_bias",
        "top_logprobs",
        "tools",
        "raw",
    }
    for name in {field.name for field in dataclasses.fields(Options)} - not_here:
        assert f"--{name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--image", "none.jpg", "-p", "x"], "none.jpg cannot be read"),
        (["-p", "  "], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["-p", "x", "-n", "0"], "max_new_tokens"),
        (["-p", "x", "-t", "0"], "threads"),
        (["-p", "x", "-t", str(2**40)], "threads must be 1 to 1,024"),
        (["-p", "x", "--memory-mb", "nan"], "memory_mb"),
        (["-p", "x", "--cache-dir", "nowhere", "--cache-dir-mb", "nan"], "cache_dir_mb"),
        (["--batch", "a" * 300, "--out", "nowhere.jsonl"], "File name too long"),
        (["-p", "x", "--repetition-penalty", "nan"], "repetition_penalty"),
        (["-p", "x", "-m", "nowhere"], "nowhere is not a bundle"),
        (["-p", "x " * 40_000], "context"),
        (["-p", "x", "--top-k", "5"], "temperature"),
        (["-p", "x", "--json-schema", "nowhere.json"], "nowhere.json cannot be read"),
        (["-p", "x", "--json-schema", "{"], "json_schema"),
        (["-p", "x", "--regex", "(", "--choice", "x"], "exclude"),
        (["-p", "x", "--provider", "abacus"], "abacus"),
        (["-p", "x", "--timeout", "0"], "timeout"),
        (["-p", "x", "--num-beams", "two"], "num-beams"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(golden_bundle, arguments, line):
    done = run(*arguments, MCV_BUNDLE=str(golden_bundle))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mcv-run: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_traceback(golden_bundle):
    process = subprocess.Popen(
        [*RUN, "-m", str(golden_bundle), "-p", "hello", "-n", "30000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c(golden_bundle):
    import signal

    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # a background job ignores it
    command = [sys.executable, "-c", heed + RUN[-1], "-m", str(golden_bundle), "-p", "hello", "-n", "30000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert (process.returncode, stderr) == (130, b"")
