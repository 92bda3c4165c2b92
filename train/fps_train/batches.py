"""The microbatches that a run takes of precomputed samples.

Microbatch i is a function of (data, seed, i) alone: a run that goes on needs no state of a loader but how many it has taken, and
another number of hosts goes on with the same ones.
"""

import collections
import functools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fps_train.batch import Batch
from fps_train.data import Data, held_out_order
from fps_train.precompute.manifest import Sample

_AHEAD = 4  # microbatches that are read while the device works, and threads that read them
# What random draws are for, beside the seed: none has the numbers of another.
_ORDER, _SHUFFLE, _DROPOUT = 1, 2, 3


class Batches:
    """The microbatches of a run.

    Every sample of a bucket comes once an epoch, in an order of that epoch. Where a bucket's samples don't fill a microbatch, the
    next epoch's follow, so a sample may be twice in one. In as many microbatches as there are training samples each bucket comes
    exactly as often as it has samples, in a random order: not in step with a sequence of regimes, whatever that is.

    Args:
      data: opened.
      batch_size: of a microbatch over all processes.
      seed: in [0, 2**32).
      text_dropout: share of samples that come with the empty prompt instead of their own; decided for sample n by (seed, n).
      validation_samples: so many are held out, those of the clips with the lowest hashes. Their clips are not trained on with
        other captions either.
      rows: of a microbatch of n rows, those that this process takes (`fps_train.placement.process_rows`); all if left out.
    Raises: ValueError where one of these is wrong, or a bucket would have no sample left.
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        text_dropout: float = 0.1,
        validation_samples: int = 0,
        rows: Callable[[int], range] = range,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a positive number of samples")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} is not in 0 to 2**32 - 1")
        if not 0 <= text_dropout <= 1:
            raise ValueError(f"text_dropout={text_dropout} is not a share in 0 to 1; Wan's is 0.1")
        total = sum(bucket.num_samples for bucket in data.buckets)
        if not 0 <= validation_samples < total:
            raise ValueError(
                f"validation.samples={validation_samples} leaves none of {total} samples to train on; use fewer"
            )
        self.data, self.batch_size, self.seed, self.text_dropout = data, batch_size, seed, text_dropout
        self._rows = rows
        everything = [sample for samples in data.samples for sample in samples]
        held_out = sorted(everything, key=held_out_order)[:validation_samples]
        clips = {sample.content for sample in held_out}
        kept_out = set(held_out)
        self._validation = [[s for s in samples if s in kept_out] for samples in data.samples]
        self._training = [[s for s in samples if s.content not in clips] for samples in data.samples]
        for bucket, samples in zip(data.buckets, self._training, strict=True):
            if not samples:
                raise ValueError(
                    f"validation_samples={validation_samples} leaves no sample of bucket {bucket.name} to train on; use fewer"
                )
        self._round = functools.lru_cache(maxsize=2)(self._make_round)
        self._epoch = functools.lru_cache(maxsize=2 * len(self._training))(self._make_epoch)

    @property
    def num_samples(self) -> int:
        """Training samples of all buckets: so many make an epoch."""
        return sum(map(len, self._training))

    def bucket(self, i: int) -> int:
        """Which of `data.buckets` microbatch i is of."""
        return self._bucket_and_rank(i)[0]

    def at(self, i: int) -> Batch:
        """Microbatch i of the run, counted from 0: this process's rows of it."""
        bucket, rank = self._bucket_and_rank(i)
        places = self._rows(self.batch_size)
        samples = [self._sample(bucket, rank * self.batch_size + r) for r in places]
        numbers = [i * self.batch_size + r for r in places]
        return self._batch(samples, numbers, [self._drops(n) for n in numbers])

    def iterate(self, start: int = 0) -> Generator[tuple[int, Batch]]:
        """(i, microbatch i) from `start` on, without end. Read ahead in threads, which end with the iterator."""
        pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="fps_train_data")
        ahead: collections.deque[Future[Batch]] = collections.deque()
        try:
            ahead.extend(pool.submit(self.at, start + k) for k in range(_AHEAD))
            i = start
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.at, i + _AHEAD))
                yield i, batch
                i += 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def validation(self, batch_size: int) -> list[tuple[range, Batch]]:
        """The held-out samples in fixed microbatches, bucket by bucket, each with its own text: (numbers of its samples, this
        process's rows of it).

        A bucket's last one is smaller where batch_size doesn't divide their number. Samples are counted from 0, as in
        `Batch.sample`.
        """
        found, first = [], 0
        for samples in self._validation:
            for start in range(0, len(samples), batch_size):
                numbers = range(first + start, first + min(start + batch_size, len(samples)))
                mine = [numbers[r] for r in self._rows(len(numbers))]
                batch = self._batch([samples[n - first] for n in mine], mine, [False] * len(mine))
                found.append((numbers, batch))
            first += len(samples)
        return found

    def _batch(self, samples: Sequence[Sample], numbers: Sequence[int], drops: Sequence[bool]) -> Batch:
        read = [self.data.read(sample) for sample in samples]
        texts = [self.data.empty_text if drop else text for (_, text), drop in zip(read, drops, strict=True)]
        given = self.data.task != "t2v"
        return Batch(
            latents=np.stack([tensors["latents"] for tensors, _ in read]),
            text=np.stack(texts),
            sample=np.array(numbers, np.int64),
            condition=np.stack([tensors["condition"] for tensors, _ in read]) if given else None,
            image=np.stack([tensors["image"] for tensors, _ in read]) if given else None,
        )

    def _drops(self, n: int) -> bool:
        return _draw(self.seed, _DROPOUT, n, count=1)[0] < self.text_dropout * 2**64

    def _sample(self, bucket: int, position: int) -> Sample:
        """A bucket's samples without end, each epoch in an order of its own."""
        epoch, place = divmod(position, len(self._training[bucket]))
        return self._training[bucket][self._epoch(bucket, epoch)[place]]

    def _make_epoch(self, bucket: int, epoch: int) -> np.ndarray:
        # Not grain's shuffle, which needs no memory: below a thousand samples it walks a cycle of 2**16 for each, 8 ms
        return np.argsort(_draw(self.seed, _SHUFFLE, bucket, epoch, count=len(self._training[bucket])), kind="stable")

    def _bucket_and_rank(self, i: int) -> tuple[int, int]:
        """Microbatch i's bucket, and how many of that bucket came before it."""
        if i < 0:
            raise ValueError(f"microbatch {i} is before the first, 0")
        number, place = divmod(i, self.num_samples)
        order, ranks = self._round(number)
        bucket = int(order[place])
        return bucket, number * len(self._training[bucket]) + int(ranks[place])

    def _make_round(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The buckets of as many microbatches as there are samples, and the rank of each among those of its bucket."""
        counts = [len(samples) for samples in self._training]
        order = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        if len(counts) > 1:
            order = order[np.argsort(_draw(self.seed, _ORDER, number, count=len(order)), kind="stable")]
        ranks = np.empty(len(order), np.int64)
        for bucket, count in enumerate(counts):
            ranks[order == bucket] = np.arange(count)
        return order, ranks


def _draw(*what: int, count: int) -> np.ndarray:
    """`count` uniform uint64. Raw bits of a named generator: NumPy promises these, not what it makes of them, for all versions."""
    return np.random.PCG64(np.random.SeedSequence(what)).random_raw(count)
