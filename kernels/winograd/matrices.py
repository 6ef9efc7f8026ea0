"""The integer Winograd matrices F(2,3), F(4,3) and F(5,3), denominators cleared."""

from typing import NamedTuple


class Winograd(NamedTuple):
    """`divisor * Y = A^T [(G g) . (B^T d)]` for `outputs` results of a 3-tap filter."""

    divisor: int
    bt: tuple[tuple[int, ...], ...]
    g: tuple[tuple[int, ...], ...]
    at: tuple[tuple[int, ...], ...]


def _rows(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row.split())) for row in text.split(";"))


MATRICES = {
    2: Winograd(
        2,
        _rows("1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 -1 0 1"),
        _rows("2 0 0; 1 1 1; 1 -1 1; 0 0 2"),
        _rows("1 1 1 0; 0 1 -1 1"),
    ),
    4: Winograd(
        24,
        _rows("4 0 -5 0 1 0; 0 -4 -4 1 1 0; 0 4 -4 -1 1 0; 0 -2 -1 2 1 0; 0 2 -1 -2 1 0; 0 4 0 -5 0 1"),
        _rows("6 0 0; -4 -4 -4; -4 4 -4; 1 2 4; 1 -2 4; 0 0 24"),
        _rows("1 1 1 1 1 0; 0 1 -1 2 -2 0; 0 1 1 4 4 0; 0 1 -1 8 -8 1"),
    ),
    5: Winograd(
        120,
        _rows(
            "12 -4 -15 5 3 -1 0; 0 12 8 -7 -2 1 0; 0 -12 16 -1 -4 1 0; 0 6 1 -7 -1 1 0; 0 -6 5 5 -5 1 0;"
            "0 4 0 -5 0 1 0; 0 -12 4 15 -5 -3 1"
        ),
        _rows("10 0 0; 10 10 10; 5 -5 5; -5 -10 -20; -1 2 -4; 1 3 9; 0 0 120"),
        _rows("1 1 1 1 1 1 0; 0 1 -1 2 -2 3 0; 0 1 1 4 4 9 0; 0 1 -1 8 -8 27 0; 0 1 1 16 16 81 1"),
    ),
}
