"""What every pass promises (``zqfp_compile.pass_base``), checked whenever one runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import onnx_ir as ir

from zqfp_compile import pass_runner
from zqfp_compile.pass_base import Pass, PassResult
from zqfp_compile.registry import create_pass


def digest(model: ir.Model) -> str:
    """A hash of the whole model, tensors included."""
    return hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()


def call_checked(pass_: Pass, model: ir.Model) -> PassResult:
    """Run a pass: ``modified`` agrees with the model's hash, and a second run changes nothing."""
    before = digest(model)
    result = pass_.call(model)
    after = digest(result.model)
    assert result.modified == (before != after), f"{pass_.name}: modified={result.modified} is untrue"
    again = pass_.call(result.model)
    assert not again.modified, f"{pass_.name}: a second run reports a change"
    assert digest(again.model) == after, f"{pass_.name}: a second run changes the model"
    return result


class _Checked:
    def __init__(self, pass_: Pass) -> None:
        self._pass = pass_

    def call(self, model: ir.Model) -> PassResult:
        return call_checked(self._pass, model)


@contextmanager
def checked_passes() -> Iterator[list[Pass]]:
    """Every pass that a compile runs meanwhile is checked; yields the list of them, growing."""
    ran: list[Pass] = []

    def create_checked(name: str, **options: object) -> _Checked:
        ran.append(create_pass(name, **options))
        return _Checked(ran[-1])

    with mock.patch.object(pass_runner, "create_pass", create_checked):
        yield ran
