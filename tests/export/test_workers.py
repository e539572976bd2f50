"""The pool of a build, also when a signal leaves one of its threads waiting for ever."""

import threading
from contextlib import nullcontext

import pytest

from mcv_export import workers as pool_of
from mcv_export.workers import workers


def test_results_errors_and_order() -> None:
    with workers(2) as pool:
        assert list(pool.map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
        assert isinstance(pool.submit(int, "no").exception(), ValueError)


@pytest.mark.waits
@pytest.mark.parametrize("error", [None, ValueError])
def test_the_end_of_the_block_waits_for_what_has_begun_and_leaves_the_rest(error: type[Exception] | None) -> None:
    begun, free, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        free.wait()
        done.append(True)

    with pytest.raises(error) if error else nullcontext(), workers(1) as pool:
        pool.submit(slow)
        later = pool.submit(done.append, False)
        begun.wait()
        threading.Timer(0.05, free.set).start()
        if error:
            raise error
    assert done == [True]
    assert later.cancelled()


@pytest.mark.waits
def test_an_interruption_is_not_held_up_by_a_thread_that_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_of, "PATIENCE_S", 0.05)
    begun, never = threading.Event(), threading.Event()

    def stuck() -> None:
        begun.set()
        never.wait()

    with pytest.raises(KeyboardInterrupt), workers(1) as pool:
        pool.submit(stuck)
        begun.wait()
        raise KeyboardInterrupt
    thread = next(each for each in threading.enumerate() if each.name == "mcv-export_0" and each.is_alive())
    assert thread.daemon  # so that the process can end
    never.set()
    thread.join()
