"""The batches of first job files; test_init.py has the files themselves."""

from jobs.first_job import choose_batch


def test_batches_never_exceed_the_largest_and_use_all_workers() -> None:
    for records in (1, 50, 10_000):
        for workers in (1, 2, 3, 7, 8):
            batch, micro = choose_batch(records, workers, 128)
            assert batch % (micro * workers) == 0
            assert workers <= batch <= 128
