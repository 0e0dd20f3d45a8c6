"""Reading ahead changes neither what is read nor when there is nothing to read."""

import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.wire.buffered_socket import BufferedSocket


@contextlib.contextmanager
def linked():
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        yield BufferedSocket(near), far


@given(content=st.binary(max_size=2000), sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=50))
def test_whatever_is_asked_for_the_stream_comes_in_order_and_no_more_at_once(content, sizes):
    with linked() as (buffered, far):
        far.sendall(content)
        far.shutdown(socket.SHUT_WR)
        read, place = b"", 0
        while part := buffered.recv(sizes[place % len(sizes)]):
            assert len(part) <= sizes[place % len(sizes)]
            read, place = read + part, place + 1
        assert read == content


def test_what_is_read_ahead_is_pending_until_it_is_taken():
    with linked() as (buffered, far):
        assert buffered.pending() == 0
        far.sendall(b"abcde")
        assert buffered.recv(2) == b"ab"
        assert buffered.pending() == 3
        assert buffered.recv(100) == b"cde"
        assert buffered.pending() == 0


def test_with_nothing_there_it_says_so_and_loses_nothing():
    with linked() as (buffered, far):
        with pytest.raises(BlockingIOError):
            buffered.recv(1)
        far.sendall(b"a")
        assert buffered.recv(1) == b"a"
        with pytest.raises(BlockingIOError):
            buffered.recv(1)


def test_what_is_sent_arrives_and_a_closed_one_has_no_descriptor():
    with linked() as (buffered, far):
        assert buffered.send(b"abc") == 3
        assert far.recv(10) == b"abc"
        assert buffered.fileno() >= 0
        buffered.close()
        assert buffered.fileno() == -1
