"""Work shared out over cores: all of it done, once, on one core each, whoever is watching."""

import os
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.kernels.side_by_side import share_out, side_by_side


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_each_piece_is_done_once_by_workers_that_use_one_core():
    done, workers = [], []

    def start():
        workers.append((threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()))
        return done.append

    side_by_side(start, range(100))
    assert sorted(done) == list(range(100))
    assert len(workers) == 3
    assert all(
        name.startswith("moesaic") and cores == 1 and not records_graph for name, cores, records_graph in workers
    )


@pytest.mark.usefixtures("three_threads")
def test_the_caller_and_threads_to_come_keep_their_number_of_cores():
    side_by_side(lambda: lambda _i: None, range(5))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 3
    assert seen == [3]


@pytest.mark.usefixtures("three_threads")
def test_an_error_of_a_worker_reaches_the_caller():
    def start():
        def work(i):
            if i == 7:
                raise ValueError(f"piece {i}")

        return work

    with pytest.raises(ValueError, match="piece 7"):
        side_by_side(start, range(10))


def test_with_one_thread_the_caller_does_all():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = []
        side_by_side(lambda: lambda _i: names.append(threading.current_thread().name), range(3))
    finally:
        torch.set_num_threads(before)
    assert names == [threading.current_thread().name] * 3


@pytest.mark.usefixtures("three_threads")
def test_a_mode_that_counts_operations_sees_them_all():
    a, b = torch.ones(4, 5), torch.ones(5, 6)
    with FlopCounterMode(display=False) as counter:
        side_by_side(lambda: lambda _i: torch.mm(a, b), range(10))
    assert counter.get_total_flops() == 10 * 2 * 4 * 5 * 6


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.usefixtures("three_threads")
def test_a_forked_process_has_workers_of_its_own():
    side_by_side(lambda: lambda _i: None, range(5))
    child = os.fork()
    if child == 0:
        done = []
        side_by_side(lambda: done.append, range(5))
        os._exit(0 if sorted(done) == [0, 1, 2, 3, 4] else 1)
    for _ in range(200):
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        threading.Event().wait(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("the forked process waits for workers that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(
    ("sizes", "num_workers", "together", "apart"),
    [
        ([1, 1, 1, 1], 2, [], [0, 1, 2, 3]),
        ([1, 1, 1], 2, [0], [1, 2]),
        ([1, 2, 9, 3, 4], 2, [2], [4, 3, 1, 0]),
        ([5, 5], 4, [0, 1], []),
        ([5, 5], 0, [0, 1], []),
        ([], 2, [], []),
        ([100, *[1] * 100], 2, [], [0, *range(1, 101)]),
    ],
)
def test_only_what_cannot_be_shared_out_evenly_is_done_together(sizes, num_workers, together, apart):
    assert share_out(sizes, num_workers) == (together, apart)
