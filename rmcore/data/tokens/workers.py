"""Encodes chunks in parallel: in a thread of this process, then in worker processes where they are worth their start.

Input: chunks, in the order of the rows. Output: a future of the `EncodedChunk` of each.
Example: 100,000 pairs on two cores. The first chunks are encoded in a thread and show that the rest takes 50 s, so two
workers start. They need some seconds, in which the thread continues; then they encode all further chunks.

How the workers start: this process starts one fresh interpreter, which loads the tokenizer and the template and forks
the workers. So libraries are imported once, workers share their memory, and no process with running threads is forked.
Each worker has a connection of its own to this process. It ends when the connection closes, however this process ends.

    this process ── control ── fresh interpreter: loads, forks, waits for the workers
         └─ one connection per worker ── worker: receives a chunk, sends the encoded chunk
"""

import contextlib
import gc
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import NamedTuple

from rmcore.config import Config, UserError
from rmcore.data.tokens.build import Chunk, ChunkEncoder, EncodedChunk
from rmcore.data.tokens.limits import LengthLimits
from rmcore.data.tokens.templates import template_of
from rmcore.host.cores import usable_cores

MOST_WORKERS = 16  # by default: the process that reads the rows keeps about as many busy
WORTH_SECONDS = 15.0  # of remaining work in one process, from which on workers are started
LEAVE_SECONDS = 10.0  # in which idle workers end by themselves
IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")  # this process decides when workers end
# The first argument is the module search path of this process, so that both import the same files.
START = "import sys; sys.path[:] = sys.argv[1].split('\\n'); from rmcore.data.tokens.workers import main; main()"

_log = logging.getLogger(__name__)


class Job(NamedTuple):
    """What the workers need to encode as this process does. The fingerprints must be those of what they load."""

    config: Config
    ends: tuple[str, ...]
    limits: LengthLimits
    tokenizer_fingerprint: str
    template_fingerprint: str


class Encoders:
    """Encodes chunks in a thread, and in worker processes once they are ready. A context manager.

    Args:
        encoder: encodes in this process.
        job: the same work, for the workers.
        what: the data, for messages.
    """

    def __init__(self, encoder: ChunkEncoder, job: Job, what: str) -> None:
        workers = job.config.data.workers
        automatic = min(usable_cores(), MOST_WORKERS) if sys.platform == "linux" else 1
        self._count = automatic if workers is None else workers
        self._encoder, self._job, self._what = encoder, job, what
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rmcore-encoder")
        self._workers: Workers | None = None
        self._started = time.monotonic()

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._workers is not None:
            self._workers.close(failed=kind is not None)
        self._thread.shutdown(cancel_futures=True)

    @property
    def most_waiting(self) -> int:
        """How many chunks should be on their way at most, so that all encoders have work and memory stays small."""
        return self._count + 2 if self._workers is not None and self._workers.ready else 1

    def submit(self, chunk: Chunk) -> "Future[EncodedChunk]":
        if self._workers is not None and self._workers.ready:
            return self._workers.submit(chunk)
        rendered = self._encoder.render(chunk)  # while the thread encodes the last chunk, mostly outside of Python
        return self._thread.submit(self._encoder.encode, rendered)

    def consider_workers(self, done: int, total: int) -> None:
        """Start the workers if they are worth it: `done` of `total` rows took the time since this object was made."""
        if self._workers is None and self._count > 1 and done:
            left = (time.monotonic() - self._started) / done * (total - done)
            if left > WORTH_SECONDS:
                self._workers = Workers(self._count, self._job, self._what)


class Workers:
    """Worker processes, of which each encodes one chunk at a time. They start in the background."""

    def __init__(self, count: int, job: Job, what: str) -> None:
        self._what, self._lock, self._end, self._told = what, threading.Lock(), "", False
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count + 1, thread_name_prefix="rmcore-worker")
        self._connections: list[Connection] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._launched(count)
            self._reason = self._threads.submit(self._begin, job)
        except (OSError, ValueError) as error:
            self._reason = Future()
            self._reason.set_result(str(error))

    @property
    def ready(self) -> bool:
        """Whether the workers accept chunks. If they could not start, this process does the work alone."""
        if not self._reason.done():
            return False
        reason = self._reason.result()
        if reason and not self._told:
            self._told = True
            _log.warning("%s: no worker processes, so one process prepares it: %s", self._what, reason)
        return not reason

    def submit(self, chunk: Chunk) -> "Future[EncodedChunk]":
        return self._threads.submit(self._encode, chunk)

    def close(self, *, failed: bool) -> None:
        """End all processes: idle ones by closing their connections, all others by a signal."""
        if self._process is not None:
            if not failed and self._reason.done():
                for connection in self._connections[1:]:
                    connection.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LEAVE_SECONDS)
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: the interpreter and its workers
                self._process.wait()
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()

    def _launched(self, count: int) -> "subprocess.Popen[bytes]":
        """The fresh interpreter, with a connection for itself and one for each worker."""
        pipes = [Pipe() for _ in range(count + 1)]
        self._connections = [ours for ours, _ in pipes]
        theirs = [end.fileno() for _, end in pipes]
        try:
            return subprocess.Popen(
                [sys.executable, "-c", START, "\n".join(sys.path), *map(str, theirs)],
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ
                | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
        finally:
            for _, end in pipes:
                end.close()

    def _begin(self, job: Job) -> str:
        """Wait until the workers are ready. Returns why they cannot be, or nothing."""
        try:
            self._connections[0].send(job)
            reason = str(self._connections[0].recv())
        except EOFError:
            return "the interpreter that starts them ended"
        except Exception as error:  # a job that cannot be sent raises several kinds
            return f"{type(error).__name__}: {error}"
        for connection in self._connections[1:]:
            self._idle.put(connection)
        return reason

    def _encode(self, chunk: Chunk) -> EncodedChunk:
        connection = self._idle.get()
        try:
            connection.send(chunk)
            kind, value = connection.recv()
        except (EOFError, OSError):
            raise UserError(
                f"{self._what}: a worker process ended early, {self._how_it_ended()}; nothing is left of this "
                "preparation. If memory ran out, lower data.workers (1: no worker processes)"
            ) from None
        finally:
            self._idle.put(connection)
        if kind == "encoded":
            return value  # type: ignore[no-any-return]
        raise UserError(value) if kind == "refused" else RuntimeError(f"in a worker process:\n{value}")

    def _how_it_ended(self) -> str:
        """What the fresh interpreter reports about the first worker that ended."""
        with self._lock, contextlib.suppress(EOFError, OSError):
            if not self._end and self._connections[0].poll(LEAVE_SECONDS):
                self._end = str(self._connections[0].recv())
        return self._end or "for an unknown reason"


def main() -> None:
    """The fresh interpreter: loads what the job needs, forks the workers, and reports how the first of them fails."""
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")
    control, *connections = (Connection(int(number)) for number in sys.argv[2:])
    with contextlib.suppress(EOFError, OSError):  # the process that started this one is gone
        job = control.recv()
        try:
            encoder, reason = _load(job)
        except Exception as error:
            encoder, reason = None, f"the tokenizer cannot be loaded once more: {error}"
        if encoder is not None:
            gc.freeze()  # the workers share this memory as long as nobody writes to it
            for connection in connections:
                if os.fork() == 0:
                    with contextlib.suppress(BaseException):  # whatever happens, a worker must not fork others
                        for other in (control, *connections):
                            if other is not connection:
                                other.close()
                        _work(connection, encoder)
                        os._exit(0)
                    os._exit(1)
        for connection in connections:
            connection.close()
        control.send(reason)
        with contextlib.suppress(ChildProcessError):
            while True:
                if code := os.waitstatus_to_exitcode(os.wait()[1]):
                    name = signal.Signals(-code).name if code < 0 else ""
                    control.send(f"killed by {name}" if name else f"with exit code {code}")


def _load(job: Job) -> tuple[ChunkEncoder | None, str]:
    """The encoder of the job, or why it would be another than that of the process that wants it."""
    from rmcore.data.tokens.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(job.config)
    template = template_of(job.config, tokenizer)
    found = tokenizer_fingerprint(tokenizer), template.fingerprint
    if found != (job.tokenizer_fingerprint, job.template_fingerprint):
        return None, "its tokenizer or template is not the one that the configuration describes"
    return ChunkEncoder(job.config, tokenizer, template, job.ends, job.limits), ""


def _work(connection: Connection, encoder: ChunkEncoder) -> None:
    """One worker: encode chunk after chunk until the connection closes."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            chunk = connection.recv()
            try:
                answer: tuple[str, object] = ("encoded", encoder(chunk))
            except UserError as error:
                answer = ("refused", str(error))
            except Exception:
                answer = ("failed", traceback.format_exc())
            connection.send(answer)
