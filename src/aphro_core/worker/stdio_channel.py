"""A worker's end of a channel over its standard input and output, which ssh carries to the engine's host."""

from __future__ import annotations

import faulthandler
import itertools
import os
import select
import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue
from typing import Final

import msgspec

from aphro_core.channel import ChannelClosedError, Frames
from aphro_core.messages import codec
from aphro_core.messages.model_source import FetchModel, ModelBytes
from aphro_core.messages.steps import Beat, DumpStacks, FromWorker, StoreCall, StoreReply, ToWorker

_READ_BYTES: Final = 256 * 1024
_GRACE_SECONDS: Final = 0.5  # for the worker to end by itself once the engine is gone
_REPLY_SECONDS: Final = 60.0
_FETCH_SECONDS: Final = 300.0  # for a MiB or so, behind those of other ranks


class StdioChannel:
    """One thread reads: messages for the main thread, replies for whoever asked the store, beats for the lease."""

    def __init__(self, read_fd: int, write_fd: int, lease_seconds: float) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._lease_seconds = lease_seconds
        self._codec = codec.worker_side()
        self._messages: SimpleQueue[ToWorker | None] = SimpleQueue()
        self._replies: SimpleQueue[StoreReply] = SimpleQueue()
        self._fetches: dict[int, SimpleQueue[ModelBytes]] = {}
        self._numbers = itertools.count()
        self._write_lock, self._ask_lock = threading.Lock(), threading.Lock()
        threading.Thread(target=self._read, name="channel", daemon=True).start()

    def send(self, message: FromWorker) -> None:
        data = memoryview(self._codec.encode(message))
        try:
            with self._write_lock:
                while data:
                    data = data[os.write(self._write_fd, data) :]
        except OSError as error:
            raise ChannelClosedError from error

    def receive(self) -> ToWorker:
        message = self._messages.get()
        if message is None:
            raise ChannelClosedError
        return message

    def ask(self, call: StoreCall) -> StoreReply:
        """From any thread. Raises RuntimeError when the engine does not answer."""
        with self._ask_lock:
            self.send(call)
            try:
                return self._replies.get(timeout=_REPLY_SECONDS)
            except Empty:
                raise RuntimeError(f"the engine has not answered within {_REPLY_SECONDS:g} s") from None

    def fetch(self, file: str, ranges: list[int]) -> bytes:
        """The bytes of ranges of a model file on the engine's host, from any thread. Raises RuntimeError."""
        number, replies = next(self._numbers), SimpleQueue[ModelBytes]()
        self._fetches[number] = replies
        try:
            self.send(FetchModel(number, file, ranges))
            reply = replies.get(timeout=_FETCH_SECONDS)
        except Empty:
            raise RuntimeError(f"it has not answered within {_FETCH_SECONDS:g} s") from None
        finally:
            del self._fetches[number]
        if reply.problem:
            raise RuntimeError(reply.problem)
        return reply.data

    def _read(self) -> None:
        """Until the engine is gone, or silent for a whole lease: then this process ends, also out of a collective."""
        try:
            self._read_frames()
        except (OSError, ValueError, msgspec.MsgspecError):  # nobody could answer for what was not understood
            traceback.print_exc()
        self._messages.put(None)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

    def _read_frames(self) -> None:
        frames = Frames()
        while self._has_news():
            data = os.read(self._read_fd, _READ_BYTES)
            if not data:
                return
            frames.feed(data)
            while (body := frames.take()) is not None:
                self._sort(self._codec.decode(body))

    def _has_news(self) -> bool:
        ready, _, _ = select.select([self._read_fd], [], [], self._lease_seconds)
        if not ready:
            print(f"the engine has been silent for {self._lease_seconds:g} s: this rank ends", file=sys.stderr)
        return bool(ready)

    def _sort(self, message: ToWorker) -> None:
        match message:
            case Beat():
                pass
            case DumpStacks():
                faulthandler.dump_traceback(all_threads=True)
            case StoreReply():
                self._replies.put(message)
            case ModelBytes():
                if message.number in self._fetches:
                    self._fetches[message.number].put(message)
            case _:
                self._messages.put(message)
