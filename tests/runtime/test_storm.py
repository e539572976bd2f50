"""Forty requests of all kinds at once, from threads and coroutines: each is answered as it is alone."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory, traced_once):
    from mcv_export.build import BuildOptions, build

    return build(
        ROOT / "models" / "tiny" / "checkpoint", tmp_path_factory.mktemp("tiny") / "bundle", BuildOptions(precision="fp32")
    ).folder


@pytest.fixture(scope="module")
def hybrid(bundle_of):
    return bundle_of("minicpmv4_6")


@pytest.mark.waits
@pytest.mark.parametrize("bundle", ["tiny_bundle", "hybrid"])
def test_requests_that_come_and_go_are_answered_as_if_alone(bundle, request):
    """`benchmarks/storm.py` does this a thousand times."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from storm import storm
    finally:
        del sys.path[0]
    found = storm(request.getfixturevalue(bundle), rounds=3, first_seed=0)
    assert found["requests"] == 120
    assert found["wrong_by_case"] == {}
    assert found["missing"] == found["stuck_rounds"] == found["beyond_memory"] == 0
