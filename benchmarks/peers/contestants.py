"""Who takes part: each with an environment, a worker, and what is measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from environments import OWN

TEXT = ("text", "cold text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """`folder`: of its files, shared by those that name the same; `variant`: which of its builds; `loads`: what is in the names
    of the files that this one loads into memory."""

    name: str
    environment: str
    worker: str
    folder: str
    variant: str
    measures: tuple[str, ...]
    loads: str = ""
    provider: str = "cpu"


CONTESTANTS = (
    Contestant(
        name="mcv default",
        environment=OWN,
        worker="mcv_worker.py",
        folder="mcv",
        variant="default",
        loads="default/",
        measures=(*TEXT, "vision", "cold picture"),
    ),
    Contestant(
        name="mcv block 32",
        environment=OWN,
        worker="mcv_worker.py",
        folder="mcv",
        variant="block 32",
        loads="block-32/",
        measures=(*TEXT, "cold picture"),
    ),
    Contestant(
        name="mcv, pictures by OpenVINO",
        environment=OWN,
        worker="mcv_worker.py",
        folder="mcv",
        variant="pictures fp32",
        loads="pictures-fp32/",
        measures=("vision",),
        provider="openvino",
    ),
    Contestant(
        name="llama.cpp Q4_0",
        environment="llama.cpp",
        worker="llama_worker.py",
        folder="llama.cpp",
        variant="Q4_0",
        measures=(*TEXT, "vision", "cold picture"),
    ),
    Contestant(
        name="llama.cpp Q4_K_M",
        environment="llama.cpp",
        worker="llama_worker.py",
        folder="llama.cpp",
        variant="Q4_K_M",
        measures=(*TEXT, "cold picture"),
    ),
    Contestant(
        name="OpenVINO int4 g128",
        environment="openvino",
        worker="openvino_worker.py",
        folder="openvino",
        variant="int4",
        loads="decoder/",
        measures=TEXT,
    ),
    Contestant(
        name="OpenVINO GenAI int4 g128",
        environment="openvino",
        worker="openvino_worker.py",
        folder="openvino",
        variant="genai",
        loads="decoder/",
        measures=TEXT,
    ),
    Contestant(
        name="OpenVINO tower, float",
        environment="openvino",
        worker="openvino_worker.py",
        folder="openvino",
        variant="tower",
        measures=("vision",),
    ),
    Contestant(
        name="OpenVINO tower, int8",
        environment="openvino",
        worker="openvino_worker.py",
        folder="openvino",
        variant="tower int8",
        loads="tower-int8",
        measures=("vision",),
    ),
    Contestant(
        name="onnxruntime-genai int4",
        environment="onnxruntime-genai",
        worker="genai_worker.py",
        folder="onnxruntime-genai",
        variant="int4",
        loads="int4/",
        measures=TEXT,
    ),
    Contestant(
        name="torch",
        environment="torch",
        worker="torch_worker.py",
        folder="torch",
        variant="bf16",
        measures=("text", "vision"),
    ),
)
OURS = "mcv default"
"""Ratios are to this one."""
