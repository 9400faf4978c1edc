"""Several processes that train one model: how they start, agree, and end together.

torchrun starts them, typed by hand or by `recsys train trainer=ddp`, and restarts them all where
one dies. They agree through its key-value store, so that a mistake is told once.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
from omegaconf import DictConfig
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from recsys.schema import InputError

ON_A_CPU = 2
"""Processes of `trainer=ddp` on a machine without a CUDA device."""
PATIENCE = timedelta(days=2)
"""How long the others wait while the first prepares a dataset."""
TELLING = 3.0
"""Seconds in which the process that tells an error ends, and torchrun the silent ones."""
LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""What errors of a process say that has lost another."""

_store: dist.Store | None = None
_meetings = 0


def launched() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restartable() -> bool:
    """Return whether torchrun starts all processes again where one dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Meet torchrun's other processes, where there are any, for as long as the block runs.

    All but the first are silent. An error in one ends all: the first that meets one tells it.
    """
    global _store, _meetings
    if not launched():
        yield
        return
    _store, rank, _ = next(iter(rendezvous("env://")))
    _meetings += 1
    try:
        with _silent(rank > 0):
            yield
            if dist.is_initialized():
                dist.destroy_process_group()
    except Exception as error:
        end = _told_once(error, rank)
        if end is error:
            raise
        raise end from error
    finally:
        _store = None


@contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if wanted:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
        yield


def _told_once(error: Exception, rank: int) -> BaseException:
    """Return the error for the first process that met one, else a silent end."""
    try:
        met_before = _store is not None and _store.add(_key("failed"), 1) > 1
    except RuntimeError:  # torchrun, which keeps the store, is gone
        met_before = rank > 0
    if met_before:
        time.sleep(TELLING)
        return SystemExit(1)
    if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
        return InputError(
            f"process {rank} lost another process of this training, which died or was killed "
            f"({str(error).splitlines()[0][:200]}); go on with recsys train resume=NAME"
        )
    return error


def told(key: str, make: Callable[[], str]) -> str:
    """Return what `make` returns in the first process; the others wait for it."""
    if _store is None:
        return make()
    if os.environ["RANK"] == "0":
        _store.set(_key(key), make())
    _store.wait([_key(key)], PATIENCE)
    return str(_store.get(_key(key)).decode())


def _key(name: str) -> str:
    return f"recsys/{os.environ['TORCHELASTIC_RESTART_COUNT']}/{_meetings}/{name}"


def settle(config: DictConfig) -> None:
    """Check that there are the devices that `config.trainer` wants, and form the process group.

    Raises InputError. The config gets the number of processes that torchrun started.
    """
    trainer = config.trainer
    check_device(trainer.accelerator)
    if not launched():
        _refuse_several(trainer)
        return
    if _store is None:
        raise InputError("under torchrun there is recsys train alone; start this without torchrun")
    world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > 1 and not _is_ddp(trainer):
        raise InputError(
            f"torchrun started {world} processes and trainer.strategy is "
            f"{trainer.get('strategy', 'auto')}, for one; type trainer=ddp"
        )
    trainer.devices, trainer.num_nodes = _agreed(trainer, local, world)
    _check_number(trainer, local)
    if not dist.is_initialized():
        _form_group(trainer, world)


def _is_ddp(trainer: DictConfig) -> bool:
    return str(trainer.get("strategy", "auto")).startswith("ddp")


def _refuse_several(trainer: DictConfig) -> None:
    if _is_ddp(trainer):
        raise InputError("trainer=ddp is for recsys train; prepare the data first, then train")
    if trainer.devices not in (1, "1", "auto") or trainer.get("num_nodes", 1) != 1:
        raise InputError(
            f"trainer.devices={trainer.devices}: several processes train with trainer=ddp "
            f"trainer.devices={trainer.devices}"
        )


def _agreed(trainer: DictConfig, local: int, world: int) -> tuple[int, int]:
    """Return processes a machine and machines as torchrun has them; refuse other typed ones."""
    met = {"devices": (trainer.devices, local), "num_nodes": (trainer.num_nodes, world // local)}
    for name, (typed, there) in met.items():
        if typed not in ("auto", 1, there):
            raise InputError(
                f"trainer.{name}={typed}, and torchrun started {there}; leave it out under "
                "torchrun, which is told by --nproc-per-node and --nnodes"
            )
    return local, world // local


def _form_group(trainer: DictConfig, world: int) -> None:
    assert _store is not None, "processes meet before they form a group"
    backend = "gloo"
    if on_cuda(trainer.accelerator):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    rank, store = int(os.environ["RANK"]), dist.PrefixStore(_key("group"), _store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def check_device(accelerator: str) -> None:
    """Raise InputError where a CUDA device is wanted and torch sees none."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(
            f"trainer.accelerator={accelerator}: torch {torch.__version__} sees no CUDA device; "
            "use trainer=cpu, or install a CUDA build of torch and check nvidia-smi"
        )


def on_cuda(accelerator: str) -> bool:
    """Return whether a training with this setting runs on CUDA devices."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def _check_number(trainer: DictConfig, count: int) -> None:
    there = torch.cuda.device_count()
    if on_cuda(trainer.accelerator) and count > there:
        raise InputError(
            f"{count} processes on this machine and {there} CUDA device(s): each needs its own. "
            f"Type trainer.devices={there} (torchrun: --nproc-per-node {there}), or "
            "trainer.accelerator=cpu"
        )


def spread(config: DictConfig, words: Sequence[str]) -> bool:
    """Run `recsys` with `words` in as many processes as the config asks; return whether it did.

    Raises InputError where one was killed, and SystemExit where one has told what was wrong.
    """
    trainer = config.trainer
    if launched() or not _is_ddp(trainer):
        return False
    check_device(trainer.accelerator)
    if trainer.num_nodes != 1:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes}: start it on each machine with torchrun "
            f"--nnodes {trainer.num_nodes} --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint "
            "HOST:29400 -m recsys.cli train …, and leave trainer.num_nodes out"
        )
    cuda = on_cuda(trainer.accelerator)
    count = trainer.devices
    if count == "auto":
        count = torch.cuda.device_count() if cuda else ON_A_CPU
    if not isinstance(count, int) or count < 1:
        raise InputError(f"trainer.devices={count}: expected a number of processes, or auto")
    _check_number(trainer, count)
    _launch(words, count)
    return True


def _launch(words: Sequence[str], count: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.ERROR)  # what was wrong, the process that met it has told
    flags = ["--standalone", f"--nproc-per-node={count}", "-m", "recsys.cli"]
    try:
        run(parse_args([*flags, *words]))
    except SignalException as told:  # its processes were, too, and have said what comes next
        raise SystemExit(128 + told.sigval) from None
    except ChildFailedError as error:
        place, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        name = signal.Signals(-failure.exitcode).name
        raise InputError(
            f"process {place} was killed by {name}; go on with recsys train resume=NAME"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
