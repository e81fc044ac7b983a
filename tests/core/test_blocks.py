"""Cutting graphs into blocks for calibration: what each computes, measures and hands on."""

from __future__ import annotations

from square_linears import square_linears

from zqfp_compile.calibrate.blocks import Block, cut_into_blocks


def blocks(body: str, names: list[str], matrices: int) -> tuple[Block, ...]:
    """Cut a graph of x [b, 4] with square weights Wa to We into blocks of so many of their matrices."""
    model, plan = square_linears(body)
    return cut_into_blocks(model, plan.rewritten, names, matrices * 4 * 4 * 4)


CHAIN = (
    "h = Tanh(x)  a = MatMul(h, Wa)  r = Relu(a)  b = MatMul(r, Wb)  s = Add(b, h)  n = Sigmoid(s)"
    "  c = MatMul(n, Wc)  t = Add(c, s)  m = Sigmoid(t)  y = MatMul(m, Wd)"
)


def test_a_block_ends_with_an_activation() -> None:
    first, second = blocks(CHAIN, ["h", "r", "n", "m"], 2)
    operators = [[node.op_type for node in part.segment.nodes] for part in (first, second)]
    assert operators[0] == ["Tanh", "MatMul", "Relu", "MatMul", "Add", "Sigmoid"]
    assert operators[1] == ["MatMul", "Add", "Sigmoid"]
    assert first.measured == ("h", "r", "n") and first.kept == {"s", "n"} == set(first.segment.outputs)
    assert first.segment.inputs == ("x",)
    assert second.measured == ("m",) and not second.kept and not second.segment.outputs
    assert set(second.segment.inputs) == {"n", "s"}


def test_what_is_needed_later_is_handed_through() -> None:
    parts = blocks(CHAIN, ["h", "r", "n", "m"], 1)
    assert [part.measured for part in parts] == [("h", "r"), ("n",), ("m",)]
    assert [part.kept for part in parts] == [{"h", "r"}, {"s", "n"}, set()]
    assert parts[0].segment.outputs == ("h", "r")


def test_values_behind_no_activation_are_measured_in_the_last_block() -> None:
    parts = blocks(CHAIN, ["r", "a", "c", "m"], 1)
    assert [part.measured for part in parts] == [("r", "a"), (), ("c", "m")]
    assert blocks(CHAIN + "  z = Neg(c)", ["z", "m"], 1)[-1].measured == ("z", "m")


def test_what_cannot_be_cut_is_left_whole() -> None:
    model, plan = square_linears(CHAIN)
    assert len(cut_into_blocks(model, plan.linears, ["h"], 1)) == 3
    assert cut_into_blocks(model, plan.linears, ["h", "absent"], 1) == ()
    assert cut_into_blocks(model, plan.linears[::-1], ["h"], 1) == ()
    assert cut_into_blocks(model, [], ["h"], 1) == ()
