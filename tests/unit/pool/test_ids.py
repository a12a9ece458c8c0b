"""Memory ids: unique, increasing in a process, and UUID version 7."""

import threading
import time
import uuid

from memshare.pool.ids import new_id


def test_ids_increase_and_hold_the_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_id() for _ in range(10_000)]
    after = time.time_ns() // 1_000_000
    assert ids == sorted(set(ids))
    first = uuid.UUID(ids[0])
    assert first.version == 7 and first.variant == uuid.RFC_4122
    assert before <= int(ids[0][:12], 16) <= after + 1


def test_threads_never_make_one_id_twice() -> None:
    made: list[list[str]] = [[] for _ in range(4)]

    def work(out: list[str]) -> None:
        out += [new_id() for _ in range(5_000)]

    threads = [threading.Thread(target=work, args=(out,)) for out in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id for out in made for id in out}) == 20_000
    assert all(out == sorted(out) for out in made)
