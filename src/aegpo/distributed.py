"""The processes that train one policy together: who does what, and what they tell each other.

Every process works out the same plan from the same numbers, does its share of it, and holds the same weights, or its
part of them (`model.shard`). Groups are of any size: rollouts are dealt one by one, and a group is put together again
where its members are compared. Gradients are sums over rows, added up once for each optimizer step, so it does not
matter how many rows a process has, or whether it has any; torch's own DistributedDataParallel takes means of equal
batches instead, and waits for ever for a process that has none.
"""

import atexit
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(hours=2)  # that processes wait for one that, say, waits for a slow reward
BUCKET = 2**24  # numbers that are added up over the processes in one message


class SaidElsewhere(ValueError):
    """What went wrong in another process, which tells the user."""


def is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone, or no longer answers."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


class Team:
    """The processes of a run.

    Attributes:
        rank: the number of this one, from 0 on.
        size: how many there are.
        device: on which tensors are handed over.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @classmethod
    def join(cls) -> "Team":
        """The processes that `aegpo train --processes`, accelerate, torchrun or Ray started; by default, this alone."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_initialized():
            return cls()
        from accelerate import PartialState

        if not dist.is_initialized():
            atexit.register(dist.destroy_process_group)
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device or "cpu")

    def share(self, count: int) -> range:
        """This process's part of so many pieces of work that cost alike."""
        return shares([1] * count, self.size)[self.rank]

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for the others."""
        self.tell(None)

    # ------------------------------------------------------------ telling each other

    def each(self, rows: Tensor) -> list[Tensor]:
        """The rows (m, ...) of every process, whose numbers m may differ."""
        if self.size == 1:
            return [rows]
        rows = rows.detach()
        sent = rows.view(torch.uint8) if rows.dtype == torch.bool else rows
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        most = max(int(count) for count in counts)
        padded = torch.zeros(most, *rows.shape[1:], dtype=sent.dtype, device=self.device)
        padded[: len(rows)] = sent
        received = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(received, padded)
        return [one[: int(count)].to(rows.device).view(rows.dtype) for one, count in zip(received, counts, strict=True)]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after another."""
        return torch.cat(self.each(rows))

    def tell(self, said: Any) -> list[Any]:
        """What each process says, as JSON has it."""
        if self.size == 1:
            return [said]
        text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        return [json.loads(bytes(one.tolist())) for one in self.each(text)]

    def sum(self, number: float) -> float:
        """The sum of a number over the processes, in the order of their ranks."""
        return sum(self.tell(number))

    def most(self, number: float) -> float:
        """The largest."""
        return max(self.tell(number))

    def any(self, said: bool) -> bool:
        """Whether any process says so."""
        return any(self.tell(said))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What goes wrong within it in one process goes wrong in all, so that none waits for one that has ended.

        Nothing within it may wait for the others.
        """
        wrong: Exception | None = None
        try:
            yield
        except Exception as error:  # whatever it is, the others would wait for ever
            if self.size == 1:
                raise
            wrong = error
        said = self.tell(wrong is not None)
        if wrong and said.index(True) == self.rank:
            raise wrong
        if any(said):
            raise SaidElsewhere(f"process {said.index(True)} cannot go on") from wrong

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Put in place of each tensor its sum over the processes."""
        self._in_place(tensors, dist.all_reduce)

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Put in place of each tensor that of the first process."""
        self._in_place(tensors, partial(dist.broadcast, src=0))

    @torch.no_grad()
    def _in_place(self, tensors: Iterable[Tensor], change: Callable[[Tensor], Any]) -> None:
        """Let the processes change all tensors, a bucket in one message."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            joined = torch.cat([tensor.flatten() for tensor in bucket]).to(self.device)
            change(joined)
            for tensor, part in zip(bucket, joined.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def fetch(self, take: Callable[[Tensor], list[Tensor]], ids: Tensor, wanted: Tensor) -> list[Tensor]:
        """Rows by their numbers, from whichever process has them; only those move that others want.

        Args:
            take: gives the rows at some places, int64 (k,), of those that this process has: tensors (k, ...).
            ids: int64 (m,), the numbers of those, of which no other process has any.
            wanted: int64 (k,), the numbers of the rows that this process wants.

        Returns:
            Tensors of (k, ...) each, in the order of `wanted`.
        """
        ids, wanted = ids.cpu(), wanted.cpu()
        have, want = self.each(ids), self.each(wanted)
        sent = [_places(ids, other[torch.isin(other, ids)]) for other in want]
        arrived = [torch.isin(wanted, other).nonzero().flatten() for other in have]
        assert sum(map(len, arrived)) == len(wanted), "every wanted row is somewhere, once"
        order = torch.cat(arrived).argsort()
        taken = take(torch.cat(sent))
        if self.size == 1:
            return [tensor[order.to(tensor.device)] for tensor in taken]
        return [self._exchange(tensor, sent, arrived)[order.to(tensor.device)] for tensor in taken]

    def _exchange(self, tensor: Tensor, sent: Sequence[Tensor], arrived: Sequence[Tensor]) -> Tensor:
        """Send each process its part of the rows, and give back those that came, by sender."""
        counts = [len(one) for one in arrived]
        received = torch.empty(sum(counts), *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
        dist.all_to_all_single(received, tensor.to(self.device), counts, [len(one) for one in sent])
        return received.to(tensor.device)


ALONE = Team()


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a part, put together; any other as it is. All processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole tensor, where it holds a part of another; else all, on that one's device."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _places(ids: Tensor, wanted: Tensor) -> Tensor:
    """Where each of the wanted numbers stands among `ids`."""
    order = ids.argsort()
    return order[torch.searchsorted(ids[order], wanted)] if len(ids) else wanted


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of about `BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(one.numel() for one in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def shares(cost: Sequence[float], size: int, group: Sequence[int] | None = None) -> list[range]:
    """Cut pieces of work, in their order, into as many parts as there are processes, of costs about alike.

    Each cut is where the pieces before it cost as near to their part of the whole as can be. No part is empty unless
    there are fewer pieces, or groups, than processes: the last ones are then.

    Args:
        cost: of each piece, at least 0.
        size: how many parts.
        group: of each piece, equal ones standing together: a group is not cut.

    Returns:
        The places of each part's pieces.
    """
    before = [0.0]
    for one in cost:
        before.append(before[-1] + one)
    cuts = [i for i in range(len(cost) + 1) if group is None or i in (0, len(cost)) or group[i - 1] != group[i]]
    ends, at, last = [], 0, len(cuts) - 1
    for part in range(1, size + 1):
        first = min(at + 1, last)  # at least one piece, and
        most = max(first, last - (size - part))  # one for each later part, where there are enough
        goal = before[-1] * part / size
        at = last if part == size else min(range(first, most + 1), key=lambda i: abs(before[cuts[i]] - goal))
        ends.append(cuts[at])
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
